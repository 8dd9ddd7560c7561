"""Llama 3: the answer is `{"name": ..., "parameters": {...}}`, perhaps after `<|python_tag|>`."""

from __future__ import annotations

from collections.abc import Sequence

import regex  # type: ignore[import-untyped]

from amulet.tool_calls.base import CallReader, Function, JsonCalls, Mark, json_objects

NAME = "Llama 3 JSON"
SPANS: tuple[tuple[str, str], ...] = (("<|python_tag|>", ""),)
EXTRA: tuple[str, ...] = ()

# A JSON answer is a call if it starts with a name and parameters.
_HEAD = regex.compile(
    r'\{\s*("type"\s*:\s*"function"\s*,\s*)?'
    r'"(name|function)"\s*:\s*"[^"]*"\s*,\s*"(parameters|arguments)"\s*:'
)


def detect(template: str) -> bool:
    return "<|python_tag|>" in template or '"parameters": dictionary of' in template


def starts(text: str, names: Sequence[str]) -> bool | None:
    found = _HEAD.match(text, partial=True)
    if found is None:
        return False
    return None if found.partial else True


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return JsonCalls()


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    more = ' ("; " object)*' if parallel else ""
    return f"start: object{more}\n{json_objects(functions, 'parameters')}"
