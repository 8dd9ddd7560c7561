"""Schemas of which a grammar can say only a part: the rest is checked when the answer is read."""

from __future__ import annotations

import json
from decimal import Decimal
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, SecretStr

from amulet import RequestError
from tests.langchain.scripted import scripted_chat, tool_call_text


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Node(BaseModel):
    value: int
    next: Node | None = None


class Guarded(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "not": {"required": ["never"]},
            "if": {"properties": {"a": {"const": 1}}},
            "then": {"required": ["b"]},
            "dependentRequired": {"a": ["b"]},
            "propertyNames": {"pattern": "^[ab]$"},
        }
    )
    a: int
    b: int


def one(of: Any) -> type[BaseModel]:
    """Return a class with one field."""
    return type("One", (BaseModel,), {"__annotations__": {"field": of}, "__doc__": "One field."})


# what the field is, what the model writes, what it is read as
FIELDS: dict[str, tuple[Any, str, Any]] = {
    "set": (set[str], '["a", "b"]', {"a", "b"}),
    "frozenset": (frozenset[int], "[1, 2]", frozenset({1, 2})),
    "path": (Path, '"/tmp/x"', Path("/tmp/x")),
    "bytes": (bytes, '"abc"', b"abc"),
    "secret": (SecretStr, '"pw"', SecretStr("pw")),
    "decimal": (Decimal, '"1.50"', Decimal("1.50")),
    "network": (IPv4Network, '"10.0.0.0/8"', IPv4Network("10.0.0.0/8")),
    "url": (AnyUrl, '"https://example.com/"', AnyUrl("https://example.com/")),
    "look-ahead": (
        Annotated[str, Field(json_schema_extra={"pattern": "^(?=.*x)[a-z]+$"})],
        '"axb"',
        "axb",
    ),
    "back-reference": (
        Annotated[str, Field(json_schema_extra={"pattern": r"^(a)\1$"})],
        '"aa"',
        "aa",
    ),
    "format": (Annotated[str, Field(json_schema_extra={"format": "color"})], '"red"', "red"),
    "union": (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        '{"kind": "dog", "tricks": ["sit"]}',
        Dog(kind="dog", tricks=["sit"]),
    ),
    "recursion": (
        Node,
        '{"value": 1, "next": {"value": 2, "next": null}}',
        Node(value=1, next=Node(value=2)),
    ),
    "big": (Annotated[int, Field(ge=-(10**40))], "7", 7),
    "tuple": (tuple[str, int], '["a", 1]', ("a", 1)),
    "dict": (dict[str, list[int]], '{"a": [1]}', {"a": [1]}),
    "pattern keys": (
        dict[Annotated[str, Field(pattern="^[a-z]+$")], int],
        '{"a": 1}',
        {"a": 1},
    ),
    "foreign keys": (
        Annotated[
            dict[str, int],
            Field(
                json_schema_extra={
                    "patternProperties": {"^(?!x)": {"type": "integer"}},
                    "additionalProperties": False,
                }
            ),
        ],
        '{"a": 1}',
        {"a": 1},
    ),
    "guards": (Guarded, '{"a": 1, "b": 2}', Guarded(a=1, b=2)),
}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("name", FIELDS)
def test_an_answer_with_such_a_field(name: str, method: Any) -> None:
    of, written, read = FIELDS[name]
    answer = '{"field": ' + written + "}"
    if method == "function_calling":
        answer = tool_call_text("One", field=json.loads(written))
    model = scripted_chat(answer)
    parsed = model.with_structured_output(one(of), method=method).invoke("x")
    assert parsed.field == read


@pytest.mark.parametrize("name", FIELDS)
def test_a_forced_tool_with_such_a_field(name: str) -> None:
    of, written, _ = FIELDS[name]
    given = json.loads(written)
    model = scripted_chat(tool_call_text("One", field=given))
    call = model.bind_tools([one(of)], tool_choice="any").invoke("x").tool_calls[0]
    assert (call["name"], call["args"]) == ("One", {"field": given})


def test_what_the_grammar_left_out_is_checked_when_the_answer_is_read() -> None:
    class Card(BaseModel):
        """A card."""

        code: Annotated[str, Field(json_schema_extra={"pattern": "^(?=.*x).*$"})]

        def model_post_init(self, _: Any) -> None:
            if "x" not in self.code:
                raise ValueError("no x in it")

    model = scripted_chat('{"code": "abc"}')
    with pytest.raises(OutputParserException, match="no x in it"):
        model.with_structured_output(Card).invoke("x")


def test_a_class_that_contains_itself() -> None:
    written = {"value": 1, "next": {"value": 2, "next": None}}
    whole = Node(value=1, next=Node(value=2))
    answer = scripted_chat(json.dumps(written))
    assert answer.with_structured_output(Node).invoke("x") == whole
    call = scripted_chat(tool_call_text("Node", **written))
    structured = call.with_structured_output(Node, method="function_calling")
    assert structured.invoke("x") == whole
    schema = {
        "type": "function",
        "function": {"name": "Node", "parameters": Node.model_json_schema()},
    }
    assert call.bind_tools([schema], tool_choice="any").invoke("x").tool_calls[0]["args"] == written


def test_parts_that_are_put_together_do_not_refuse_each_other() -> None:
    named = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    aged = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    schema = {"title": "Person", "description": "Both.", "type": "object", "allOf": [named, aged]}
    model = scripted_chat('{"name": "Ann", "age": 7}')
    assert model.bind(response_format=schema).invoke("x").content == '{"name": "Ann", "age": 7}'


def test_what_no_answer_can_satisfy_names_the_tool_and_the_field() -> None:
    impossible = {
        "type": "object",
        "properties": {
            "ok": {"type": "string"},
            "when": {"type": "array", "items": {"type": "day"}},
        },
        "required": ["ok", "when"],
    }
    tool = {"type": "function", "function": {"name": "book", "parameters": impossible}}
    model = scripted_chat("x")
    with pytest.raises(RequestError, match=r"tools: book: field 'when\.\[\]': Invalid type: day"):
        model.bind_tools([tool], tool_choice="any").invoke("x")
    with pytest.raises(RequestError, match=r"field 'when\.\[\]': Invalid type: day"):
        model.bind(response_format=impossible).invoke("x")
