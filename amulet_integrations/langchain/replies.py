"""Converts replies to LangChain messages, chunks, usage and response metadata."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import (
    ChatGeneration,
    ChatGenerationChunk,
    Generation,
    GenerationChunk,
)

from amulet.preference import Steering
from amulet.reply import Event, Reply, TokenTrace, Usage
from amulet_integrations._preference import Chosen

CALL_BLOCKS = 1000  # more than the sections of any answer


def generation(reply: Reply, model_name: str, chosen: Chosen) -> ChatGeneration:
    """Return a finished answer, with reasoning, tool calls and text in their places."""
    message = AIMessage(
        content=reply.text,
        additional_kwargs={"reasoning_content": reply.reasoning} if reply.reasoning else {},
        tool_calls=[
            tool_call(name=call.name, args=call.arguments, id=call.id) for call in reply.tool_calls
        ],
        invalid_tool_calls=[
            invalid_tool_call(
                name=call.name, args=_unread(call.raw, call.error), id=call.id, error=call.error
            )
            for call in reply.invalid_tool_calls
        ],
        usage_metadata=usage_metadata(reply.usage),
    )
    info = metadata(reply, model_name, chosen)
    if reply.trace is not None:
        info["logprobs"] = logprobs(reply.trace)
    return ChatGeneration(message=message, generation_info=info)


def says_something(event: Event) -> bool:
    """Tell whether an event needs a chunk; an end-of-turn token, for example, has no text."""
    return bool(event.text or event.tokens or event.kind == "tool_call")


def chunk(event: Event, output_version: str | None = None) -> ChatGenerationChunk:
    """Return one piece of a streamed answer: text, reasoning, or a piece of a tool call."""
    if event.kind == "tool_call":
        args = event.text if event.error is None else _unread(event.text, event.error)
        # In "v1" LangChain counts the other blocks from 0, and merges blocks of one index.
        index = event.index + (CALL_BLOCKS if output_version == "v1" else 0)
        piece = tool_call_chunk(name=event.name, args=args, id=event.id, index=index)
        message = AIMessageChunk(content="", tool_call_chunks=[piece])
    elif event.kind == "reasoning":
        message = AIMessageChunk(content="", additional_kwargs={"reasoning_content": event.text})
    else:
        message = AIMessageChunk(content=event.text)
    info = {"logprobs": logprobs(event.tokens)} if event.tokens else None
    return ChatGenerationChunk(message=message, generation_info=info)


def _unread(raw: str, error: str) -> str:
    """Return the arguments of an invalid call in a form that can't be the start of JSON.

    LangChain parses the arguments of merged chunks, and completes truncated JSON to a call.
    """
    return f"({error}) {raw}"


def last_chunk(reply: Reply, model_name: str, chosen: Chosen) -> ChatGenerationChunk:
    """Return the piece that ends a streamed answer: no text, but usage and metadata."""
    message = AIMessageChunk(
        content="", usage_metadata=usage_metadata(reply.usage), chunk_position="last"
    )
    return ChatGenerationChunk(message=message, generation_info=metadata(reply, model_name, chosen))


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Return LangChain's token counts, with the cost of steering as "base_row"."""
    counts = UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
    if usage.base_prompt_tokens:
        counts["input_token_details"] = InputTokenDetails(
            base_row=usage.base_prompt_tokens,  # type: ignore[typeddict-unknown-key]
        )
    return counts


def metadata(reply: Reply, model_name: str, chosen: Chosen) -> dict[str, Any]:
    """Return the response metadata: model, finish reason, steering, source of the preference."""
    steering = reply.steering
    return {
        "model_name": model_name,
        "model_provider": "amulet",
        "finish_reason": reply.finish_reason,
        "preference_source": chosen.source,
        **(steering.model_dump() if steering else dict.fromkeys(Steering.model_fields)),
        "base_prompt_tokens": reply.usage.base_prompt_tokens,
    }


def logprobs(trace: Iterable[TokenTrace]) -> dict[str, Any]:
    """Return log-probabilities of the steered distribution in OpenAI's format."""
    return {
        "content": [
            {
                **_token(token.text, token.steered),
                "top_logprobs": [_token(text, logprob) for _, text, logprob in token.top],
            }
            for token in trace
        ]
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def text_generation(reply: Reply, model_name: str, chosen: Chosen) -> Generation:
    """Return one finished completion for `AmuletLLM`."""
    info = llm_metadata(reply, model_name, chosen)
    if reply.trace is not None:
        info["logprobs"] = logprobs(reply.trace)
    return Generation(text=reply.text, generation_info=info)


def text_chunk(event: Event) -> GenerationChunk:
    """Return one piece of a streamed completion; raw prompts have no thinking and no tools."""
    info = {"logprobs": logprobs(event.tokens)} if event.tokens else None
    return GenerationChunk(text=event.text, generation_info=info)


def llm_metadata(reply: Reply, model_name: str, chosen: Chosen) -> dict[str, Any]:
    """Return `metadata` with the token counts, for which a completion has no other place."""
    usage = usage_metadata(reply.usage)
    return {**metadata(reply, model_name, chosen), "usage_metadata": dict(usage)}
