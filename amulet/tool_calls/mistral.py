"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from amulet.tool_calls.base import (
    CUT,
    CallReader,
    Function,
    JsonCalls,
    Mark,
    Piece,
    Quotes,
    arguments_rule,
    joined,
    json_objects,
)

NAME = "Mistral"
SPANS: tuple[tuple[str, str], ...] = (("[TOOL_CALLS]", ""),)
EXTRA: tuple[str, ...] = ("[ARGS]", "[CALL_ID]")


def detect(template: str) -> bool:
    return "[TOOL_CALLS]" in template


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader()


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    opening = mark("[TOOL_CALLS]")
    if not _has_named_form(template):
        more = ' (", " object)*' if parallel else ""
        objects = json_objects(functions, "arguments")
        return f'start: {opening} "[" object{more} "]"\n{objects}'
    separator = mark("[ARGS]") if "[ARGS]" in template else ""
    rules = [f"start: call{'+' if parallel else ''}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        name = json.dumps(function.name)
        rules.append(f"call_{i}: {opening} {name} {separator} arguments_{i}")
        rules.append(arguments_rule(i, function))
    return "\n".join(rules)


def _has_named_form(template: str) -> bool:
    # Tekken v11 and later put the name right after the marker; earlier versions open a list there.
    return (
        "[ARGS]" in template or re.search(r"\[TOOL_CALLS\]['\"]\s*[+~]\s*\w", template) is not None
    )


class _Reader:
    """Parses both forms; what follows the marker distinguishes them."""

    def __init__(self) -> None:
        self._head = ""
        self._list: JsonCalls | None = None
        self._object: _Object | None = None
        self._found = False

    def push(self, text: str) -> list[Piece]:
        if self._list is not None:
            return self._list.push(text)
        out: list[Piece] = []
        for i, character in enumerate(text):
            if self._object is not None:
                out.append(Piece("arguments", character))
                if self._object.closes(character):
                    out.append(Piece("end", self._head + self._object.text))
                    self._object, self._head = None, ""
                continue
            self._head += character
            head = self._head.replace("[TOOL_CALLS]", "").lstrip()
            if not self._found and (
                head[:2] in ("[{", "[]") or head[:1] == "{" or head[:2] == "[ "
            ):
                self._list = JsonCalls()
                return [*joined(out), *self._list.push(head + text[i + 1 :])]
            if character == "{":
                name = re.split(r"\[ARGS\]|\[CALL_ID\]|\s*\{", head)[0].strip()
                self._found, self._object = True, _Object()
                self._head = head[:-1]
                if name:
                    out.append(Piece("name", name))
                out.append(Piece("arguments", "{"))
                self._object.closes("{")
        return joined(out)

    def is_inside(self) -> bool:
        return False  # no marker closes the section

    def finish(self, cut: bool) -> list[Piece]:
        if self._list is not None:
            return self._list.finish(cut)
        if self._object is not None:
            return [Piece("end", self._head + self._object.text, CUT)]
        head = self._head.replace("[TOOL_CALLS]", "").strip()
        if cut and (self._head.strip() or not self._found):
            return [Piece("end", head, CUT)]
        if head or not self._found:
            return [Piece("end", head, "expected a name and a JSON object")]
        return []


class _Object:
    """Finds the closing brace of a JSON object."""

    def __init__(self) -> None:
        self.text = ""
        self._depth = 0
        self._quotes = Quotes()

    def closes(self, character: str) -> bool:
        self.text += character
        if self._quotes.hold(character):
            pass
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0
