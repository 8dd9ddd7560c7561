"""Tokens of any part of a chat can be counted, so histories can be trimmed by the model itself."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)

from amulet import Amulet
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.langchain.scripted import scripted_chat
from tests.models import ScriptedModel
from tests.templates import FAMILIES, family_tokenizer


def lookup(city: str) -> str:
    """Look a city up."""
    return city


CALL: Any = {"name": "lookup", "args": {"city": "Rome"}, "id": "call_1", "type": "tool_call"}
HISTORY: list[Any] = [
    SystemMessage("You help."),
    HumanMessage("How warm is Rome?"),
    AIMessage("", tool_calls=[CALL]),
    ToolMessage("31 degrees", tool_call_id="call_1"),
    AIMessage("31 degrees."),
    HumanMessage("And now?"),
]


def model(family: str) -> ChatAmulet:
    tokenizer = family_tokenizer(family)
    scripted: Any = ScriptedModel(tokenizer, "Hi")
    return ChatAmulet(amulet=Amulet(scripted, tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_a_history_is_counted(family: str) -> None:
    chat = model(family)
    for size in range(len(HISTORY) + 1):
        for part in combinations(HISTORY, size):
            count = chat.get_num_tokens_from_messages(list(part))
            assert (count > 0) == bool(part), part
            said = sum(chat.get_num_tokens(str(message.content)) for message in part)
            assert count >= said, part
            assert chat.get_num_tokens_from_messages(list(part), [lookup]) >= count, part


def test_a_whole_history_is_counted_as_its_template_writes_it() -> None:
    chat = scripted_chat("Hi")
    for messages in (HISTORY, HISTORY[:2], HISTORY[-1:]):
        usage: Any = chat.invoke(messages).usage_metadata
        assert chat.get_num_tokens_from_messages(messages) == usage["input_tokens"]
        usage = chat.bind_tools([lookup]).invoke(messages).usage_metadata
        assert chat.get_num_tokens_from_messages(messages, [lookup]) == usage["input_tokens"]


@pytest.mark.parametrize("strategy", ["first", "last"])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("limit", [0, 5, 20, 60, 120, 10_000])
def test_trimming_by_the_model(strategy: Any, partial: bool, limit: int) -> None:
    chat = scripted_chat("Hi")
    kept = trim_messages(
        HISTORY,
        max_tokens=limit,
        token_counter=chat,
        strategy=strategy,
        allow_partial=partial,
        include_system=strategy == "last",
    )
    if strategy == "last" and limit < 30:  # LangChain keeps the system message in any case
        assert kept == HISTORY[:1]
    else:
        assert chat.get_num_tokens_from_messages(kept) <= limit
    if limit == 10_000:
        assert kept == HISTORY


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
        HumanMessage([{"type": "text", "text": "What is it?"}, {"type": "image", "base64": "AA"}]),
        HumanMessage(""),
        AIMessage(""),
        AIMessageChunk("x", tool_call_chunks=[]),
        AIMessage("", invalid_tool_calls=[{**CALL, "args": "{", "error": "cut"}]),  # type: ignore[list-item]
        ToolMessage([{"type": "image", "base64": "AA"}], tool_call_id="unknown"),
        ChatMessage("Hi", role="moderator"),
        RemoveMessage(id="1"),
        ("human", "Hi"),
        "Hi",
    ],
)
def test_messages_that_could_not_be_answered_are_counted(message: Any) -> None:
    chat = scripted_chat("Hi")
    assert chat.get_num_tokens_from_messages([message]) > 0
    alone = chat.get_num_tokens_from_messages(HISTORY)
    assert chat.get_num_tokens_from_messages([*HISTORY, message]) >= alone
    assert chat.get_num_tokens_from_messages([message, *HISTORY]) >= alone


def test_tools_that_the_template_does_not_know_are_counted() -> None:
    chat = model("chatml" if "chatml" in FAMILIES else "qwen")
    without = chat.get_num_tokens_from_messages(HISTORY)
    assert chat.get_num_tokens_from_messages(HISTORY, [lookup]) >= without


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_a_function_of_yours_counts_instead(kind: Any) -> None:
    amulet = scripted_chat("Hi").amulet
    model = kind(amulet=amulet, custom_get_token_ids=lambda text: [0] * len(text.split()))
    assert model.get_num_tokens("two words") == 2
    assert model.get_token_ids("two words") == [0, 0]
