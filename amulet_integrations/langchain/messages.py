"""Converts LangChain messages to and from the chat dicts of Transformers' templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)

from amulet.errors import RequestError
from amulet.images import is_image
from amulet_integrations._preference import SETTINGS, warn_of_typos

# Blocks that repeat what a message has elsewhere (its tool calls), or that are for another
# provider; a template has no place for them.
SKIPPED = {"tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call"}
SKIPPED |= {"redacted_thinking", "non_standard", "server_tool_call", "server_tool_result"}
REASONING = {"reasoning": "reasoning", "thinking": "thinking"}


def to_chat(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return the chat dicts of LangChain messages.

    Content blocks become one text, but where a user's message has images: there they are parts. An
    assistant's reasoning goes to `reasoning_content`, its tool calls to `tool_calls` with arguments
    as dicts; a tool's result carries the name of its tool.

    Raises:
        RequestError: a message that can't be shown to the model, such as a video, or an image of
            a tool.
    """
    names: dict[str | None, str] = {}
    chat = []
    for message in messages:
        if isinstance(message, AIMessage):
            names.update({call["id"]: call["name"] for call in message.tool_calls})
            chat.append(_assistant(message))
        elif isinstance(message, ToolMessage):
            name = message.name or names.get(message.tool_call_id, "")
            entry = {"role": "tool", "content": _text(message), "name": name}
            chat.append({**entry, "tool_call_id": message.tool_call_id})
        elif isinstance(message, FunctionMessage):
            chat.append({"role": "tool", "content": _text(message), "name": message.name})
        else:
            role = _role(message)
            content = _content(message) if role == "user" else _text(message)
            chat.append({"role": role, "content": content})
    return chat


def countable(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return `to_chat`, but only the text of messages that it refuses."""
    given = convert_to_messages(messages)
    try:
        return to_chat(given)
    except RequestError:
        return [entry for message in given for entry in _text_alone(message)]


def _text_alone(message: BaseMessage) -> list[dict[str, Any]]:
    try:
        return to_chat([message])
    except RequestError:
        role = {"ai": "assistant", "system": "system"}.get(message.type, "user")
        return [{"role": role, "content": str(message.text)}]


def stated_settings(messages: Sequence[BaseMessage]) -> dict[str, Any]:
    """Return the settings that the conversation itself states, latest first.

    A message may state them in its `additional_kwargs`, as in
    `HumanMessage("Hi", additional_kwargs={"preference": "Be brief."})`. Chat histories and
    checkpointers keep them with the message, so they stay with the conversation.
    """
    stated: dict[str, Any] = {}
    for message in reversed(messages):
        if isinstance(message, HumanMessage | SystemMessage):
            warn_of_typos(message.additional_kwargs, "a message's additional_kwargs")
            for name in SETTINGS:
                if (value := message.additional_kwargs.get(name)) is not None:
                    stated.setdefault(name, value)
    return stated


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ChatMessage):
        return {"human": "user", "ai": "assistant"}.get(message.role, message.role)
    raise RequestError(
        f"a message of type {type(message).__name__}: expected a system, human, AI, tool, function "
        "or chat message."
    )


def _assistant(message: AIMessage) -> dict[str, Any]:
    text = _text(message)
    calls = [
        {
            "type": "function",
            "id": call["id"] or f"call_{position}",
            "function": {"name": call["name"], "arguments": call["args"]},
        }
        for position, call in enumerate(message.tool_calls)
    ]
    # Calls that could not be parsed, as written, so that the model sees its own mistake.
    text += "".join(str(call["args"] or "") for call in message.invalid_tool_calls)
    entry: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning := _reasoning(message):
        entry["reasoning_content"] = reasoning
    if calls:
        entry["tool_calls"] = calls
    return entry


def _content(message: BaseMessage) -> str | list[Any]:
    blocks = message.content
    if isinstance(blocks, str) or not any(map(is_image, blocks)):
        return _text(message)
    return [block if is_image(block) else _block_text(block, message.type) for block in blocks]


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(_block_text(block, message.type) for block in message.content)


def _block_text(block: Any, role: str) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
    if kind in ("text", "input_text", "output_text", "refusal"):
        return _string(block, "refusal" if kind == "refusal" else "text", "", role)
    if kind == "text-plain":  # a file has no text
        return _string(block, "text", None, role)
    if kind == "json":
        try:
            return json.dumps(block.get("json"), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"a {role} message has a json block that is not: {error}.") from None
    if kind == "tool_result":
        content = block.get("content")
        parts = content if isinstance(content, list) else [] if content is None else [content]
        return "".join(_block_text(part, role) for part in parts)
    if kind in SKIPPED or kind in REASONING:
        return ""
    raise RequestError(
        f"a {role} message has a content block of type {kind!r}: models here read text, and images "
        "in human messages. Leave the block out, or describe it in words."
    )


def _string(block: Mapping[str, Any], key: str, default: str | None, role: str) -> str:
    text = block.get(key, default)
    if not isinstance(text, str):
        raise RequestError(
            f"a {role} message has a content block of type {block['type']!r} whose {key} is a "
            f"{type(text).__name__}: expected a string."
        )
    return text


def _reasoning(message: AIMessage) -> str:
    if isinstance(kept := message.additional_kwargs.get("reasoning_content"), str):
        return kept
    if isinstance(message.content, str):
        return ""
    return "".join(
        _string(block, REASONING[block["type"]], "", message.type)
        for block in message.content
        if isinstance(block, dict)
        and block.get("type") in REASONING
        and block.get(REASONING[block["type"]]) is not None
    )
