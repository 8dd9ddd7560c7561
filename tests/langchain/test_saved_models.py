"""A LangChain chat over today's checkpoints: tiny ones, saved to a folder and loaded from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from transformers import PreTrainedTokenizerFast

from amulet_integrations.langchain import ChatAmulet
from tests.core.test_multimodal import PLAIN, save


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
