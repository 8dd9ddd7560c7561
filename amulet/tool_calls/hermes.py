"""Hermes, Qwen and the fallback: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from amulet.tool_calls.base import CallReader, Function, JsonCalls, Mark, json_objects

NAME = "Hermes"
SPANS: tuple[tuple[str, str], ...] = (("<tool_call>", "</tool_call>"),)
EXTRA: tuple[str, ...] = ()


def detect(template: str) -> bool:
    # If another tag follows, the call is some kind of XML.
    return re.search(r"<tool_call>(?!(\\n|\s)*<\w)", template) is not None


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return JsonCalls()


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    more = ' ("\\n" call)*' if parallel else ""
    opening, closing = SPANS[0]
    call = f'call: {mark(opening)} "\\n" object "\\n" {mark(closing)}'
    return f"start: call{more}\n{call}\n{json_objects(functions, 'arguments')}"
