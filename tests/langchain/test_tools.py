"""Tools: bound, chosen, streamed, malformed, in the history; never steered, options never lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from amulet import RequestError, TemplateError
from tests.langchain.scripted import scripted_chat, tool_call_text
from tests.langchain.test_chat_model import joined
from tests.models import ScriptedModel, byte_tokenizer


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Weather(BaseModel):
    """The weather in a city."""

    city: str


ADD = tool_call_text("add", a=1, b=2)
WEATHER = tool_call_text("Weather", city="Oslo")
TOOLS = [add, Weather]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "args": arguments, "type": "tool_call"}


def calls(message: AIMessage) -> list[dict[str, Any]]:
    return [{key: c[key] for key in ("name", "args", "type")} for c in message.tool_calls]  # type: ignore[literal-required]


async def test_a_call_is_parsed_in_answers_and_streams() -> None:
    chat = scripted_chat(ADD).bind_tools(TOOLS)
    reply = chat.invoke("1+2?")
    assert reply.content == ""
    assert calls(reply) == [call("add", a=1, b=2)]
    assert reply.tool_calls[0]["id"]
    assert reply.response_metadata["finish_reason"] == "tool_calls"
    chunks: list[Any] = list(chat.stream("1+2?"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert len(pieces) > 5
    assert pieces[0]["name"] == "add"
    assert json.loads("".join(piece["args"] or "" for piece in pieces)) == {"a": 1, "b": 2}
    whole = joined(chunks)
    assert calls(whole) == [call("add", a=1, b=2)]
    assert whole.content == ""
    assert calls(await chat.ainvoke("1+2?")) == [call("add", a=1, b=2)]
    whole = joined([chunk async for chunk in chat.astream("1+2?")])
    assert calls(whole) == [call("add", a=1, b=2)]


def test_text_and_parallel_calls_together() -> None:
    chat = scripted_chat(f"Let me see. {ADD}\n{WEATHER}")
    both = [call("add", a=1, b=2), call("Weather", city="Oslo")]
    bound = chat.bind_tools(TOOLS)
    reply = bound.invoke("x")
    assert str(reply.content).strip() == "Let me see."
    assert calls(reply) == both
    streamed = joined(list(bound.stream("x")))
    assert calls(streamed) == both
    assert streamed.content == reply.content
    assert len({c["id"] for c in reply.tool_calls}) == 2
    one = chat.bind_tools(TOOLS, parallel_tool_calls=False)
    assert calls(one.invoke("x")) == both[:1]


def test_a_malformed_call_is_an_invalid_tool_call() -> None:
    broken = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b"}}\n</tool_call>'
    chat = scripted_chat(broken).bind_tools(TOOLS)
    for reply in (chat.invoke("x"), joined(list(chat.stream("x")))):
        assert reply.tool_calls == []
        assert len(reply.invalid_tool_calls) == 1
        assert '"b"' in str(reply.invalid_tool_calls[0]["args"])
        assert "<tool_call>" not in str(reply.content)


@pytest.mark.parametrize("choice", ["any", "required", True])
def test_a_forced_choice_always_calls(choice: Any) -> None:
    # The model would talk; the grammar leaves it only calls.
    chat = scripted_chat("I would rather talk.", max_tokens=300)
    reply = chat.bind_tools([Weather], tool_choice=choice).invoke("x", stop=None)
    assert [c["name"] for c in [*reply.tool_calls, *reply.invalid_tool_calls]] == ["Weather"]


@pytest.mark.parametrize(
    "choice",
    ["add", {"type": "function", "function": {"name": "add"}}, {"type": "tool", "name": "add"}],
)
def test_a_named_tool_is_the_one_called(choice: Any) -> None:
    chat = scripted_chat({"": ADD})
    assert chat.bind_tools(TOOLS, tool_choice=choice).kwargs["tool_choice"] == "add"
    assert calls(chat.bind_tools(TOOLS, tool_choice=choice).invoke("x")) == [call("add", a=1, b=2)]


@pytest.mark.parametrize("choice", ["none", False])
def test_none_hides_the_tools(choice: Any) -> None:
    chat = scripted_chat({"Add two numbers": "I see tools", "": "no tools"})
    assert chat.bind_tools(TOOLS).invoke("x").content == "I see tools"
    assert chat.bind_tools(TOOLS, tool_choice=choice).invoke("x").content == "no tools"


def test_an_unknown_choice_or_tool_is_an_error() -> None:
    chat = scripted_chat("x")
    with pytest.raises(RequestError, match="tool_choice='divide': expected 'auto', 'any', 'none'"):
        chat.bind_tools(TOOLS, tool_choice="divide")
    for wrong in (["add"], 3, {"function": "divide", "type": "x"}):
        with pytest.raises(RequestError, match="expected 'auto', 'any', 'none'"):
            chat.bind_tools(TOOLS, tool_choice=wrong)
    with pytest.raises(RequestError, match="tools: 3 is not a tool"):
        chat.bind_tools([3])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="did you mean parallel_tool_calls"):
        chat.bind_tools(TOOLS, parallel_tools_calls=True)


def test_options_survive_bind_tools_in_any_order() -> None:
    # The preferred row would talk: a call is plain only if steering is off inside it.
    chat = scripted_chat({"system\nA": "A!", "": "plain"})
    assert chat.bind(preference="A").bind_tools(TOOLS).invoke("x").content == "A!"
    assert chat.bind_tools(TOOLS).bind(preference="A").invoke("x").content == "A!"
    assert chat.bind_tools(TOOLS, preference="A").invoke("x").content == "A!"
    assert chat.with_preference("A").bind_tools(TOOLS).invoke("x").content == "A!"
    assert chat.bind_tools(TOOLS).with_preference("A").invoke("x").content == "A!"
    assert chat.bind_tools(TOOLS).with_retry().bind(preference="A").invoke("x").content == "A!"
    config: Any = {"configurable": {"preference": "A"}}
    assert chat.bind_tools(TOOLS).invoke("x", config).content == "A!"
    assert chat.bind(max_tokens=2).bind_tools(TOOLS).invoke("x").content == "pl"


def test_a_call_is_what_the_plain_model_says() -> None:
    other = tool_call_text("add", a=9, b=9)
    # From the call's opening on the base row alone decides.
    chat = scripted_chat({"system\nA": other, "": ADD}, preference="A")
    one = chat.bind_tools(TOOLS, parallel_tool_calls=False)
    assert calls(one.invoke("x")) == [call("add", a=1, b=2)]


def test_history_with_calls_and_results_reaches_the_template() -> None:
    chat = scripted_chat({"<tool_response>\n3\n</tool_response>": "It is 3.", "": "no result"})
    history: list[Any] = [
        HumanMessage("1+2?"),
        AIMessage("", tool_calls=[{**call("add", a=1, b=2), "id": "c1"}]),  # type: ignore[list-item]
        ToolMessage("3", tool_call_id="c1"),
    ]
    assert chat.bind_tools(TOOLS).invoke(history).content == "It is 3."


def test_a_template_without_tools_is_a_clear_error_or_the_fallback() -> None:
    from amulet import Amulet
    from amulet_integrations.langchain import ChatAmulet

    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"Add two numbers": ADD, "": "blind"})
    amulet = Amulet(model, tokenizer)
    with pytest.raises(TemplateError, match="ignores tools"):
        ChatAmulet(amulet=amulet).bind_tools(TOOLS).invoke("x")
    fallback = ChatAmulet(amulet=amulet, tools_prompt="fallback")
    assert calls(fallback.bind_tools(TOOLS).invoke("x")) == [call("add", a=1, b=2)]


def test_reasoning_is_a_block_of_its_own_never_in_the_text() -> None:
    chat = scripted_chat("<think>\nHm.\n</think>\n\nYes.")
    reply = chat.invoke("x")
    assert reply.content == "Yes."
    assert reply.additional_kwargs["reasoning_content"].strip() == "Hm."
    kinds = [block["type"] for block in reply.content_blocks]
    assert kinds == ["reasoning", "text"]
    chunks = list(chat.stream("x"))
    assert "".join(str(chunk.content) for chunk in chunks) == "Yes."
    assert joined(chunks).additional_kwargs == reply.additional_kwargs
    blocks: Any = scripted_chat("<think>\nHm.\n</think>\n\nYes.", output_version="v1").invoke("x")
    assert [block["type"] for block in blocks.content] == ["reasoning", "text"]


def test_template_options_by_constructor_and_call() -> None:
    thinking = {"<think>\n\n</think>": "quick", "": "slow"}
    chat = scripted_chat(thinking)
    assert chat.invoke("x").content == "slow"
    assert chat.invoke("x", enable_thinking=False).content == "quick"
    assert chat.invoke("x", template_options={"enable_thinking": False}).content == "quick"
    assert chat.bind(enable_thinking=False).bind_tools(TOOLS).invoke("x").content == "quick"
    off = scripted_chat(thinking, template_options={"enable_thinking": False})
    assert off.invoke("x").content == "quick"
    assert off.invoke("x", enable_thinking=True).content == "slow"
