"""A call that is cut or can't be read is never made, and a merged stream is what `invoke` gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.tools import tool

from amulet_integrations.langchain import ChatAmulet
from tests.langchain.scripted import scripted_chat, tool_call_text
from tests.langchain.test_chat_model import joined

RAN: list[str] = []


@tool
def write(path: str = "/", force: bool = False) -> str:
    """Write a file."""
    RAN.append(path)
    return "ok"


ANSWER = f"Now. {tool_call_text('write', path='/tmp/one/file', force=True)}"
# The marker of a call is one token of this tokenizer, every other character is one.
LENGTH = len(ANSWER) - len("<tool_call></tool_call>") + 2
BROKEN = [
    '<tool_call>\n{"name": "write", "arguments": {"path": }}\n</tool_call>',
    '<tool_call>\n{"name": "write", "arguments": {"path": "/a" "b"}}\n</tool_call>',
    '<tool_call>\n{"name": "write", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "write", "arguments": 7}\n</tool_call>',
    '<tool_call>\n{"name": "write", "arguments": {"path": NaN}}\n</tool_call>',
    '<tool_call>\n{"arguments": {"path": "/a"}}\n</tool_call>',
    "<tool_call>\n\n</tool_call>",
    "<tool_call>\nwrite\n</tool_call>",
    "<tool_call>",
    '<tool_call>\n{"name": "write"',
]


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


def shape(message: Any) -> dict[str, Any]:
    """What must not depend on streaming; ids are drawn."""
    assert all(call["id"] for call in [*message.tool_calls, *message.invalid_tool_calls])
    return {
        "content": message.content,
        "calls": [(call["name"], call["args"]) for call in message.tool_calls],
        "invalid": [(call["name"], call["args"]) for call in message.invalid_tool_calls],
        "finish": message.response_metadata["finish_reason"],
        "usage": message.usage_metadata,
    }


@pytest.mark.parametrize("tokens", [*range(1, LENGTH - 8, 5), *range(LENGTH - 8, LENGTH + 1)])
def test_a_cut_stream_is_what_invoke_gives(tokens: int) -> None:
    chat = scripted_chat(ANSWER, max_tokens=tokens).bind_tools([write])
    reply = chat.invoke("x")
    chunks = list(chat.stream("x"))
    assert shape(joined(chunks)) == shape(reply)
    seen = chunks[0]
    for chunk in chunks[1:]:
        seen += chunk
        if not reply.tool_calls:  # at no time is there one
            assert seen.tool_calls == []
    written = tokens - 5  # tokens of the call
    if written < 1:
        assert (reply.tool_calls, reply.invalid_tool_calls) == ([], [])
    elif written < LENGTH - 5 - 2:
        assert (reply.tool_calls, len(reply.invalid_tool_calls)) == ([], 1)
        assert reply.invalid_tool_calls[0]["error"] == "the call is cut off"
    else:
        assert [call["args"] for call in reply.tool_calls] == [
            {"path": "/tmp/one/file", "force": True}
        ]


@pytest.mark.parametrize("answer", BROKEN)
async def test_a_call_that_cannot_be_read_is_invalid_everywhere(answer: str) -> None:
    chat = scripted_chat(answer).bind_tools([write])
    reply = chat.invoke("x")
    assert reply.tool_calls == []
    assert len(reply.invalid_tool_calls) == 1
    expected = shape(reply)
    assert shape(joined(list(chat.stream("x")))) == expected
    assert shape(joined([chunk async for chunk in chat.astream("x")])) == expected
    assert shape(await chat.ainvoke("x")) == expected
    assert shape(scripted_chat(answer, streaming=True).bind_tools([write]).invoke("x")) == expected
    ended = [
        event["data"]["output"]
        async for event in chat.astream_events("x", version="v2")
        if event["event"] == "on_chat_model_end"
    ]
    assert [shape(message) for message in ended] == [expected]
    events: Any = await chat.astream_events("x", version="v3")
    said = [event async for event in events]
    finished = [e["content"] for e in said if e["event"] == "content-block-finish"]
    assert [block["type"] for block in finished] == ["invalid_tool_call"]


async def test_events_of_version_3_hold_no_cut_call() -> None:
    for tokens in (6, 7, 20, 40, 60, LENGTH - 3):
        chat = scripted_chat(ANSWER, max_tokens=tokens).bind_tools([write])
        events: Any = await chat.astream_events("x", version="v3")
        blocks = [e["content"] async for e in events if e["event"] == "content-block-finish"]
        assert [block["type"] for block in blocks] == ["text", "invalid_tool_call"]


@pytest.mark.parametrize("mode", ["values", "messages", "updates"])
@pytest.mark.parametrize("tokens", [6, 40, 55, LENGTH - 3])
async def test_an_agent_makes_no_cut_call(mode: Any, tokens: int) -> None:
    agent = create_agent(scripted_chat(ANSWER, max_tokens=tokens), [write])
    asked: Any = {"messages": "x"}
    whole = agent.invoke(asked)["messages"]
    for _ in agent.stream(asked, stream_mode=mode):
        pass
    async for _ in agent.astream(asked, stream_mode=mode):
        pass
    async for _ in agent.astream_events(asked, version="v2"):
        pass
    assert RAN == []
    assert [message.type for message in whole] == ["human", "ai"]


async def test_an_agent_makes_whole_calls_as_they_are() -> None:
    answers = {"<tool_response>\nok": "Done.", "": ANSWER}
    agent = create_agent(scripted_chat(answers), [write])
    asked: Any = {"messages": "x"}
    for _ in agent.stream(asked, stream_mode="messages"):
        pass
    async for _ in agent.astream(asked, stream_mode="messages"):
        pass
    assert RAN == ["/tmp/one/file"] * 2


def test_equal_calls_and_a_third_one() -> None:
    one, other = tool_call_text("write", path="a"), tool_call_text("write", path="b")
    chat = scripted_chat(f"{one}\n{one}\n{other}").bind_tools([write])
    for message in (chat.invoke("x"), joined(list(chat.stream("x")))):
        assert [call["args"]["path"] for call in message.tool_calls] == ["a", "a", "b"]


def test_line_breaks_in_a_text_stay_a_call_in_events_of_version_3() -> None:
    answer = '<tool_call>\n{"name": "write", "arguments": {"path": "a\nb"}}\n</tool_call>'
    chat = scripted_chat(answer).bind_tools([write])
    events: Any = chat.stream_events("x", version="v3")
    blocks = [e["content"] for e in events if e["event"] == "content-block-finish"]
    assert [(b["type"], b["args"]) for b in blocks] == [("tool_call", {"path": "a\nb"})]
    pieces = "".join(piece["args"] or "" for c in chat.stream("x") for piece in c.tool_call_chunks)
    assert json.loads(pieces) == {"path": "a\nb"}


def test_text_and_calls_stay_apart_in_blocks_of_v1() -> None:
    calls = [tool_call_text("write", path=path) for path in "ab"]
    answer = f"<think>\nHm.\n</think>\n\nNow. {calls[0]}\n{calls[1]}\nDone."
    chat = scripted_chat(answer, output_version="v1").bind_tools([write])
    whole: Any = joined(list(chat.stream("x")))
    said = [(b["type"], b.get("reasoning") or b.get("text") or b["args"]) for b in whole.content]
    assert said == [
        ("reasoning", "Hm."),
        ("text", "Now."),
        ("tool_call", {"path": "a"}),
        ("tool_call", {"path": "b"}),
        ("text", "Done."),
    ]
    assert [call["args"]["path"] for call in whole.tool_calls] == ["a", "b"]
    cut = scripted_chat(answer, output_version="v1", max_tokens=80).bind_tools([write])
    merged: Any = joined(list(cut.stream("x")))
    assert (merged.content[1]["type"], merged.content[1]["text"]) == ("text", "Now.")
    assert (len(merged.tool_calls), len(merged.invalid_tool_calls)) == (1, 1)


def test_the_model_sees_what_it_failed_to_say() -> None:
    chat = scripted_chat({"could not be read": "I see.", "x": BROKEN[0]})
    assert isinstance(chat, ChatAmulet)
    reply = chat.bind_tools([write]).invoke("x")
    assert isinstance(reply, AIMessage)
    assert not isinstance(reply, AIMessageChunk)
    prompt = chat.get_num_tokens_from_messages([reply])
    assert prompt > chat.get_num_tokens_from_messages([AIMessage("")]) + 40
