"""Who asks, and for whom: which of LlamaIndex's model calls are read by the user.

LlamaIndex hands every component the same LLM, and most of their calls say nothing about their
purpose: a condensed question and a chat answer are both a list of messages. What tells them apart
is the prompt's type (`PROMPT_TYPES`) and the component that calls (`COMPONENTS`, `INTERNAL`),
which stands on the call stack. A streaming answer, a refine pass or a node of a summary tree is
told by the local variables of LlamaIndex's own loop; where they can't be read, it is steered.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Literal, TypeAlias

from llama_index.core.prompts import BasePromptTemplate, PromptType

Stage: TypeAlias = Literal["answer", "internal", "react"]
"""Read by the user; read by the program; thoughts and actions first, then an answer."""

Use: TypeAlias = Literal["answer", "synthesis", "internal"]

# "answer": steered. "synthesis": steered where a response synthesizer or code outside LlamaIndex
# asks, plain where another component does. "internal": plain.
PROMPT_TYPES: dict[PromptType, Use] = {
    PromptType.SUMMARY: "synthesis",  # tree_summarize, but also index building and HyDE
    PromptType.TREE_INSERT: "internal",
    PromptType.TREE_SELECT: "internal",
    PromptType.TREE_SELECT_MULTIPLE: "internal",
    PromptType.QUESTION_ANSWER: "answer",
    PromptType.REFINE: "answer",
    PromptType.KEYWORD_EXTRACT: "internal",
    PromptType.QUERY_KEYWORD_EXTRACT: "internal",
    PromptType.SCHEMA_EXTRACT: "internal",
    PromptType.TEXT_TO_SQL: "internal",
    PromptType.TEXT_TO_GRAPH_QUERY: "internal",
    PromptType.TABLE_CONTEXT: "internal",
    PromptType.KNOWLEDGE_TRIPLET_EXTRACT: "internal",
    PromptType.SIMPLE_INPUT: "answer",
    PromptType.PANDAS: "internal",
    PromptType.JSON_PATH: "internal",
    PromptType.SINGLE_SELECT: "internal",
    PromptType.MULTI_SELECT: "internal",
    PromptType.VECTOR_STORE_QUERY: "internal",
    PromptType.SUB_QUESTION: "internal",
    PromptType.SQL_RESPONSE_SYNTHESIS: "answer",
    PromptType.SQL_RESPONSE_SYNTHESIS_V2: "answer",
    PromptType.CONVERSATION: "answer",
    PromptType.DECOMPOSE: "internal",
    PromptType.CHOICE_SELECT: "internal",
    PromptType.CUSTOM: "synthesis",  # the default: users' prompts, but also LlamaIndex's own
    PromptType.RANKGPT_RERANK: "internal",
}

SYNTHESIZERS = "llama_index.core.response_synthesizers"
RESPONSES = "llama_index.core.response"  # the synthesizers, and who reads their streams
CHAT_ENGINES = "llama_index.core.chat_engine"
AGENTS = "llama_index.core.agent"
REACT = "llama_index.core.agent.workflow.react_agent"

# Whatever runs inside these is read by a program, even an answer of a query engine of theirs.
# None: not so after all. The longest matching name counts.
INTERNAL: dict[str, frozenset[str] | None] = {
    name: frozenset(functions)
    for name, functions in {
        "llama_index.core.evaluation": (),
        "llama_index.core.extractors": (),
        "llama_index.core.indices": (),
        "llama_index.core.ingestion": (),
        "llama_index.core.memory": (),
        "llama_index.core.postprocessor": (),
        "llama_index.core.question_gen": (),
        "llama_index.core.retrievers": (),
        "llama_index.core.selectors": (),
        "llama_index.core.tools": (),
        "llama_index.core.query_engine.multistep_query_engine": ("_query_multistep",),
        "llama_index.core.query_engine.sub_question_query_engine": (
            "_query_subq",
            "_aquery_subq",
        ),
    }.items()
} | {
    "llama_index.core.evaluation.batch_runner": None,  # it asks for the answers users would get
    "llama_index.core.indices.struct_store": None,  # query engines over tables and JSON
}

# Between the caller and the model: LlamaIndex's wrappers and ourselves.
TRANSPARENT = (
    "amulet_integrations.llama_index",
    "llama_index.core.async_utils",
    "llama_index.core.callbacks",
    "llama_index.core.instrumentation",
    "llama_index.core.llms",
    "llama_index_instrumentation",
)
# Below an event loop's frames stands who started the loop, who need not be who asks.
LOOPS = ("asyncio.", "uvloop")

_decided: ContextVar[Stage | None] = ContextVar("amulet_stage", default=None)


def stage_of_prompt(prompt: BasePromptTemplate) -> Stage:
    """Return for whom `predict(prompt)` is; to be called in the caller's own stack.

    `prompt.metadata["steer"]`, True or False, is the user's own word and wins.
    """
    wish = prompt.metadata.get("steer")
    if isinstance(wish, bool):
        return "answer" if wish else "internal"
    frames = list(_frames())
    use = _use(prompt)
    if use == "internal" or _inside_internal(frames):
        return "internal"
    component = _component(frames)
    if component.startswith(CHAT_ENGINES):
        return "internal"  # condensing a question; what they answer goes another way
    if component.startswith(SYNTHESIZERS):
        return "answer" if _last_pass(frames) else "internal"
    return "answer" if use == "answer" or not component else "internal"


def stage_of_call(kind: Literal["chat", "complete"]) -> Stage:
    """Return for whom a `chat` or `complete` is; to be called in the caller's own stack."""
    if (decided := _decided.get()) is not None:
        return decided
    frames = list(_frames())
    component = _component(frames)
    if _inside_internal(frames):
        return "internal"
    if not component:
        return "answer"
    if component.startswith(REACT):
        return "react"
    if component.startswith((CHAT_ENGINES, AGENTS)) and kind == "chat":
        return "answer"
    return "internal"


