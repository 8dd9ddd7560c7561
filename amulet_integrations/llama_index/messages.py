"""Converts LlamaIndex's messages to chat dicts and replies back, without dropping anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CitableBlock,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from typing_extensions import Unpack

from amulet.errors import RequestError
from amulet.preference import PreferenceLike, normal_preferences
from amulet.reply import Reply, TokenTrace, ToolCall, Usage
from amulet_integrations._preference import Push, meant_by, warn
from amulet_integrations.llama_index.scope import Settings, as_json, checked

MARK = "amulet_preference"
MARK_ROLE = MessageRole.DEVELOPER  # a ReAct agent throws a leading system message away

ROLES = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}

# How LlamaIndex writes a marked message into a prompt that quotes the conversation: the message's
# own line and its metadata, or only the metadata where the message says something of its own.
_WRITTEN = re.compile(
    rf"^([ \t]*){MARK_ROLE.value}: [^\n]*\n\{{'{MARK}': [^\n]*\}}\n?"
    rf"|\n\{{'{MARK}': [^\n]*\}}(?=\n|$)",
    re.MULTILINE,
)


def preference_message(preference: PreferenceLike = None, **push: Unpack[Push]) -> ChatMessage:
    """Return a message that tells `AmuletLLM` how the conversation wants its answers.

    Put it into any memory or chat store; the last one of a conversation applies. It never reaches
    the prompt as a message. Only its metadata is read, so no text from a user or a document can
    imitate it.

    Args:
        preference: text, `Preference`, a list of them; "" is off, None inherits.
        push: strength, floor, placement, focus, loop_guard; see `Steering`.

    Raises:
        RequestError: a preference or a range is not valid.
    """
    given = checked(preference, **push)
    text = " ".join(wish.text for wish in normal_preferences(given.get("preference")))
    return ChatMessage(
        role=MARK_ROLE, content=" ".join(text.split()), additional_kwargs={MARK: as_json(given)}
    )


def stated_in(messages: Iterable[ChatMessage]) -> Settings:
    """Return the settings that a conversation states; the last message that says something counts.

    Raises:
        RequestError: a message states something that is not a preference, or is no message.
    """
    stated: Settings = {}
    for index, message in enumerate(messages):
        if not isinstance(message, ChatMessage):
            raise RequestError(
                f"messages[{index}] is a {type(message).__name__}: expected a ChatMessage, such as "
                'ChatMessage(role="user", content="...").'
            )
        given = message.additional_kwargs.get(MARK)
        for key in message.additional_kwargs:
            if key != MARK and meant_by(key) is not None:
                warn(
                    f"messages[{index}]: the key {key!r} of its additional_kwargs is not used; "
                    "to store a preference in a conversation use preference_message(...)."
                )
        if given is not None:
            stated = checked(**given) if isinstance(given, dict) else checked(given)
    return stated


def to_chat(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages in the Transformers chat form, without those that only state a preference.

    Raises:
        RequestError: a message has a block that a text model can't read.
    """
    return [
        _to_dict(index, message)
        for index, message in enumerate(messages)
        if not (message.role == MARK_ROLE and MARK in message.additional_kwargs)
    ]


def without_marks(text: str) -> str:
    """Return a prompt without what LlamaIndex wrote of marked messages into it."""
    return _WRITTEN.sub(lambda found: found[1] or "", text) if MARK in text else text


