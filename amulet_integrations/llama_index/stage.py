"""Tells who reads a model call's answer: which of LlamaIndex's calls the user reads.

Most calls don't state their purpose: condensing a question and answering a chat are both a list
of messages. The prompt's type (`PROMPT_TYPES`) and the caller
(`amulet_integrations.llama_index.askers`) distinguish them. If neither does, an answer is steered.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from llama_index.core.prompts import BasePromptTemplate, PromptType
from llama_index.core.prompts.default_prompts import DEFAULT_SUMMARY_PROMPT
from llama_index.core.response_synthesizers import Refine, TreeSummarize

from amulet_integrations.llama_index.askers import (
    Asker,
    askers,
    is_plain,
    reads_plain,
    watch,
)

Stage: TypeAlias = Literal["answer", "internal", "react", "code"]
"""Read by the user; read by the program; thoughts first, then an answer; prose first, then code."""

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


def stage_of_call(kind: Literal["chat", "complete"]) -> Stage:
    """Return the stage of the running `chat` or `complete`.

    `prompt.metadata["steer"]`, True or False, is set by the user and takes precedence.
    """
    watch()
    found = askers()
    call = _prompt_call(found)
    prompt = call.arguments["prompt"] if call is not None else None
    wish = prompt.metadata.get("steer") if prompt is not None else None
    if isinstance(wish, bool):
        return "answer" if wish else "internal"
    use = _use(call) if call is not None else "answer"
    plain = reads_plain()
    if use == "internal" or plain or (plain is None and is_plain(found)):
        return "internal"
    asker = next((asker for asker in found if asker.role not in (None, "llm")), None)
    if plain is not None:  # a synthesizer's last answer, while it is read
        return "answer"
    if asker is None:
        # Index building creates coroutines of this prompt and awaits them outside its spans.
        return "internal" if prompt is DEFAULT_SUMMARY_PROMPT else "answer"
    if asker.role == "agent":
        return _stage_of_agent(found)
    if asker.role == "chat":
        return "answer" if kind == "chat" and prompt is None else "internal"
    if asker.role == "synthesizer" and call is not None:
        return "answer" if _is_last(call, found) else "internal"
    return "answer"


def reads_calls_alone() -> bool:
    """Tell whether the caller is a program that has no use for prose with a tool call."""
    return next((asker.role for asker in askers() if asker.role not in (None, "llm")), None) == (
        "program"
    )


def _prompt_call(found: list[Asker]) -> Asker | None:
    """Return the LLM's `predict` or `stream` that the call belongs to, or None."""
    for asker in found:
        if isinstance(asker.arguments.get("prompt"), BasePromptTemplate):
            return asker if asker.role == "llm" else None
        if asker.role not in (None, "llm"):
            return None
    return None


def _use(call: Asker) -> Use:
    prompt = call.arguments["prompt"]
    if prompt.output_parser is not None or getattr(call.instance, "output_parser", None):
        return "internal"
    try:
        return PROMPT_TYPES[PromptType(prompt.metadata.get("prompt_type", PromptType.CUSTOM))]
    except (ValueError, KeyError):  # a user-defined type
        return PROMPT_TYPES[PromptType.CUSTOM]


def _stage_of_agent(found: list[Asker]) -> Stage:
    """Return the stage of an agent's call: its own turn, its last word, or an internal one."""
    from llama_index.core.agent.workflow import AgentOutput, AgentSetup, CodeActAgent, ReActAgent

    first = next(index for index, asker in enumerate(found) if asker.role == "agent")
    events = [
        (index, asker.arguments["ev"])
        for index, asker in enumerate(found)
        if asker.arguments.get("ev") is not None
    ]
    index, step = next(iter(events), (first, None))
    if index <= first and not isinstance(step, AgentSetup | None):
        return "internal"
    if isinstance(step, AgentOutput):  # `early_stopping_method="generate"`: an answer in prose
        return "answer"
    agents = getattr(found[first].instance, "agents", {})
    agent = agents.get(getattr(step, "current_agent_name", None), found[first].instance)
    if isinstance(agent, ReActAgent):
        return "react"
    return "code" if isinstance(agent, CodeActAgent) else "answer"


def _is_last(call: Asker, found: list[Asker]) -> bool:
    """Tell whether a synthesizer's call writes the answer that the user reads.

    Refine calls the model once per chunk, and only the last answer is shown; a summary tree's root
    is the call about all chunks. Both may have split the chunks.
    """
    given = [asker for asker in found if asker.chunks]
    synthesizer = next(
        (asker for asker in given if asker.seen is not None), next(iter(given), None)
    )
    if synthesizer is None or call.piece is None:
        return True
    chunks, piece = synthesizer.chunks, call.piece
    if isinstance(synthesizer.instance, TreeSummarize):
        return _covers([piece], chunks)
    if isinstance(synthesizer.instance, Refine):
        # Without a span there is no count, so compare with the last chunk.
        return _covers(synthesizer.seen or [*chunks[:-1], piece], chunks)
    return True


def _covers(pieces: list[str], chunks: list[str]) -> bool:
    """Tell whether pieces, which may overlap, cover all chunks."""
    whole = "\n\n".join(chunk.strip() for chunk in chunks)
    covered = bytearray(len(whole))
    for blank in re.finditer(r"\s+", whole):
        covered[blank.start() : blank.end()] = b"\1" * len(blank[0])
    for piece in map(str.strip, pieces):
        start = whole.find(piece)
        if start < 0:
            return True  # it was rewritten, so this can't be determined
        while start >= 0 and all(covered[start : start + len(piece)]):
            start = whole.find(piece, start + 1)  # a repetition of the same text
        if start >= 0:
            covered[start : start + len(piece)] = b"\1" * len(piece)
    return all(covered)
