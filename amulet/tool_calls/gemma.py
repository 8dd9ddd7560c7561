"""Gemma: `<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>`.

Gemma 4 writes the same with `<|tool_call>`, `<|"|>` around texts, and `<tool_call|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from amulet.grammar import resolved
from amulet.tool_calls.base import (
    CUT,
    CallReader,
    Function,
    Mark,
    Piece,
    Schema,
    WholeReader,
    arguments_schema,
)

NAME = "Gemma"
SPANS: tuple[tuple[str, str], ...] = (
    ("<start_function_call>", "<end_function_call>"),
    ("<|tool_call>", "<tool_call|>"),
)
EXTRA: tuple[str, ...] = ("<escape>", '<|"|>')

_CALL = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")
_BARE = re.compile(r"[^,:{}\[\]]+")


def detect(template: str) -> bool:
    return any(opening in template for opening, _ in SPANS)


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader()


class _Reader(WholeReader):
    """The syntax is not JSON, so a call is parsed once its section is complete."""

    def is_inside(self) -> bool:
        return any(self._text.count(quote) % 2 for quote in EXTRA)

    def finish(self, cut: bool) -> list[Piece]:
        raw, out, position = self._text, [], 0
        while found := _CALL.match(raw, position):
            try:
                value, end = _value(raw, found.end())
            except (ValueError, RecursionError) as error:
                wrong = CUT if cut else str(error)
                out += [Piece("name", found[1]), Piece("end", raw[position:].strip(), wrong)]
                return out
            out += [Piece("name", found[1]), Piece("arguments", json.dumps(value))]
            out.append(Piece("end", raw[position:end].strip()))
            position = end
        if not out or raw[position:].strip():
            wrong = CUT if cut else "expected call:name{...}"
            out.append(Piece("end", raw[position:].strip(), wrong))
        return out


def _value(text: str, at: int) -> tuple[Any, int]:
    """Parse one value; return it and its end."""
    at = _skip(text, at)
    for quote in (*EXTRA, '"'):
        if text.startswith(quote, at):
            end = text.find(quote, at + len(quote))
            if end < 0:
                raise ValueError("a text has no closing quote")
            return text[at + len(quote) : end], end + len(quote)
    if text.startswith("{", at):
        return _entries(text, at + 1, "}")
    if text.startswith("[", at):
        return _entries(text, at + 1, "]")
    bare = _BARE.match(text, at)
    if bare is None:
        raise ValueError(CUT if at >= len(text) else f"expected a value at {at}")
    try:
        return json.loads(bare[0]), bare.end()
    except ValueError:
        return bare[0].strip(), bare.end()


def _entries(text: str, at: int, closing: str) -> tuple[Any, int]:
    members: dict[str, Any] = {}
    elements: list[Any] = []
    while True:
        at = _skip(text, at)
        if text.startswith(closing, at):
            return (members if closing == "}" else elements), at + 1
        value, at = _value(text, at)
        at = _skip(text, at)
        if closing == "}":
            if not text.startswith(":", at):
                raise ValueError(CUT if at >= len(text) else "expected a colon")
            key, (value, at) = str(value), _value(text, at + 1)
            members[key] = value
            at = _skip(text, at)
        else:
            elements.append(value)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closing, at):
            raise ValueError(CUT if at >= len(text) else f"expected {closing}")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


# ---- grammar ----


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    k = 0 if SPANS[0][0] in template else 1
    opening, closing = map(mark, SPANS[k])
    rules = _Rules(EXTRA[k], mark(EXTRA[k]))
    names = []
    for function in functions:
        schema = arguments_schema(function)
        body = rules.term(schema, schema)
        names.append(f"{json.dumps(f'call:{function.name}')} {body}")
    calls = [f"start: call{'+' if parallel else ''}"]
    calls.append(f"call: {opening} ({' | '.join(names)}) {closing}")
    return "\n".join([*calls, *rules.lines])


class _Rules:
    """Lark rules for values in Gemma's syntax, from JSON schemas."""

    def __init__(self, quote: str, term: str) -> None:
        self._quote = term
        self.lines = [
            f"text: {term} TEXT {term}",
            f"TEXT: /[^{re.escape(quote[0])}]*/",
            r"NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?/",
            r"INTEGER: /-?(0|[1-9][0-9]*)/",
            "KEY: /[A-Za-z_][A-Za-z0-9_]*/",
            'any: text | NUMBER | "true" | "false" | "null" | any_list | any_object',
            'any_list: "[" (any ("," any)*)? "]"',
            'any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
        ]
        self._count = 0

    def term(self, schema: Any, root: Schema) -> str:
        """Return the name of a rule for a schema's values; unsupported schemas permit any value."""
        if not isinstance(schema, dict):
            return "any"
        self._count += 1
        name = f"value_{self._count}"
        reference = schema.get("$ref")
        if isinstance(reference, str):
            target = resolved(reference, root)
            # A recursive schema can't be expanded.
            return self.term(target, root) if self._count < 200 else "any"
        if "const" in schema or "enum" in schema:
            values = schema.get("enum", [schema.get("const")])
            body = " | ".join(self._literal(value) for value in values)
        elif branches := schema.get("anyOf") or schema.get("oneOf"):
            body = " | ".join(self.term(branch, root) for branch in branches)
        elif isinstance(kinds := schema.get("type"), list):
            body = " | ".join(self.term({**schema, "type": kind}, root) for kind in kinds)
        elif kinds == "object" and schema.get("properties") is not None:
            body = self._object(name, schema, root)
        elif kinds == "array":
            item = self.term(schema.get("items"), root)
            body = f'"[" ({item} ("," {item})*)? "]"'
        else:
            known = {"string": "text", "integer": "INTEGER", "number": "NUMBER"}
            known |= {"boolean": '"true" | "false"', "null": '"null"', "object": "any_object"}
            body = known.get(str(kinds), "any")
        self.lines.append(f"{name}: {body}")
        return name

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {json.dumps(value)} {self._quote}" if value else self._quote * 2
        return json.dumps(json.dumps(value))

    def _object(self, name: str, schema: Schema, root: Schema) -> str:
        """Return the body of an object rule: the declared keys in order, optional ones optional."""
        required = schema.get("required", [])
        properties = list(schema["properties"].items())
        for k, (key, entry) in enumerate(properties):
            value = self.term(entry, root)
            for rule, separator in (("first", ""), ("more", ",")):
                term = f"{json.dumps(f'{separator}{key}:')} {value} {name}_more_{k + 1}"
                others = [] if key in required else [f"{name}_{rule}_{k + 1}"]
                self.lines.append(f"{name}_{rule}_{k}: " + " | ".join([term, *others]))
        for rule in ("first", "more"):
            self.lines.append(f'{name}_{rule}_{len(properties)}: ""')
        return f'"{{" {name}_first_0 "}}"'
