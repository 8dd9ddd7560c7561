"""A LangChain chat over today's checkpoints: tiny ones, saved to a folder and loaded from it."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from transformers import PreTrainedTokenizerFast

from amulet_integrations.langchain import ChatAmulet
from tests.models.test_multimodal import PLAIN, save
from tests.output.test_families import tokenizer_of


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_a_chat_over_a_saved_checkpoint(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save(kind, tmp_path, tokenizer)
    chat = ChatAmulet(model=str(folder), device="cpu", dtype="float32", preference="Be brief.")
    steered = chat.bind(**{n: v for n, v in PLAIN.items() if n != "max_new_tokens"}, max_tokens=14)
    first = steered.invoke("Which tea?")
    assert first.content
    turns = [HumanMessage("Which tea?"), AIMessage(first.content), HumanMessage("Why?")]
    second = steered.invoke(turns)
    assert "".join(str(piece.content) for piece in steered.stream(turns)) == second.content
    assert [answer.content for answer in steered.batch(["Which tea?", turns])] == [
        first.content,
        second.content,
    ]
    assert steered.invoke("Which tea?", preference="").content != first.content


def weather(city: Literal["Rome", "Oslo"]) -> str:
    """Look up the weather of a city."""
    return f"It rains in {city}."


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_tools_by_the_family_s_own_template(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path, tokenizer_of(kind))
    chat = ChatAmulet(
        model=str(folder),
        device="cpu",
        dtype="float32",
        preference="Be brief.",
        max_tokens=100,
    ).bind(enable_thinking=False)
    forced = chat.bind_tools([weather], tool_choice="weather")
    asked = forced.invoke("Rain?")
    (call,) = asked.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")
    chunks = [chunk for chunk in forced.stream("Rain?") if isinstance(chunk, AIMessageChunk)]
    (streamed,) = reduce(add, chunks).tool_calls
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    answer = chat.bind_tools([weather]).invoke([HumanMessage("Rain?"), asked, result])
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
