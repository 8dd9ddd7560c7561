"""Stack frames are read where LlamaIndex opens no span: is that still so?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core.evaluation import CorrectnessEvaluator
from llama_index.core.indices import TreeIndex
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.memory import ChatSummaryMemoryBuffer
from llama_index.core.schema import Document

from amulet_integrations.llama_index import askers, preference
from tests.llama_index.doubles import scripted


def evaluate(llm: Any) -> None:
    judge = CorrectnessEvaluator(llm=llm, parser_function=lambda text: (5.0, text))
    judge.evaluate(query="q", response="r", reference="r")


def summarize(llm: Any) -> None:
    memory = ChatSummaryMemoryBuffer.from_defaults(
        [askers.ChatMessage("moss " * 9)] * 6, llm=llm, token_limit=20, tokenizer_fn=str.split
    )
    memory.get()


def build_an_index(llm: Any) -> None:
    TreeIndex.from_documents(
        [Document(text=f"Note {n}.") for n in range(3)], llm=llm, num_children=2
    )


@pytest.mark.parametrize("asks", [evaluate, summarize, build_an_index])
def test_llama_index_opens_no_span_here(
    asks: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where this fails LlamaIndex opens one: then no stack frame needs to be read any longer."""
    spans: list[Any] = []
    frames: list[Any] = []
    find = askers.askers

    def found() -> list[askers.Asker]:
        spans.extend(span.asker.role for span in askers._open_spans(active_span_id.get()))
        frames.extend(asker.role for asker in askers._running())
        return find()

    monkeypatch.setattr("amulet_integrations.llama_index.stage.askers", found)
    llm = scripted(preference="Rhyme.")
    with preference():  # registers the span handler
        asks(llm)
    assert set(spans) == {"llm"}
    assert "plain" in frames
    assert not any(llm.amulet.steered)
