"""GLM: `<tool_call>name`, then `<arg_key>` and `<arg_value>` for each argument, `</tool_call>`.

The schema says which values are strings; all others are JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from amulet.tool_calls.base import (
    CUT,
    CallReader,
    Function,
    Mark,
    Piece,
    WholeReader,
    arguments_schema,
    bare_arguments,
    bare_value_rules,
)

NAME = "GLM"
SPANS: tuple[tuple[str, str], ...] = (("<tool_call>", "</tool_call>"),)
EXTRA: tuple[str, ...] = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

_NAME = re.compile(r"\s*([^\s<{][^<\n]*)")
# A value may contain a closing tag; only one that another key follows ends it.
_ARGUMENT = re.compile(
    r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))", re.DOTALL
)


def detect(template: str) -> bool:
    return "<tool_call>" in template and "<arg_key>" in template


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader(functions)


class _Reader(WholeReader):
    """Only the closing marker ends the arguments, so a call is parsed once it is complete."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self._functions = functions

    def is_inside(self) -> bool:
        return self._text.rfind("<arg_value>") > self._text.rfind("</arg_value>")

    def finish(self, cut: bool) -> list[Piece]:
        text, raw = self._text, self._text.strip()
        name = _NAME.match(text)
        if name is None:
            return [Piece("end", raw, CUT if cut else "expected a name")]
        out = [Piece("name", name[1].strip())] if not cut or "<" in text else []
        written: list[tuple[str, str]] = []
        at = name.end()
        while found := _ARGUMENT.match(text, at):
            written.append((found[1].strip(), found[2]))
            at = found.end()
        if cut or text[at:].strip():
            wrong = CUT if cut else "expected <arg_key>key</arg_key> and <arg_value>...</arg_value>"
            return [*out, Piece("end", raw, wrong)]
        arguments = bare_arguments(self._functions, name[1].strip(), written)
        out.append(Piece("arguments", json.dumps(arguments, ensure_ascii=False)))
        return [*out, Piece("end", raw)]


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    # GLM 4.7 writes a call on one line; earlier versions write a line per tag.
    line = "\n" if re.search(r"</arg_key>(\\n|\n)", template) else ""
    more = f" ({json.dumps(line) if line else ''} call)*" if parallel else ""
    opening, closing = map(mark, SPANS[0])
    key_start, key_end, value_start, value_end = map(mark, EXTRA)
    tail = json.dumps(line) if line else ""
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"start: call{more}", f"call: {opening} ({names}) {closing}"]
    for i, function in enumerate(functions):
        terms = [json.dumps(function.name + line)]
        schema = arguments_schema(function)
        for k, (key, entry) in enumerate(schema["properties"].items()):
            rules += bare_value_rules(f"value_{i}_{k}", entry, schema, value_end)
            parts = [key_start, json.dumps(key), key_end, tail, value_start, f"value_{i}_{k}", tail]
            optional = "" if key in schema.get("required", ()) else "?"
            terms.append(f"({' '.join(filter(None, parts))}){optional}")
        rules.append(f"call_{i}: " + " ".join(terms))
    return "\n".join(rules)
