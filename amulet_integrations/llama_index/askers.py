"""Finds who calls the model: by LlamaIndex's open spans, or by stack frames where it opens none.

LlamaIndex hands every component the same LLM. Its instrumentation tells a span handler which
components are at work, in tasks and threads as well, whatever subclass or wrapper of the LLM they
call. Evaluators, memories, index construction and streams of programs open no span. They, and spans
that began while the handler was not registered, are found as the `self` of the functions that are
running.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any, Literal, TypeAlias

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.instrumentation.span import BaseSpan, active_span_id
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index_instrumentation import get_dispatcher
from pydantic import Field

from amulet_integrations.llama_index.scope import Scopes, entered, scopes

Role: TypeAlias = Literal[
    "llm",  # between the asker and us, or ourselves
    "plain",  # whatever runs inside is read by a program
    "program",  # the same, and it reads tool calls alone
    "parts",  # a query engine that asks others for parts of its answer
    "query",  # a query engine
    "synthesizer",
    "chat",  # its own completions and prompts condense a question; what it chats is the answer
    "answers",  # what it asks is read by the user
    "agent",
]

# By module or class; the longest name counts, and of a class's bases the nearest. None: no role.
ROLES: dict[str, Role | None] = {
    "llama_index.core.agent": "agent",
    "llama_index.core.base.base_query_engine": "query",
    "llama_index.core.base.base_retriever": "plain",
    "llama_index.core.base.base_selector": "plain",
    "llama_index.core.base.llms.base.BaseLLM": "llm",
    "llama_index.core.chat_engine": "chat",
    "llama_index.core.chat_engine.types": None,
    "llama_index.core.chat_engine.types.BaseChatEngine": "answers",  # a user's own engine
    "llama_index.core.evaluation": "plain",
    "llama_index.core.evaluation.batch_runner": None,  # asks for the answers users would get
    "llama_index.core.extractors": "plain",
    "llama_index.core.image_retriever": "plain",
    "llama_index.core.indices": "plain",
    "llama_index.core.indices.struct_store": "query",  # query engines over tables and JSON
    "llama_index.core.indices.struct_store.sql_retriever": "plain",
    "llama_index.core.ingestion": "plain",
    "llama_index.core.llama_dataset": "plain",
    "llama_index.core.memory": "plain",
    "llama_index.core.postprocessor": "plain",
    "llama_index.core.program": "program",
    "llama_index.core.query_engine": "query",
    "llama_index.core.query_engine.flare": "plain",  # its answers carry searches to parse
    "llama_index.core.query_engine.multistep_query_engine": "parts",
    "llama_index.core.query_engine.sql_join_query_engine.SQLAugmentQueryTransform": "plain",
    "llama_index.core.query_engine.sub_question_query_engine": "parts",
    "llama_index.core.question_gen": "plain",
    "llama_index.core.response_synthesizers": "synthesizer",
    "llama_index.core.retrievers": "plain",
    "llama_index.core.schema.TransformComponent": "plain",
    "llama_index.core.selectors": "plain",
    "llama_index.core.tools": "plain",
    "llama_index.core.types.BaseOutputParser": "plain",
    "llama_index.core.types.BasePydanticProgram": "plain",
}

# Below an event loop's frames stands who started the loop, who need not be who asks.
LOOPS = ("asyncio.", "uvloop")
# The arguments that say more than who asks.
ARGUMENTS = ("prompt", "prompt_args", "kwds", "text_chunks", "message_chunks", "ev")


@dataclass(frozen=True)
class Asker:
    """A function of LlamaIndex that is running.

    Attributes:
        role: what its component's calls are for.
        instance: the component; None where it is a function.
        arguments: those of `ARGUMENTS` that it has.
        seen: the chunks that were asked about since its span began; None where it has no span.
    """

    role: Role | None
    instance: Any
    arguments: Mapping[str, Any]
    seen: list[str] | None = None

    @property
    def chunks(self) -> list[str]:
        """The texts that a response synthesizer was given; [] for anything else."""
        given = self.arguments.get("text_chunks") or self.arguments.get("message_chunks") or ()
        return [as_text(chunk) for chunk in given] if self.role == "synthesizer" else []

    @property
    def piece(self) -> str | None:
        """The text that a synthesizer's call is about; None for any other call."""
        given = {**self.arguments.get("kwds", {}), **self.arguments.get("prompt_args", {})}
        for name in ("context_str", "context_msg"):
            if isinstance(given.get(name), str):
                return str(given[name])
        messages = given.get("context_messages")
        return "\n\n".join(map(as_text, messages)) if isinstance(messages, list) else None


def askers() -> list[Asker]:
    """Return what is running, from the model's caller outwards; some of it twice."""
    found = list(_running())
    for span in _open_spans(active_span_id.get()):
        found += [span.asker, *span.within]
    return found


def reads_plain() -> bool | None:
    """Tell whether a program reads the streamed answer that is being read; None outside of one."""
    return _reads_plain.get()


