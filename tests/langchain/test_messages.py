"""LangChain messages as the chat dicts of Transformers' templates."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from amulet import RequestError
from amulet_integrations.langchain.messages import stated_settings, to_chat

CALL = {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"}
CHAT_CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "add", "arguments": {"a": 1}},
}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("s"), {"role": "system", "content": "s"}),
        (HumanMessage("h", name="ann"), {"role": "user", "content": "h"}),
        (AIMessage("a"), {"role": "assistant", "content": "a"}),
        (ChatMessage(role="human", content="h"), {"role": "user", "content": "h"}),
        (ChatMessage(role="developer", content="d"), {"role": "developer", "content": "d"}),
        (
            FunctionMessage(name="add", content="3"),
            {"role": "tool", "content": "3", "name": "add"},
        ),
        (
            HumanMessage(["one ", {"type": "text", "text": "two"}]),
            {"role": "user", "content": "one two"},
        ),
        (
            HumanMessage([{"type": "tool_result", "content": [{"type": "text", "text": "3"}]}]),
            {"role": "user", "content": "3"},
        ),
        (
            AIMessage("", tool_calls=[CALL]),
            {"role": "assistant", "content": "", "tool_calls": [CHAT_CALL]},
        ),
        (
            AIMessage(
                [{"type": "text", "text": "t"}, {"type": "tool_use", "id": "c1"}],
                tool_calls=[CALL],
            ),
            {"role": "assistant", "content": "t", "tool_calls": [CHAT_CALL]},
        ),
        (
            AIMessage("a", additional_kwargs={"reasoning_content": "why"}),
            {"role": "assistant", "content": "a", "reasoning_content": "why"},
        ),
        (
            AIMessage([{"type": "reasoning", "reasoning": "why"}, {"type": "text", "text": "a"}]),
            {"role": "assistant", "content": "a", "reasoning_content": "why"},
        ),
        (
            AIMessage([{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "a"}]),
            {"role": "assistant", "content": "a", "reasoning_content": "why"},
        ),
        (
            AIMessage(
                "",
                invalid_tool_calls=[
                    {
                        "name": "add",
                        "args": '{"a": ',
                        "id": "c1",
                        "error": "cut",
                        "type": "invalid_tool_call",
                    }
                ],
            ),
            {"role": "assistant", "content": '{"a": '},
        ),
    ],
)
def test_a_message_becomes_a_dict(message: BaseMessage, expected: dict[str, Any]) -> None:
    assert to_chat([message]) == [expected]


def test_a_tools_result_gets_the_name_of_its_call() -> None:
    history = [AIMessage("", tool_calls=[CALL]), ToolMessage("3", tool_call_id="c1")]
    assert to_chat(history)[1] == {
        "role": "tool",
        "content": "3",
        "name": "add",
        "tool_call_id": "c1",
    }


@pytest.mark.parametrize("kind", ["audio", "file", "video"])
def test_what_no_model_reads_is_refused(kind: str) -> None:
    with pytest.raises(RequestError, match=f"a human message has a content block of type '{kind}'"):
        to_chat([HumanMessage([{"type": kind}])])


@pytest.mark.parametrize("kind", [SystemMessage, AIMessage, partial(ToolMessage, tool_call_id="1")])
def test_images_are_read_in_human_messages(kind: Any) -> None:
    image = {"type": "image", "base64": "AA=="}
    chat = to_chat([HumanMessage(["This ", image, {"type": "text", "text": "?"}])])
    assert chat == [{"role": "user", "content": ["This ", image, "?"]}]
    with pytest.raises(RequestError, match="type 'image': models here read text, and images in hu"):
        to_chat([kind(content=[image])])


@pytest.mark.parametrize(
    ("block", "finding"),
    [
        ({"type": "text", "text": None}, "of type 'text' whose text is a NoneType: expected a str"),
        ({"type": "text", "text": ["a", "b"]}, "of type 'text' whose text is a list"),
        ({"type": "text", "text": {"a": 1}}, "of type 'text' whose text is a dict"),
        ({"type": "text-plain", "base64": "YQ=="}, "of type 'text-plain' whose text is a NoneType"),
        ({"type": "json", "json": {1, 2}}, "json block that is not"),
        ({"type": "tool_result", "content": 5}, "of type 'int'"),
        ({"type": "tool_result", "content": [{"type": "text", "text": None}]}, "is a NoneType"),
    ],
)
@pytest.mark.parametrize("kind", [HumanMessage, SystemMessage, AIMessage])
def test_what_is_no_text_is_refused(
    kind: type[BaseMessage], block: dict[str, Any], finding: str
) -> None:
    with pytest.raises(RequestError, match=finding):
        to_chat([kind([block])])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text"},
        {"type": "tool_result", "content": None},
        {"type": "reasoning", "reasoning": None},
        {"type": "reasoning", "summary": []},
    ],
)
def test_what_says_nothing_writes_nothing(block: dict[str, Any]) -> None:
    assert to_chat([AIMessage([block, "a"])]) == [{"role": "assistant", "content": "a"}]


def test_a_refusal_is_text() -> None:
    message = AIMessage([{"type": "refusal", "refusal": "No."}])
    assert to_chat([message]) == [{"role": "assistant", "content": "No."}]


def test_an_unknown_kind_of_message_is_refused() -> None:
    with pytest.raises(RequestError, match="a message of type RemoveMessage"):
        to_chat([RemoveMessage(id="1")])


def test_the_latest_message_that_states_a_setting_counts_and_answers_do_not() -> None:
    history = [
        SystemMessage("s", additional_kwargs={"preference": "A", "strength": 1.0}),
        HumanMessage("h", additional_kwargs={"preference": "B"}),
        AIMessage("a", additional_kwargs={"preference": "C"}),
    ]
    assert stated_settings(history) == {"preference": "B", "strength": 1.0}
