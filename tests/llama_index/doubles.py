"""A model that answers what a test lists, and an `Amulet` that records what reaches it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms.function_calling import FunctionCallingLLM
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
    kind: type[Any] = AmuletLLM,
    **options: Any,
) -> Any:
    """An `AmuletLLM` that says `STEERED` with `WISH` in the prompt and `PLAIN` without."""
    tokenizer = tokenizer or byte_tokenizer()
    model = ScriptedModel(tokenizer, answers or {WISH: STEERED, "": PLAIN})
    model.config.max_position_embeddings = window
    return kind(amulet=RecordingAmulet(model, tokenizer), model="scripted", **options)


def calling(answers: str | Mapping[str, str], **options: Any) -> Any:
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


# ---- what users make of an LLM: a subclass that logs, one with timeouts, a tracer around it ----


LOG: list[str] = []


class Logging(AmuletLLM):
    """Passes every call on, from a module of its own."""

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        LOG.append(type(self).__name__)
        return super().chat(messages, **kwargs)

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        LOG.append(type(self).__name__)
        return super().stream_chat(messages, **kwargs)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        LOG.append(type(self).__name__)
        return super().complete(prompt, formatted, **kwargs)

    def predict(self, prompt: Any, **prompt_args: Any) -> str:
        LOG.append(type(self).__name__)
        return super().predict(prompt, **prompt_args)

    def stream(self, prompt: Any, **prompt_args: Any) -> Any:
        LOG.append(type(self).__name__)
        return super().stream(prompt, **prompt_args)

    async def apredict(self, prompt: Any, **prompt_args: Any) -> str:
        LOG.append(type(self).__name__)
        return await super().apredict(prompt, **prompt_args)


class Timed(AmuletLLM):
    """Awaits every call in a task of its own."""

    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        return await asyncio.create_task(super().achat(messages, **kwargs))

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        return await asyncio.create_task(super().astream_chat(messages, **kwargs))

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return await asyncio.create_task(super().acomplete(prompt, formatted, **kwargs))

    async def apredict(self, prompt: Any, **prompt_args: Any) -> str:
        return await asyncio.create_task(super().apredict(prompt, **prompt_args))


class Tracer(FunctionCallingLLM):
    """Holds the LLM and is none of ours."""

    inner: Any = None

    def __init__(self, **options: Any) -> None:
        super().__init__(inner=AmuletLLM(**options))

    @property
    def amulet(self) -> Any:
        return self.inner.amulet

    @property
    def metadata(self) -> Any:
        return self.inner.metadata

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        return self.inner.chat(messages, **kwargs)

    def stream_chat(self, messages: Any, **kwargs: Any) -> Any:
        return self.inner.stream_chat(messages, **kwargs)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return self.inner.complete(prompt, formatted, **kwargs)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return self.inner.stream_complete(prompt, formatted, **kwargs)

    async def achat(self, messages: Any, **kwargs: Any) -> Any:
        return await self.inner.achat(messages, **kwargs)

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        return await self.inner.astream_chat(messages, **kwargs)

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return await self.inner.acomplete(prompt, formatted, **kwargs)

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return await self.inner.astream_complete(prompt, formatted, **kwargs)

    def _prepare_chat_with_tools(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner._prepare_chat_with_tools(*args, **kwargs)

    def get_tool_calls_from_response(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.get_tool_calls_from_response(*args, **kwargs)


KINDS: list[type[Any]] = [AmuletLLM, Logging, Timed, Tracer]