def is_plain(found: list[Asker]) -> bool:
    """Tell whether what these ask for is read by a program, whatever they ask."""
    if any(asker.role in ("plain", "program") for asker in found):
        return True
    engines: list[Asker] = []  # from the inside outwards, each once
    for asker in found:
        if asker.role in ("query", "parts") and all(
            e.instance is not asker.instance for e in engines
        ):
            engines.append(asker)
    return any(engine.role == "parts" for engine in engines[1:])


def watch() -> None:
    """Register the span handler, once; again where somebody replaced the dispatcher's handlers."""
    dispatcher = get_dispatcher()
    if not any(handler is _HANDLER for handler in dispatcher.span_handlers):
        _HANDLER.open_spans.clear()  # of these nobody told it the end
        dispatcher.add_span_handler(_HANDLER)


def as_text(chunk: Any) -> str:
    """Return a chunk, a text or a message, as text."""
    return (chunk.content or "") if isinstance(chunk, ChatMessage) else str(chunk)


# ---- spans ----


class _Span(BaseSpan):
    asker: Any = None
    within: Any = Field(default=())  # what was running outside of it and opens no span


class _Handler(BaseSpanHandler[_Span]):
    """Keeps the open spans, and binds a synthesizer's stream to the query that it answers."""

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> _Span:
        role = _role_of(instance)
        asker = Asker(role, instance, _telling(bound_args.arguments), [])
        parent = self.open_spans.get(parent_span_id or "")
        piece = asker.piece
        if piece is not None and role in ("llm", "synthesizer"):
            _asked_about(piece, parent)
        within = tuple(_running()) if role == "llm" or parent is None else ()
        return _Span(id_=id_, parent_id=parent_span_id, asker=asker, within=within)

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        result: Any = None,
        **kwargs: Any,
    ) -> _Span | None:
        if isinstance(instance, BaseSynthesizer):
            _bind(result)
        return self.open_spans.get(id_)

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> _Span | None:
        return self.open_spans.get(id_)


_HANDLER = _Handler()


def _open_spans(id_: str | None) -> Iterator[_Span]:
    while span := _HANDLER.open_spans.get(id_ or ""):
        yield span
        id_ = span.parent_id


def _asked_about(piece: str, span: _Span | None) -> None:
    """Note a chunk at the synthesizer that asks about it."""
    for outer in _open_spans(span.id_ if span else None):
        if outer.asker.chunks:
            outer.asker.seen.append(piece)
            return
        # A program and its LLM both have a span about one chunk.
        if outer.asker.role not in ("llm", "synthesizer") or outer.asker.piece == piece:
            return


def _telling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ARGUMENTS if name in arguments}


# ---- frames: what opens no span ----


def _running() -> Iterator[Asker]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(LOOPS):
            return
        code = frame.f_code
        if "self" in code.co_varnames or "self" in code.co_freevars:
            values = frame.f_locals
            instance = values.get("self")
            if role := _role_of(instance):
                yield Asker(role, instance, _telling(values))
        elif (role := _role_of_name(module)) in ("plain", "program"):
            yield Asker(role, None, {})
        frame = frame.f_back


def _role_of(component: Any) -> Role | None:
    kind: Any = type(component)
    return _role_of_class(kind)


@lru_cache(maxsize=1024)
def _role_of_class(kind: type[Any]) -> Role | None:
    return _role_of_name(*(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__))


@lru_cache(maxsize=1024)
def _role_of_name(*names: str) -> Role | None:
    for name in names:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if (prefix := ".".join(parts[:length])) in ROLES:
                return ROLES[prefix]
    return None


# ---- streamed answers: the default synthesizer asks while its stream is read ----

_END = object()
_reads_plain: ContextVar[bool | None] = ContextVar("amulet_reads_plain", default=None)


def _bind(response: Any) -> None:
    """Let a streamed response be read anywhere as if it were read where it was asked for."""
    stream = getattr(response, "response_gen", None)
    if isinstance(response, StreamingResponse) and isinstance(stream, Generator):
        response.response_gen = _bound(stream, scopes(), is_plain(askers()))
    elif isinstance(response, AsyncStreamingResponse) and isinstance(stream, AsyncGenerator):
        response.response_gen = _abound(stream, scopes(), is_plain(askers()))


@contextmanager
def _reading(given: Scopes, plain: bool) -> Iterator[None]:
    token = _reads_plain.set(plain)
    try:
        with entered(given):
            yield
    finally:
        _reads_plain.reset(token)


def _bound(
    stream: Generator[Any, None, None], given: Scopes, plain: bool
) -> Generator[Any, None, None]:
    with closing(stream):
        while True:
            with _reading(given, plain):
                piece = next(stream, _END)
            if piece is _END:
                return
            yield piece


async def _abound(
    stream: AsyncGenerator[Any, None], given: Scopes, plain: bool
) -> AsyncGenerator[Any, None]:
    async with aclosing(stream):
        while True:
            with _reading(given, plain):
                piece = await anext(stream, _END)
            if piece is _END:
                return
            yield piece
