"""The interface of a tool-call dialect, and the parsing of JSON calls that dialects share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from amulet.grammar import LENIENT, resolved, sayable

PieceKind: TypeAlias = Literal["text", "reasoning", "name", "arguments", "end"]
Schema: TypeAlias = dict[str, Any]
Mark: TypeAlias = Callable[[str], str]
"""Converts a marker such as `<tool_call>` to a Lark term: a token if it is one, else text."""
CUT = "the call is cut off"


@dataclass(frozen=True)
class Piece:
    """A piece of an answer and its kind.

    "text" and "reasoning" are prose. A call consists of a "name" (once it is known), pieces of its
    "arguments" as JSON, and an "end" whose `text` is the call as the model wrote it. If it has an
    `error`, the call can't be parsed and may have no "name" piece.
    """

    kind: PieceKind
    text: str
    error: str | None = None


@dataclass(frozen=True)
class Function:
    """A tool that may be called: its name and the JSON schema of its arguments."""

    name: str
    parameters: Schema


class CallReader(Protocol):
    """Parses one section of calls incrementally."""

    def push(self, text: str) -> list[Piece]:
        """Parse the next text of the section."""

    def is_inside(self) -> bool:
        """Tell whether the text ends inside a value; a closing marker there is part of it."""

    def finish(self, cut: bool) -> list[Piece]:
        """End the section; return the remaining pieces, or an error if there was no call.

        Args:
            cut: decoding stopped inside the section, so only a complete call counts.
        """


class WholeReader:
    """The base of readers that parse a section once it is complete, in `finish`."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[Piece]:
        """Take the next text of the section."""
        self._text += text
        return []


class Dialect(Protocol):
    """The interface that each dialect module implements."""

    NAME: str
    """The dialect's name in messages."""
    SPANS: tuple[tuple[str, str], ...]
    """Markers that open and close a section of calls; "" means the end of the answer."""
    EXTRA: tuple[str, ...]
    """Further markers inside a section that may be special tokens."""

    def detect(self, template: str) -> bool:
        """Tell whether a chat template uses this dialect."""

    def starts(self, text: str, names: Sequence[str]) -> bool | None:
        """Tell whether an answer starts with a call without a marker; None if not known yet."""

    def reader(self, functions: Sequence[Function] = ()) -> CallReader:
        """Return a parser for a section; the functions' schemas give the types of values."""

    def grammar(
        self, functions: Sequence[Function], parallel: bool, mark: Mark, template: str
    ) -> str:
        """Return a Lark grammar of one call, or of one or more with `parallel`."""


class Quotes:
    """Tells, character by character, which parts of a JSON text are in strings."""

    def __init__(self) -> None:
        self.open = self._escaped = False

    def hold(self, character: str) -> bool:
        """Take the next character; return whether it is in a string or is one of its quotes."""
        if self.open:
            self._escaped, was_escaped = character == "\\" and not self._escaped, self._escaped
            self.open = character != '"' or was_escaped
            return True
        self.open = character == '"'
        return self.open


class JsonCalls:
    """Parses calls written as JSON objects with a name and arguments; streams the arguments.

    Text between the objects (a list's brackets, commas, line ends) is skipped. The name may be
    under "name" or "function", or in an object under "function"; the arguments are under
    "arguments" or "parameters", as an object or as JSON in a string.
    """

    def __init__(self) -> None:
        self._between = ""
        self._found = False
        self._reset()

    def _reset(self) -> None:
        self._raw = ""
        self._depth = 0
        self._quotes = Quotes()
        self._token = ""  # the key or value being read at the object's top level
        self._key: str | None = None
        self._name: str | None = None
        self._arguments: str | None = None
        self._streaming = False

    def push(self, text: str) -> list[Piece]:
        out: list[Piece] = []
        for character in text:
            self._take(character, out)
        return joined(out)

    def is_inside(self) -> bool:
        return self._quotes.open

    def finish(self, cut: bool) -> list[Piece]:
        out: list[Piece] = []
        if self._depth:
            # Only the closing brace is missing, because the model forgot it.
            self._end(out, whole=not cut and self._streaming and self._depth == 1)
        elif not self._found:
            error = CUT if cut else "expected a JSON object"
            out.append(Piece("end", self._between.strip(), error))
        return out

    def _take(self, character: str, out: list[Piece]) -> None:
        if not self._depth:
            if character == "{":
                self._found, self._depth, self._raw = True, 1, "{"
            else:
                self._between += character
            return
        self._raw += character
        if self._quotes.hold(character):
            pass  # brackets, colons and commas in strings are not JSON syntax
        elif character in "{[":
            self._depth += 1
            if character == "{" and self._depth == 2 and self._key == "function":
                self._depth, self._key, self._token = 1, None, ""
                return
        elif character in "}]":
            self._depth -= 1
            if not self._depth:
                self._value_is_over(out)
                self._end(out, whole=True)
                return
        elif self._depth == 1 and character == ":" and self._key is None:
            self._key, self._token = _loads(self._token) or "", ""
            return
        elif self._depth == 1 and character == ",":
            self._value_is_over(out)
            return
        self._token += character
        if self._streaming:
            if self._depth > 1 or character in "}]":  # no space after the value
                out.append(Piece("arguments", character))
        elif (
            self._name is not None
            and self._key in ("arguments", "parameters")
            and self._token.strip() == "{"
        ):
            self._streaming = True
            out.append(Piece("arguments", "{"))

    def _value_is_over(self, out: list[Piece]) -> None:
        value, key = self._token.strip(), self._key
        self._key, self._token = None, ""
        if key in ("arguments", "parameters"):
            self._arguments = value
            if self._name is not None and not self._streaming:
                out.append(Piece("arguments", _as_object(value)))
            self._streaming = False
        elif key in ("name", "function") and self._name is None:
            name = _loads(value)
            if isinstance(name, str) and name:
                self._name = name
                out.append(Piece("name", name))
                if self._arguments is not None:
                    out.append(Piece("arguments", _as_object(self._arguments)))

    def _end(self, out: list[Piece], whole: bool) -> None:
        if not whole:
            out.append(Piece("end", self._raw, CUT))
        elif self._name is None:
            out.append(Piece("end", self._raw, 'expected a "name"'))
        else:
            if self._arguments is None and not self._streaming:
                out.append(Piece("arguments", "{}"))
            out.append(Piece("end", self._raw))
        self._reset()


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _as_object(value: str) -> str:
    """Return arguments as a JSON object: unwrapped from a string, `{}` for null."""
    parsed = _loads(value)
    if isinstance(parsed, str):
        return parsed or "{}"
    return "{}" if value in ("null", "") else value


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with consecutive pieces of arguments joined."""
    out: list[Piece] = []
    for piece in pieces:
        if out and out[-1].kind == piece.kind == "arguments":
            out[-1] = Piece("arguments", out[-1].text + piece.text)
        else:
            out.append(piece)
    return out


# ---- bare values: strings without quotes, everything else as JSON, as the schema says ----

_KINDS: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}


def bare_arguments(
    functions: Sequence[Function], name: str, written: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return arguments from keys and bare values, by the schema of the named function.

    Values that the schema doesn't declare, or that aren't JSON of a declared type, stay strings.
    """
    schema = next((f.parameters for f in functions if f.name == name), {})
    declared = schema.get("properties") or {}
    return {
        key: _typed(value, _kinds(declared[key], schema)) if key in declared else value
        for key, value in written
    }