def _to_dict(index: int, message: ChatMessage) -> dict[str, Any]:
    role = ROLES[message.role]
    parts: list[str | dict[str, Any]] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.blocks:
        if isinstance(block, ThinkingBlock):
            thinking.append(block.content or "")
        elif isinstance(block, ToolCallBlock):
            calls.append(_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif isinstance(block, ImageBlock):
            parts.append(_image(block))
        elif not isinstance(block, CachePoint):
            parts.append(_text(index, block))
    if not calls:
        calls = list(message.additional_kwargs.get("tool_calls") or [])
    content: list[Any] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        together = list(group)
        content += [without_marks("\n".join(map(str, together)))] if is_text else together
    has_image = any(isinstance(part, dict) for part in parts)
    normal: dict[str, Any] = {"role": role, "content": content if has_image else "".join(content)}
    if role == "assistant" and calls:
        normal["tool_calls"] = calls
    if role == "assistant" and thinking:
        normal["reasoning_content"] = "\n".join(thinking)
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if message.additional_kwargs.get(key):
                normal[key] = message.additional_kwargs[key]
    return normal


def _image(block: ImageBlock) -> dict[str, Any]:
    """Return a block's image as a content part; an address is left to be refused."""
    if isinstance(block.image, bytes):
        return {"type": "image", "base64": block.image.decode()}
    if block.image is not None:
        return {"type": "image", "image": block.resolve_image().read()}
    return {"type": "image", "path": block.path or None, "url": block.url and str(block.url)}


def _text(index: int, block: ContentBlock) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, CitableBlock):
        return "\n".join(_text(index, part) for part in block.content)
    if isinstance(block, CitationBlock) and isinstance(block.cited_content, TextBlock):
        return block.cited_content.text
    if isinstance(block, DocumentBlock) and (block.document_mimetype or "").startswith("text/"):
        try:
            return str(block.resolve_document().read().decode())
        except UnicodeDecodeError as error:
            raise RequestError(
                f"messages[{index}] has a document that is not UTF-8: {error}."
            ) from None
    raise RequestError(
        f"messages[{index}] has a {block.block_type} block: models here read only text and images; "
        "leave it out or describe it in words."
    )


def _call(call_id: str | None, name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, default=str)
    function = {"name": name, "arguments": written}
    return {"id": call_id or "", "type": "function", "function": function}


# ---- back ----


def blocks_of(reasoning: str, text: str, calls: Iterable[ToolCall]) -> list[ContentBlock]:
    """Return an answer, or what there is of it so far, as typed blocks; at least one of text."""
    blocks: list[ContentBlock] = [ThinkingBlock(content=reasoning)] if reasoning else []
    called: list[ContentBlock] = [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=call.arguments)
        for call in calls
    ]
    if text or not called:
        blocks.append(TextBlock(text=text))
    return blocks + called


def assistant(reasoning: str, text: str, calls: Sequence[ToolCall] = ()) -> ChatMessage:
    """Return an answer as a message."""
    more = (
        # Where LlamaIndex looks for calls in a stream of partial objects.
        {"tool_calls": [_call(call.id, call.name, call.arguments) for call in calls]}
        if calls
        else {}
    )
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        blocks=blocks_of(reasoning, text, calls),
        additional_kwargs=more,
    )


def counts(usage: Usage) -> dict[str, int]:
    """Return token counts under the names that LlamaIndex's token counters look for."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "base_prompt_tokens": usage.base_prompt_tokens,
    }


def to_chat_response(reply: Reply, raw: dict[str, Any], delta: str | None = None) -> ChatResponse:
    """Return a finished answer; `raw` says where its preference is from."""
    return ChatResponse(
        message=assistant(reply.reasoning, reply.text, reply.tool_calls),
        raw={**raw, **_raw(reply)},
        delta=delta,
        logprobs=logprobs(reply.trace),
        additional_kwargs=counts(reply.usage),
    )


def to_completion_response(
    reply: Reply, raw: dict[str, Any], delta: str | None = None
) -> CompletionResponse:
    """Return a finished completion; see `to_chat_response`."""
    return CompletionResponse(
        text=reply.text,
        raw={**raw, **_raw(reply)},
        delta=delta,
        logprobs=logprobs(reply.trace),
        additional_kwargs=counts(reply.usage),
    )


def logprobs(trace: Sequence[TokenTrace] | None) -> list[list[LogProb]] | None:
    """Return per token itself and its alternatives with their steered log-probabilities."""
    if trace is None:
        return None
    return [
        [
            LogProb(token=text, logprob=value, bytes=list(text.encode()))
            for text, value in [(token.text, token.steered), *((t, v) for _, t, v in token.top)]
        ]
        for token in trace
    ]


def _raw(reply: Reply) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "finish_reason": reply.finish_reason,
        "stop_string": reply.stop_string,
        "usage": counts(reply.usage),
        "steering": reply.steering.model_dump() if reply.steering is not None else None,
    }
    if reply.invalid_tool_calls:
        raw["invalid_tool_calls"] = [
            {"raw": call.raw, "error": call.error, "id": call.id, "name": call.name}
            for call in reply.invalid_tool_calls
        ]
    return raw
