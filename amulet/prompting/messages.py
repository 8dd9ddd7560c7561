"""Normalises chat messages, and writes past tool calls in the forms that templates accept."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import not_
from typing import Any, TypeAlias

from amulet.errors import RequestError, shown

Message: TypeAlias = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# Types of content parts, by what OpenAI's chat and Responses APIs and others call them.
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "reasoning_text", "thinking", "redacted_thinking")
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Further keys that templates write; None counts as absent."""


def normal_messages(messages: Sequence[object]) -> list[Message]:
    """Return copies with a known role, contents as one text each, and tool arguments as dicts.

    Raises:
        RequestError: templates can't read a message (states its index), or the last
            message calls tools.
    """
    normal = [_normal_message(index, message) for index, message in enumerate(messages)]
    if normal and normal[-1].get("tool_calls"):
        raise RequestError("The last message calls tools: add a tool message with the result.")
    return normal


def _normal_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise RequestError(f"messages[{index}] is a {kind}: expected a dict with role and content.")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        found = f"has role {shown(role)}" if "role" in message else "has no role"
        raise RequestError(f"messages[{index}] {found}: expected one of {', '.join(ROLES)}.")
    content = message.get("content")
    normal = {**message, "role": role}
    if isinstance(content, str):
        pass
    elif isinstance(content, list | tuple):
        thoughts = [role == "assistant" and _is_reasoning(part) for part in content]
        texts = [_part_text(index, part) for part in compress(content, map(not_, thoughts))]
        normal["content"] = "".join(texts)
        if thought := "".join(map(_reasoning, compress(content, thoughts))):
            normal["reasoning_content"] = message.get("reasoning_content") or thought
    elif content is not None:
        kind = type(content).__name__
        raise RequestError(f"messages[{index}] has content of type {kind}: expected text.")
    elif role == "assistant" and isinstance(message.get("refusal"), str):
        normal["content"] = message["refusal"]
    elif role == "assistant" and message.get("reasoning_content"):  # it was cut off while thinking
        normal["content"] = None if message.get("tool_calls") else ""
    elif role != "assistant" or not message.get("tool_calls"):
        raise RequestError(f"messages[{index}] ({role}) has no content: expected text.")
    for key in TEXTS:
        if not isinstance(message.get(key), str | None):
            kind = type(message[key]).__name__
            raise RequestError(f"messages[{index}] has {key} of type {kind}: expected text.")
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list | tuple):
            kind = type(calls).__name__
            raise RequestError(f"messages[{index}] has tool_calls of type {kind}: expected a list.")
        normal["tool_calls"] = [_parsed_call(index, call) for call in calls]
    return normal