def _typed(text: str, kinds: frozenset[str]) -> Any:
    if kinds == {"string"}:
        return text
    bare = text.strip()
    value = _loads(_PYTHON_NAMES.get(bare, bare))
    if isinstance(value, float) and not math.isfinite(value):
        return text  # a number that JSON does not have
    if isinstance(value, float) and value.is_integer() and "number" not in kinds:
        value = int(value)
    kind = _KINDS[type(value)]
    if kind == "string" or (value is None and bare not in ("null", "None")):  # or not JSON
        return text
    return value if kind in kinds or (kind == "integer" and "number" in kinds) else text


def _kinds(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """Return the JSON types that a schema permits, if it states them."""
    every = frozenset(_KINDS.values())
    if not isinstance(schema, dict) or depth > 20:
        return every
    if isinstance(reference := schema.get("$ref"), str):
        return _kinds(resolved(reference, root), root, depth + 1)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return frozenset(_KINDS.get(type(value), "string") for value in values)
    if isinstance(branches := schema.get("anyOf") or schema.get("oneOf"), list):
        found = (_kinds(branch, root, depth + 1) for branch in branches)
        return frozenset().union(*found)
    if isinstance(parts := schema.get("allOf"), list):
        return every.intersection(*(_kinds(part, root, depth + 1) for part in parts))
    kinds = schema.get("type")
    return frozenset(kinds if isinstance(kinds, list) else [kinds]) & every if kinds else every


def bare_value_rules(name: str, schema: Any, root: Schema, end: str) -> list[str]:
    """Return Lark rules; the one called `name` is a bare value followed by the term `end`."""
    entry = schema if isinstance(schema, dict) else {}
    if "enum" in entry or "const" in entry:
        values = entry.get("enum", [entry.get("const")])
        texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        return [f"{name}: ({' | '.join(map(json.dumps, texts))}) {end}"]
    if "string" in _kinds(entry, root):
        most = entry.get("maxLength", "")
        length = f"{{{entry.get('minLength', 0)},{most}}}"
        if end.startswith("<["):  # a token, which no text contains
            return [f"{name}: {name}_text {end}", f"{name}_text: /(?s:.{length})/"]
        closing = end[1:-1].replace("/", r"\/")
        return [f"{name}[lazy]: /(?s:.{length}){closing}/"]
    shared: Schema = {key: root[key] for key in ("$defs", "definitions") if key in root}
    term = json_term({**shared, **entry})
    return [f"{name}: {name}_json {end}", f"{name}_json: {term}"]


# ---- grammars ----


def json_objects(functions: Sequence[Function], key: str) -> str:
    """Return Lark rules in which `object` is a JSON object that calls one of the functions."""
    names = " | ".join(f"object_{i}" for i in range(len(functions)))
    rules = [f"object: {names}"]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "{key}": '
        rules.append(f'object_{i}: {json.dumps(head)} arguments_{i} "}}"')
        rules.append(arguments_rule(i, function))
    return "\n".join(rules)


def arguments_rule(i: int, function: Function) -> str:
    """Return the Lark rule `arguments_<i>`: the JSON of a function's arguments."""
    return f"arguments_{i}: {json_term(arguments_schema(function))}"


def arguments_schema(function: Function) -> Schema:
    """Return the schema of the arguments; undeclared ones are permitted only if it says so."""
    schema: Schema = {"type": "object", **function.parameters}
    # A recursive class is written as a reference to one of its own parts.
    if isinstance(found := resolved(str(schema.get("$ref", "")), schema), dict):
        schema = {**schema, **found}
        schema.pop("$ref", None)
    schema.setdefault("properties", {})
    says = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
    if not any(key in schema for key in says):
        schema["additionalProperties"] = False
    return schema


def json_term(schema: Schema) -> str:
    """Return a Lark term for JSON that is valid against a schema."""
    return "%json " + json.dumps(sayable({**schema, **LENIENT}))
