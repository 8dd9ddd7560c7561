"""Messages and preferences -> the token ids of the preferred prompts and of the base prompt.

In this order: a message is checked and its content made one string (`_normal_message`); control
tokens inside contents are broken up (`break_all`); the chat is arranged so that the template takes
it, once for all rows (`_arrange`); the preference is placed (`_place`); each row is rendered and
encoded once. Rendering, probing the template and breaking tokens live in `amulet.template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from amulet.errors import RequestError, TemplateError
from amulet.preference import Placement, Preference
from amulet.template import (
    BREAK,
    SYSTEM,
    ChatTemplate,
    Dialect,
    Message,
    break_all,
    break_message,
    encode,
    token_pattern,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
# Types of content parts, by what OpenAI's chat and Responses APIs and others call them.
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "reasoning_text", "thinking", "redacted_thinking")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one request, as token ids.

    Attributes:
        preferred: one prompt per preference, in their order; () for a plain request.
        base: the same chat without any preference, at least one token.
    """

    preferred: tuple[list[int], ...]
    base: list[int]

    @property
    def shared_prefix(self) -> int:
        """How many tokens all prompts have in common from the start, 0 to the shortest's length."""
        columns = zip(self.base, *self.preferred, strict=False)
        for position, column in enumerate(columns):
            if len(set(column)) > 1:
                return position
        return min(map(len, (self.base, *self.preferred)))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    preferences: Sequence[Preference],
    placement: Placement,
    *,
    tools: Sequence[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> Prompts:
    """Return the prompts of a chat; a last message from the assistant is continued.

    The base prompt is what `apply_chat_template` gives whenever the template takes the messages as
    they are. Otherwise they are mended step by step, in all rows alike: system messages merged into
    one leading message, or put before the first user turn where the template has no system role;
    then consecutive turns of one role merged. Control tokens inside contents are encoded as text
    (in the assistant's only the special ones: its `<think>` is its own).

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dicts with `role` (system, developer, user, assistant, tool) and `content` (text,
            or a list of parts: text, a refusal, and reasoning, which becomes the message's
            `reasoning_content`); other keys reach the template.
        preferences: normal form; each preferred prompt has exactly one of them in it.
        placement: "system" appends to the leading system message, after the template's own default
            where the chat has none; "user" appends to the last user turn, and to the system
            message where the chat has no user turn; "both" does both.
        tools: schemas or functions for the template.
        template_options: further variables of the template, such as `enable_thinking`.

    Raises:
        TemplateError: there is no template, or it refuses the messages even when mended.
        RequestError: a message or option is not valid.
    """
    given = [_normal_message(index, message) for index, message in enumerate(messages)]
    if not given:
        raise RequestError("messages is empty: expected at least one, such as a user message.")
    if given[-1].get("tool_calls"):
        raise RequestError("The last message calls tools: add a tool message with the result.")
    template = ChatTemplate(tokenizer, list(tools or ()) or None, dict(template_options or {}))
    dialect = template.dialect()
    template = replace(
        template,
        tools=break_all(template.tools, dialect.control),
        options=break_all(template.options, dialect.control),
    )
    chat = [break_message(message, dialect) for message in given]
    level, base = _accepted(template, dialect, chat)
    preferred = []
    for preference in preferences:
        text = dialect.defuse(preference.text)
        arranged = _arrange(chat, dialect, level, text, placement)
        # The preference is private: a template that quotes contents must not put it into a log.
        preferred.append(encode(tokenizer, template.render(arranged, quiet=True)))
    prompts = Prompts(tuple(preferred), encode(tokenizer, base))
    if not prompts.base:
        raise TemplateError("The chat template renders these messages to an empty prompt.")
    return prompts


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    preferences: Sequence[Preference],
) -> Prompts:
    """Return the prompts of a raw completion: `prompt` with the tokenizer's own special tokens.

    A preference and a blank line stand before the prompt, whatever the placement: raw text has no
    turns, and what is completed must not be parted from its completion. Special tokens written in
    the prompt count as such, those in a preference are text. A BOS that the prompt already starts
    with is not doubled, and no end-of-text token closes the prompt.

    Args:
        tokenizer: any tokenizer.
        prompt: the text to go on from.
        preferences: normal form, one preferred prompt each.

    Raises:
        RequestError: the prompt is empty and the tokenizer has no BOS to start from.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"prompt is a {type(prompt).__name__}: expected text.")
    if getattr(tokenizer, "chat_template", None):
        dialect = ChatTemplate(tokenizer, None, {}).dialect()
    else:
        control = token_pattern(tokenizer.all_special_tokens)
        dialect = Dialect(control=control, special=control)
    bos = tokenizer.bos_token or ""
    # SmolLM2 names <|im_start|> its BOS and never adds it: only a BOS that is added can double.
    added = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    body = prompt.replace(BREAK, "")
    body = body.removeprefix(bos) if added else body

    base = encode(tokenizer, body, special=True)
    if not base:
        raise RequestError("prompt is empty, and the tokenizer has no BOS token to start from.")
    preferred = [
        encode(tokenizer, f"{dialect.defuse(preference.text)}\n\n{body}", special=True)
        for preference in preferences
    ]
    return Prompts(tuple(preferred), base)


# ---- messages: one form for all ----


def _normal_message(index: int, message: object) -> Message:
    """Return a copy with a known role, its content as one string, and tool arguments as dicts."""
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise RequestError(f"messages[{index}] is a {kind}: expected a dict with role and content.")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ROLES:
        found = f"has role {role!r}" if "role" in message else "has no role"
        raise RequestError(f"messages[{index}] {found}: expected one of {', '.join(ROLES)}.")
    content = message.get("content")
    normal = {**message, "role": role}
    if isinstance(content, str):
        pass
    elif isinstance(content, list | tuple):
        thought = "".join(_reasoning(part) for part in content)
        normal["content"] = "".join(_part_text(index, p) for p in content if not _is_reasoning(p))
        if thought:
            normal.setdefault("reasoning_content", thought)
    elif content is not None:
        kind = type(content).__name__
        raise RequestError(f"messages[{index}] has content of type {kind}: expected text.")
    elif role == "assistant" and isinstance(message.get("refusal"), str):
        normal["content"] = message["refusal"]
    elif role == "assistant" and message.get("reasoning_content"):  # it was cut while it thought
        normal["content"] = normal["content"] if message.get("tool_calls") else ""
    elif role != "assistant" or not message.get("tool_calls"):
        raise RequestError(f"messages[{index}] ({role}) has no content: expected text.")
    if message.get("tool_calls"):
        normal["tool_calls"] = [_parsed_call(index, call) for call in message["tool_calls"]]
    return normal


def _part_text(index: int, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    key = "text" if kind in TEXT_PARTS else "refusal" if kind == "refusal" else None
    text = part.get(key) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(
            f"messages[{index}] has a content part of type {kind!r}: only text is read; "
            "leave it out or describe it in words."
        )
    return text


def _is_reasoning(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in REASONING_PARTS


def _reasoning(part: Any) -> str:
    """Return the text of a reasoning part, of whichever form; "" for other parts."""
    if not _is_reasoning(part):
        return ""
    texts = [part.get("text") or part.get(part["type"])]
    texts += [entry.get("text") for entry in part.get("summary") or () if isinstance(entry, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _parsed_call(index: int, call: object) -> Message:
    """Turn OpenAI's arguments, JSON in a string, into the dict that templates expect."""
    if not isinstance(call, Mapping):
        kind = type(call).__name__
        raise RequestError(f"messages[{index}] has a tool call of type {kind}: expected a dict.")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed_arguments(call["function"])}
    return _parsed_arguments(call)