def _part_text(index: int, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    key = "text" if kind in TEXT_PARTS else "refusal" if kind == "refusal" else None
    if not isinstance(part, Mapping) or key is None:
        raise RequestError(
            f"messages[{index}] has a content part of type {shown(kind)}: only text and images are "
            "read; leave it out or describe it in words."
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise RequestError(
            f"messages[{index}] has a content part of type {shown(kind)} whose {key} is a "
            f"{type(text).__name__}: expected a string."
        )
    return text


def _is_reasoning(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in REASONING_PARTS


def _reasoning(part: Any) -> str:
    """Return the text of a reasoning part of any form."""
    texts = [part.get("text") or part.get(part["type"])]
    texts += [entry.get("text") for entry in part.get("summary") or () if isinstance(entry, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _parsed_call(index: int, call: object) -> Message:
    """Convert OpenAI's arguments, JSON in a string, to the dict that templates expect."""
    if not isinstance(call, Mapping):
        kind = type(call).__name__
        raise RequestError(f"messages[{index}] has a tool call of type {kind}: expected a dict.")
    inner = call.get("function", call)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise RequestError(f"messages[{index}] has a tool call without a name: {shown(call)}.")
    if "function" in call:
        return {**call, "function": _parsed_arguments(inner)}
    return _parsed_arguments(inner)


def _parsed_arguments(function: Mapping[str, Any]) -> Message:
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = arguments  # a model's invalid JSON stays text
    except RecursionError:
        raise RequestError("The request is nested too deeply.") from None
    if arguments in (None, ""):
        parsed = {}
    return {**function, "arguments": parsed} if isinstance(parsed, dict) else dict(function)


# ---- past calls, in the forms that templates accept ----


def has_calls(chat: Sequence[Message]) -> bool:
    """Tell whether a chat in normal form has tool calls or their results."""
    return any(message["role"] == "tool" or message.get("tool_calls") for message in chat)


def call_forms(chat: list[Message]) -> Iterator[list[Message]]:
    """Yield a chat in normal form as it is, then with its tool calls written in other ways.

    Mistral's templates refuse ids that are not nine letters and digits, Llama's more than one call
    in a message, DeepSeek's arguments that are not text. Last, calls and results are text.
    """
    yield chat
    if has_calls(chat):
        yield [_with_short_ids(message) for message in chat]
        yield _one_call_each(chat)
        yield [_with_written_arguments(message) for message in chat]
        yield calls_as_text(chat)


def _with_short_ids(message: Message) -> Message:
    short = dict(message)
    if message.get("tool_call_id"):
        short["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        short["tool_calls"] = [{**call, "id": _short(call.get("id"))}
                               for call in message["tool_calls"]]  # fmt: skip
    return short


def _short(given: object) -> str:
    letters = string.ascii_letters + string.digits
    digest = hashlib.sha256(str(given).encode("utf-8", "replace")).digest()
    return "".join(letters[byte % len(letters)] for byte in digest[:9])


def _one_call_each(chat: list[Message]) -> list[Message]:
    """Make each call a separate message, followed by its result."""
    out: list[Message] = []
    # Messages of one call each whose results have not come yet, by the call's id.
    waiting: dict[str, list[Message]] = {}
    for message in chat:
        if message["role"] == "tool" and waiting:
            asked = str(message.get("tool_call_id"))
            asked = asked if asked in waiting else next(iter(waiting))
            out += (waiting[asked].pop(0), message)
            if not waiting[asked]:
                del waiting[asked]
            continue
        out += chain(*waiting.values())
        waiting = {}
        calls = message.get("tool_calls") or ()
        for at, call in enumerate(calls):
            content = "" if at else message.get("content")
            waiting.setdefault(str(call.get("id")), []).append(
                {**message, "content": content, "tool_calls": [call]}
            )
        if not calls:
            out.append(message)
    return [*out, *chain(*waiting.values())]


def _with_written_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [
        {**call, "function": _written(call["function"])} if "function" in call else _written(call)
        for call in message["tool_calls"]
    ]}  # fmt: skip


def _written(function: Mapping[str, Any]) -> Message:
    return {**function, "arguments": arguments_text(function)}


def arguments_text(function: Mapping[str, Any]) -> str:
    """Return a call's arguments as JSON, or as the text that the model wrote."""
    arguments = function.get("arguments")
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, default=str)


def calls_as_text(chat: Sequence[Message]) -> list[Message]:
    """Return a chat in normal form whose calls and results are text, in Hermes's form.

    Calls stay in the assistant's own turn; results become user turns.
    """
    written: list[Message] = []
    after_result = False
    for message in chat:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                written[-1]["content"] += "\n" + result
            else:
                written.append({"role": "user", "content": result})
        elif message.get("tool_calls"):
            written.append({"role": "assistant", "content": _with_calls(message)})
        else:
            written.append(dict(message))
        after_result = message["role"] == "tool"
    return written


def _with_calls(message: Message) -> str:
    blocks = [message.get("content") or ""]
    for call in message["tool_calls"]:
        function = call.get("function", call)
        body = (
            f'{{"name": {json.dumps(function["name"])}, "arguments": {arguments_text(function)}}}'
        )
        blocks.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(block for block in blocks if block)
