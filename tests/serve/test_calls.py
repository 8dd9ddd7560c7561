"""Calls that are cut or can't be read: streamed and whole agree, and no client makes them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from amulet import Reply
from amulet.remote import connect
from amulet.serve.app import create_app
from tests.serve.conftest import listening, saying, user
from tests.serve.test_chat import CALL, WEATHER, chunks, post
from tests.serve.test_clients import weather
from tests.templates import family_tokenizer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

TWO = f"Wait. {CALL}{CALL.replace('Rome', 'Köln').replace(': ', ':')}"
BROKEN = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>',
    '<tool_call>\n{"arguments": {"city": "Rome"}}\n</tool_call>',
    "<tool_call>\n?\n</tool_call>",
)


def merged(streamed: list[dict[str, Any]]) -> tuple[str, list[Any], list[Any], str]:
    """Return what a client makes of one choice's deltas: content, calls, invalid ones, reason."""
    content, calls, invalid = "", {}, []
    for choice in (chunk["choices"][0] for chunk in streamed):
        content += choice["delta"].get("content") or ""
        invalid += choice["delta"].get("invalid_tool_calls", [])
        for part in choice["delta"].get("tool_calls", []):
            known = calls.setdefault(part["index"], {"name": "", "arguments": ""})
            for key, value in part["function"].items():
                known[key] += value
    return content, list(calls.values()), invalid, streamed[-1]["choices"][0]["finish_reason"]


def told(invalid: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(call["name"], call["raw"], call["error"]) for call in invalid]  # ids are drawn


@pytest.mark.parametrize("answer", [TWO, *BROKEN])
async def test_streamed_and_whole_agree_wherever_the_answer_is_cut(answer: str) -> None:
    tokenizer = family_tokenizer("qwen")
    amulet = saying(tokenizer, answer)
    length = len(tokenizer.encode(answer, add_special_tokens=False))
    for tokens in [*range(1, length, 9), length - 2, length - 1, length, length + 1]:
        options = {"messages": user("hi"), "tools": [WEATHER], "max_tokens": tokens}
        choice = (await post(amulet, **options))["choices"][0]
        message = choice["message"]
        content, calls, invalid, reason = merged(await chunks(amulet, **options))
        assert content == (message["content"] or "")
        assert content == "Wait."[: len(content)]
        assert calls == [call["function"] for call in message.get("tool_calls", [])]
        for call in calls:
            assert call["name"] == "weather"
            assert json.loads(call["arguments"]) in ({"city": "Rome"}, {"city": "Köln"})
        assert told(invalid) == told(message.get("invalid_tool_calls", []))
        assert reason == choice["finish_reason"]
    assert len(calls) == (2 if answer == TWO else 0)


def test_a_remote_reply_is_the_local_one() -> None:
    def known(reply: Reply) -> Reply:
        return replace(
            reply,
            tool_calls=tuple(replace(call, id="") for call in reply.tool_calls),
            invalid_tool_calls=tuple(replace(call, id="") for call in reply.invalid_tool_calls),
        )

    for answer in (TWO, *BROKEN):
        amulet = saying(family_tokenizer("qwen"), answer)
        with listening(create_app(amulet, name="m")) as (url, _):
            remote = connect(url)
            for tokens in (3, 7, 40, 60, 64, 90, 130, 200):
                options: dict[str, Any] = {"tools": [WEATHER], "max_new_tokens": tokens}
                stream, ours = (a.stream(user("hi"), **options) for a in (remote, amulet))
                events, expected = list(stream.events()), list(ours.events())
                assert [replace(event, id=None) for event in events] == [
                    replace(event, id=None) for event in expected
                ]
                assert known(stream.reply) == known(ours.reply)
                for call in stream.reply.tool_calls:
                    assert json.loads(call.written) == call.arguments


async def test_no_client_makes_a_cut_call() -> None:
    answer = CALL.replace('"city": "Rome"', '"city": "Rome", "force": true')
    cut = len(answer) - 45
    with listening(create_app(saying(family_tokenizer("qwen"), answer), name="m")) as (url, _):
        options: dict[str, Any] = {"model": "m", "api_key": "k", "max_retries": 0}
        for tokens in (1, cut, cut + 10, cut + 20):
            chat = ChatOpenAI(base_url=f"{url}/v1", max_tokens=tokens, **options)
            bound = chat.bind_tools([weather])
            assert bound.invoke("?").tool_calls == []  # type: ignore[attr-defined]
            pieces: list[Any] = list(bound.stream("?"))
            whole = pieces[0]
            for piece in pieces[1:]:
                whole += piece
            assert whole.tool_calls == []
            llm = OpenAILike(
                api_base=f"{url}/v1", max_tokens=tokens, is_chat_model=True,
                is_function_calling_model=True, **options,
            )  # fmt: skip
            tool = FunctionTool.from_defaults(weather)
            for response in (
                llm.chat_with_tools([tool], "?"),
                *llm.stream_chat_with_tools([tool], "?"),
            ):
                found = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
                assert found == []