def _parsed_arguments(function: Mapping[str, Any]) -> Message:
    arguments = function.get("arguments")
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        parsed = arguments  # a model's broken JSON stays the text that it wrote
    return {**function, "arguments": parsed} if isinstance(parsed, dict) else dict(function)


# ---- arranging: what the template takes, the same for all rows ----


def _accepted(template: ChatTemplate, dialect: Dialect, chat: list[Message]) -> tuple[int, str]:
    """Return the least mending that the template accepts, and the base prompt's text under it."""
    # Level 0 is as given. Without a system role all system messages become one anyway.
    levels = (0, 1, 2) if dialect.has_system else (1, 2)
    for level in levels:
        try:
            text = template.render(_arrange(chat, dialect, level))
            if level or not _loses_system(template, chat):
                return level, text
        except TemplateError:
            if level == levels[-1]:
                raise
    raise AssertionError("unreachable: the last level returns or raises")


def _loses_system(template: ChatTemplate, chat: list[Message]) -> bool:
    """Tell whether a system message that isn't the first is dropped without a word."""
    late = [i for i, message in enumerate(chat) if i and message["role"] == "system"]
    marked = [{**message, "content": f"{SYSTEM}{i}x"} if i in late else message
              for i, message in enumerate(chat)]  # fmt: skip
    text = template.render(marked) if late else ""
    return any(f"{SYSTEM}{i}x" not in text for i in late)


def _arrange(
    chat: list[Message],
    dialect: Dialect,
    level: int,
    preference: str = "",
    placement: Placement = "system",
) -> list[Message]:
    if level >= 1:
        chat = [{**message, "content": message.get("content") or ""} for message in chat]
        chat = _with_system(chat, first=True)
    if preference:
        chat = _place(chat, preference, placement, dialect.default_system)
    if not dialect.has_system:
        chat = _with_system(chat, first=False)
    return _merge_turns(chat) if level >= 2 else chat


def _place(chat: list[Message], text: str, placement: Placement, default: str) -> list[Message]:
    chat = list(chat)
    users = [index for index, message in enumerate(chat) if message["role"] == "user"]
    if placement != "system" and users:
        chat[users[-1]] = _extended(chat[users[-1]], "\n\n", text)
    if placement != "user" or not users:
        if chat[0]["role"] == "system":
            chat[0] = _extended(chat[0], " ", text)
        else:
            chat.insert(0, {"role": "system", "content": _joined(" ", default, text)})
    return chat


def _with_system(chat: list[Message], first: bool) -> list[Message]:
    """Merge all system messages, as the first message or as the first user turn's beginning."""
    system = _joined("\n\n", *(m["content"] for m in chat if m["role"] == "system"))
    rest = [message for message in chat if message["role"] != "system"]
    if not system:
        return rest or chat
    users = [index for index, message in enumerate(rest) if message["role"] == "user"]
    if first:
        return [{"role": "system", "content": system}, *rest]
    if not users:
        return [{"role": "user", "content": system}, *rest]
    turn = rest[users[0]]
    rest[users[0]] = {**turn, "content": _joined("\n\n", system, turn["content"])}
    return rest


def _merge_turns(chat: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in chat:
        last = merged[-1] if merged else {"role": ""}
        calls = last.get("tool_calls") or message.get("tool_calls")
        if message["role"] == last["role"] and message["role"] != "tool" and not calls:
            merged[-1] = _extended({**last, **message, "content": last["content"]}, "\n\n",
                                   message["content"])  # fmt: skip
        else:
            merged.append(message)
    return merged


def _extended(message: Message, separator: str, text: str) -> Message:
    return {**message, "content": _joined(separator, message["content"], text)}


def _joined(separator: str, *texts: str) -> str:
    return separator.join(text for text in texts if text)
