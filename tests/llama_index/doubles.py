"""A model that answers what a test lists, and an `Amulet` that records what reaches it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from amulet.request import Request
from amulet_integrations.llama_index import AmuletLLM
from tests.models import ScriptedModel, byte_tokenizer
from tests.templates import family_tokenizer

WISH = "Be brief."
PLAIN, STEERED = "A long and winding answer.", "Short."


class RecordingAmulet(Amulet):
    """Keeps every request that is started, in order."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requests: list[Request] = []

    def start(self, request: Request) -> Any:
        self.requests.append(request)
        return super().start(request)

    def astart(self, request: Request) -> Any:
        self.requests.append(request)
        return super().astart(request)

    @property
    def steered(self) -> list[bool]:
        """Per request, whether a preference reached the engine."""
        return [bool(request.preference) for request in self.requests]

    @property
    def last(self) -> Request:
        return self.requests[-1]


def scripted(
    answers: str | Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    window: int = 65536,
    **options: Any,
) -> AmuletLLM:
    """An `AmuletLLM` that says `STEERED` with `WISH` in the prompt and `PLAIN` without."""
    tokenizer = tokenizer or byte_tokenizer()
    model = ScriptedModel(tokenizer, answers or {WISH: STEERED, "": PLAIN})
    model.config.max_position_embeddings = window
    return AmuletLLM(amulet=RecordingAmulet(model, tokenizer), model="scripted", **options)


def calling(answers: str | Mapping[str, str], **options: Any) -> AmuletLLM:
    """`scripted` with a template that knows tools (Qwen's dialect)."""
    return scripted(answers, tokenizer=family_tokenizer("qwen"), **options)


WORDS = ("moss", "tide", "lamp", "bread", "clock", "fox", "bridge", "violin")


class WordEmbedding(BaseEmbedding):
    """Counts of a few words: enough to retrieve the right one of a handful of texts."""

    def _get_text_embedding(self, text: str) -> list[float]:
        found = re.findall(r"[a-z]+", text.lower())
        return [found.count(word) + 0.01 for word in WORDS]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


TEXTS = [
    "Moss grows on the north wall of the mill.",
    "The tide reaches the harbour steps at noon.",
    "The lamp in the tower burns oil.",
]


def index(texts: list[str] | None = None) -> VectorStoreIndex:
    nodes = [TextNode(text=text, id_=f"n{i}") for i, text in enumerate(texts or TEXTS)]
    return VectorStoreIndex(nodes, embed_model=WordEmbedding())