@contextmanager
def decided(stage: Stage) -> Iterator[None]:
    """Let the `chat` or `complete` inside be for whom the prompt said."""
    token = _decided.set(stage)
    try:
        yield
    finally:
        _decided.reset(token)


def asked_by(name: str) -> bool:
    """Tell whether the component that asks is in a module."""
    return _component(list(_frames())).startswith(name)


def _frames() -> Iterator[FrameType]:
    """The frames from the caller of the model outwards, up to the event loop that runs them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(LOOPS):
            return
        if not module.startswith(TRANSPARENT):
            yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _component(frames: list[FrameType]) -> str:
    """Return the module that asks if it is LlamaIndex's; "" for anybody else's code."""
    nearest = _module(frames[0]) if frames else ""
    return nearest if nearest.startswith("llama_index.") else ""


def _inside_internal(frames: list[FrameType]) -> bool:
    for frame in frames:
        module = _module(frame)
        parts = module.split(".")
        names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        name = next((name for name in names if name in INTERNAL), None)
        functions = INTERNAL[name] if name is not None else None
        if functions is not None and (not functions or frame.f_code.co_name in functions):
            return True
    return False


def _use(prompt: BasePromptTemplate) -> Use:
    try:
        return PROMPT_TYPES[PromptType(prompt.metadata.get("prompt_type", PromptType.CUSTOM))]
    except (ValueError, KeyError):  # a type of the user's own
        return PROMPT_TYPES[PromptType.CUSTOM]


def _last_pass(frames: list[FrameType]) -> bool:
    """Tell whether a synthesizer's call writes what the user reads.

    Refine asks once per chunk and only the last answer is shown; a summary tree's root is the
    call that has one chunk left.
    """
    for frame in frames:
        if not _module(frame).startswith(RESPONSES):
            break
        name = frame.f_code.co_name
        if name in ("_run_refine_loop", "_arun_refine_loop"):
            return not frame.f_locals.get("chunks_deque")
        if _module(frame).endswith("tree_summarize") and "get_response" in name:
            chunks = frame.f_locals.get("text_chunks", frame.f_locals.get("message_chunks"))
            return chunks is None or len(chunks) <= 1
    return True
