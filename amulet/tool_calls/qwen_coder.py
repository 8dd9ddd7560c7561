"""Qwen3-Coder: `<tool_call>`, `<function=name>`, `<parameter=key>` with a bare value, end tags.

Each tag is on its own line. The schema says which values are strings; all others are JSON.
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

NAME = "Qwen3-Coder"
SPANS: tuple[tuple[str, str], ...] = (("<tool_call>", "</tool_call>"),)
EXTRA: tuple[str, ...] = ()

_NAME = re.compile(r"\s*<function=([^>\n]+)>")
# A value may contain a closing tag; only one that another tag or call follows ends it.
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"
    r"(?=\s*(?:<parameter=|</function>|</tool_call>\s*<tool_call>\s*<function=|\Z))",
    re.DOTALL,
)
_END = re.compile(r"\s*</function>")


def detect(template: str) -> bool:
    return "<function=" in template and "<parameter=" in template


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader(functions)


class _Reader(WholeReader):
    """What follows a value determines its end, so a section is parsed once it is complete."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self._functions = functions

    def is_inside(self) -> bool:
        return "<parameter=" in self._text and not self._text.rstrip().endswith("</function>")

    def finish(self, cut: bool) -> list[Piece]:
        text, out, at = self._text, [], 0
        while name := _NAME.match(text, at):
            written: list[tuple[str, str]] = []
            position = name.end()
            while found := _PARAMETER.match(text, position):
                written.append((found[1].strip(), found[2]))
                position = found.end()
            end = _END.match(text, position)
            out.append(Piece("name", name[1].strip()))
            if end is None and (cut or text[position:].strip()):
                break
            position = end.end() if end else position
            arguments = bare_arguments(self._functions, name[1].strip(), written)
            out.append(Piece("arguments", json.dumps(arguments, ensure_ascii=False)))
            out.append(Piece("end", text[at:position].strip()))
            at = position
        rest = text[at:].strip()
        if rest or not out:
            out.append(Piece("end", rest, CUT if cut else "expected <function=name>...</function>"))
        return out


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    more = ' ("\\n" call)*' if parallel else ""
    opening, closing = map(mark, SPANS[0])
    value_end = json.dumps("\n</parameter>\n")
    names = " | ".join(f"call_{i}" for i in range(len(functions)))
    rules = [f"start: call{more}", f'call: {opening} "\\n" ({names}) "</function>\\n" {closing}']
    for i, function in enumerate(functions):
        terms = [json.dumps(f"<function={function.name}>\n")]
        schema = arguments_schema(function)
        for k, (key, entry) in enumerate(schema["properties"].items()):
            rules += bare_value_rules(f"value_{i}_{k}", entry, schema, value_end)
            optional = "" if key in schema.get("required", ()) else "?"
            opening_tag = json.dumps(f"<parameter={key}>\n")
            terms.append(f"({opening_tag} value_{i}_{k}){optional}")
        rules.append(f"call_{i}: " + " ".join(terms))
    return "\n".join(rules)
