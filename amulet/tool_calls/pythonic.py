"""Python calls in a list: `[get_weather(city="Paris"), ...]` (Llama 3.2 and 4, LFM2)."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

import regex  # type: ignore[import-untyped]

from amulet.tool_calls.base import (
    CUT,
    CallReader,
    Function,
    Mark,
    Piece,
    Schema,
    WholeReader,
    arguments_schema,
    json_term,
)

NAME = "Python calls"
SPANS: tuple[tuple[str, str], ...] = (
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<|python_start|>", "<|python_end|>"),
)
EXTRA: tuple[str, ...] = ()

_WITHOUT_OPEN_STRING = regex.compile(
    r"""(?:[^'"\\]|'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")*+""", regex.DOTALL
)
_JSON_NAMES = {"true": True, "false": False, "null": None}


def detect(template: str) -> bool:
    # The templates contain an example such as [func_name1(params_name1=value1, ...)].
    return "<|tool_call_start|>" in template or bool(regex.search(r"\[func\w*\(\w+\s*=", template))


def starts(text: str, names: Sequence[str]) -> bool | None:
    name = "|".join(map(regex.escape, names))
    found = regex.match(rf"\[\s*(?:{name})\s*\(", text, partial=True)
    if found is None:
        return False
    return None if found.partial else True


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader()


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    more = ' (", " call)*' if parallel else ""
    opening = closing = ""
    for start, end in SPANS:
        if start in template:
            opening, closing = mark(start), mark(end)
            break
    rules = [f'start: {opening} "[" call{more} "]" {closing}']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        rules += _call_rules(i, function)
    return "\n".join(rules)


def _call_rules(i: int, function: Function) -> list[str]:
    """Return the rules of `call_<i>`: keyword arguments in the schema's order."""
    schema = arguments_schema(function)
    required = schema.get("required", [])
    shared: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    names = list(schema["properties"])
    rules = [f'call_{i}: {json.dumps(function.name + "(")} first_{i}_0 ")"']
    for k, name in enumerate(names):
        skip = [] if name in required else [""]
        value = f"value_{i}_{k}"
        rules.append(f"{value}: {json_term({**shared, **schema['properties'][name]})}")
        for rule, separator in (("first", ""), ("more", ", ")):
            term = f"{json.dumps(f'{separator}{name}=')} {value} more_{i}_{k + 1}"
            others = [f"{rule}_{i}_{k + 1}" for _ in skip]
            rules.append(f"{rule}_{i}_{k}: " + " | ".join([term, *others]))
    for rule in ("first", "more"):
        rules.append(f'{rule}_{i}_{len(names)}: ""')
    return rules


class _Reader(WholeReader):
    """Python can only be parsed once it is complete."""

    def is_inside(self) -> bool:
        return _WITHOUT_OPEN_STRING.fullmatch(self._text) is None

    def finish(self, cut: bool) -> list[Piece]:
        text = self._text.strip()
        try:
            body = ast.parse(text, mode="eval").body
            calls = body.elts if isinstance(body, ast.List | ast.Tuple) else [body]
            parsed = [_call(text, call) for call in calls]
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            wrong = CUT if cut else f"expected [name(argument=value), ...]: {error}"
            return [Piece("end", text, wrong)]
        if not parsed:
            return [Piece("end", text, "expected a call, but the list is empty")]
        return [piece for call in parsed for piece in call]


def _call(text: str, call: ast.expr) -> list[Piece]:
    if not isinstance(call, ast.Call):
        raise ValueError(f"{ast.unparse(call)} is not a call")
    name = ast.unparse(call.func)
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"{name} has an argument without a name")
    arguments = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    raw = ast.get_source_segment(text, call) or text
    return [Piece("name", name), Piece("arguments", json.dumps(arguments)), Piece("end", raw)]


def _value(node: ast.expr) -> Any:
    """Return the value of a literal; also accepts JSON's true, false and null."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        return dict(zip(keys, map(_value, node.values), strict=True))
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is not a literal") from None
    json.dumps(value)  # raises TypeError for bytes, sets and complex numbers
    return value
