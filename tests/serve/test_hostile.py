"""Bodies made to break the server: nesting, and grammars that llguidance does not survive."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from amulet import Amulet
from amulet.serve.app import create_app
from amulet.serve.schema import VALUES
from tests.serve.conftest import asking, saying, user
from tests.templates import family_tokenizer

CHAT = "/v1/chat/completions"


async def test_what_is_nested_too_deeply_is_a_400(tiny: Amulet) -> None:
    deep: Any = 1
    for _ in range(150):
        deep = {"a": deep}
    call = {"function": {"name": "w", "arguments": '{"a":' * 20_000 + "1" + "}" * 20_000}}
    history = [*user("hi"), {"role": "assistant", "tool_calls": [call]}, *user("and?")]
    async with asking(create_app(tiny, name="m")) as client:
        for body in (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": deep}]}]},
            {"chat_template_kwargs": {"x": deep}},
            {"metadata": deep},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
        ):
            response = await client.post(CHAT, json={"messages": user("hi"), **body})
            assert response.status_code == 400
            assert "nested more than 100 levels deep" in response.json()["error"]["message"]
    amulet = saying(family_tokenizer("qwen"), "hello")
    async with asking(create_app(amulet, name="m")) as client:
        response = await client.post(CHAT, json={"messages": history, "max_tokens": 2})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "The request is nested too deeply."


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
async def test_bodies_of_very_many_values_are_refused_at_once(path: str, tiny: Amulet) -> None:
    """Checking a million wrong items took minutes, gigabytes, and all the other requests' time."""
    field = "input" if path == "/v1/responses" else "messages"
    async with asking(create_app(tiny, name="m")) as client:
        response = await client.post(path, json={field: [1] * (VALUES + 1)})
        assert response.status_code == 400
        words = "body: it has more than 100,000 keys and values."
        assert response.json()["error"]["message"] == words
        response = await client.post(path, json={field: [1] * 1000})
        assert response.status_code == 400
        assert len(response.content) < 4000  # not one message for each
        assert re.search(r"; and \d+ more\.$", response.json()["error"]["message"])
        long = {"messages": user("hi"), "max_tokens": 2, "stop": [",a" * 99_000]}
        response = await client.post(CHAT, json=long)
        assert response.status_code == 200  # long texts are no obstacle


async def test_a_past_calls_arguments_are_values_too(tiny: Amulet) -> None:
    for count, said in ((9, "The last message calls tools"), (VALUES, "more than 100,000 keys")):
        arguments = '{"a": [' + ",".join(["[]"] * count) + "]}"
        call = {"id": "1", "function": {"name": "w", "arguments": arguments}}
        history = [*user("hi"), {"role": "assistant", "tool_calls": [call]}]
        async with asking(create_app(tiny, name="m")) as client:
            response = await client.post(CHAT, json={"messages": history})
        assert said in response.text


async def test_errors_repeat_no_long_value(tiny: Amulet) -> None:
    long = "private " * 1000
    call = {"function": {"arguments": long}}
    async with asking(create_app(tiny, name="m")) as client:
        for path, body in (
            (CHAT, {"messages": user("hi"), "model": long}),
            (CHAT, {"messages": [{"role": long, "content": "a"}]}),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": long}]}]}),
            (CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}, *user("hi")]}),
            (CHAT, {"messages": user("hi"), long: 1}),
            (CHAT, {"messages": user("hi"), "tools": [tool()], "tool_choice": long}),
            ("/v1/responses", {"input": [{"type": long}]}),
            ("/v1/responses", {"input": "hi", "tools": [{"type": long}]}),
            ("/v1/responses", {"input": "hi", "tool_choice": {"type": long}}),
        ):
            response = await client.post(path, json=body)
            assert response.status_code in (400, 404)
            assert len(response.json()["error"]["message"]) < 400


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
async def test_no_number_of_a_body_is_nan_or_infinite(number: str, tiny: Amulet) -> None:
    """Python reads them in JSON, but no answer that repeats them could be written."""
    schema = f'{{"type": "object", "properties": {{"x": {{"minimum": {number}}}}}}}'
    chat, tool = json.dumps(user("hi")), f'"name": "f", "parameters": {schema}'
    call = f'"tools": [{{"type": "function", "function": {{{tool}}}}}]'
    async with asking(create_app(tiny, name="m")) as client:
        for path, body in (
            (CHAT, f'{{"messages": {chat}, {call}, "tool_choice": "required"}}'),
            (CHAT, f'{{"messages": {chat}, {call}, "stream": true}}'),
            ("/v1/responses", f'{{"input": "hi", "tools": [{{"type": "function", {tool}}}]}}'),
            ("/v1/responses", f'{{"input": "hi", "text": {{"format": {{"a": {number}}}}}}}'),
            ("/tokenize", f'{{"messages": {chat}, "chat_template_kwargs": {{"a": {number}}}}}'),
        ):
            headers = {"Content-Type": "application/json"}
            response = await client.post(path, content=body, headers=headers)
            assert response.status_code == 400
            words = "body: a number is NaN or infinite; send finite numbers."
            assert response.json()["error"]["message"] == words


def chain(length: int) -> dict[str, Any]:
    """Return a JSON schema whose definitions lead from one to the next."""
    definitions: dict[str, Any] = {
        f"{i}": {
            "type": "object",
            "properties": {"": {"$ref": f"#/$defs/{i + 1}"}},
            "required": [""],
        }
        for i in range(length)
    }
    return {"$ref": "#/$defs/0", "$defs": {**definitions, f"{length}": {"type": "null"}}}


async def test_grammars_that_break_llguidance_break_nothing_else(tiny: Amulet) -> None:
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(5000))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"grammar": {"kind": "lark", "source": f'start: r0\n{rules}\nr5000: "ab"'}}, "ab"),
        ({"response_format": schema_format(chain(500))}, '{"": {"": '),
        ({"grammar": {"kind": "lark", "source": "start: start"}}, "could not be followed"),
        ({"grammar": {"kind": "regex", "source": "a{999}{999}{999}"}}, "could not be followed"),
        ({"grammar": {"kind": "json_schema", "source": "{"}}, "grammar (json_schema): "),
        ({"response_format": schema_format(chain(1000))}, "this server permits 65536"),
        ({"tools": [big_tool()], "tool_choice": "required"}, "this server permits 65536"),
    )
    async with asking(create_app(tiny, name="m")) as client:
        for body, words in cases:
            sent = {"messages": user("hi"), "max_tokens": 10, **body}
            response = await client.post(CHAT, json=sent)
            found = response.json()
            if response.status_code == 200:
                assert found["choices"][0]["message"]["content"].startswith(words)
            else:
                assert response.status_code == 400
                assert words in found["error"]["message"]
                assert found["error"]["param"] in ("grammar", "response_format", "tools")


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool() -> dict[str, Any]:
    return {"type": "function", "function": {"name": "w"}}


def big_tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"enum": ["a" * 70_000]}}}
    return {"type": "function", "function": {"name": "w", "parameters": parameters}}
