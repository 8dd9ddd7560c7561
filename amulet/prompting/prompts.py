"""Builds the token ids of the preferred prompts and of the base prompt.

The steps: messages are normalised (`amulet.prompting.messages`); control tokens inside contents
are broken up (`break_all`); `_fitted` finds the fewest changes with which the template shows every
message and the preference, the same for all rows; each row is rendered and encoded once.
`amulet.prompting.chat_template` finds out what a template supports.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from amulet.errors import RequestError, TemplateError
from amulet.images import MARK, ImageReader, PromptImage
from amulet.preference import Placement, Preference
from amulet.prompting.chat_template import (
    BREAK,
    ChatTemplate,
    TemplateTraits,
    break_all,
    break_message,
    encode,
    is_uncased,
    token_pattern,
)
from amulet.prompting.messages import Message, call_forms, normal_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFERENCE = "zqxpreferencexqz"
_MARK = re.compile(rf"zqx\d+xqz|{PREFERENCE}")


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
        """The length of the prefix that all prompts share, 0 to the shortest prompt's length."""
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
    reader: ImageReader | None = None,
    images: Sequence[PromptImage] = (),
) -> Prompts:
    """Return the prompts of a chat; if the last message is the assistant's, it is continued.

    The base prompt is the result of `apply_chat_template` if the template accepts the messages
    unchanged and shows all of them. Otherwise they are changed step by step, the same in all rows:
    system messages are merged into one leading message (one that follows an answer becomes a user
    turn), or prepended to the first user turn if the template has no system role; consecutive
    turns of one role are merged; tool calls get other ids or forms, and finally become text.
    Control tokens inside contents are encoded as text (in assistant messages only the special ones,
    because `<think>` is the model's own).

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: dicts with `role` (system, developer, user, assistant, tool) and `content` (text,
            or a list of parts: text, a refusal, and reasoning, which becomes the message's
            `reasoning_content`); the template gets all other keys.
        preferences: normal form; each preferred prompt contains exactly one of them.
        placement: "system" appends to the leading system message, after the template's default
            system message if the chat has none; "user" appends to the last user turn, or to the
            system message if the chat has no user turn; "both" does both.
        tools: schemas or functions for the template.
        template_options: additional variables of the template, such as `enable_thinking`.
        reader: of the model's images; its tokens in contents are text, too.
        images: one for each `MARK` in the user's messages, in their order.

    Raises:
        TemplateError: there is no template, or even with these changes it refuses the messages, or
            drops a message, an image or the preference.
        RequestError: a message or option is not valid.
    """
    given = normal_messages(messages)
    if not given:
        raise RequestError("messages is empty: expected at least one, such as a user message.")
    template = ChatTemplate(
        tokenizer,
        list(tools or ()) or None,
        dict(template_options or {}),
        image_tokens=reader.tokens if reader else frozenset(),
    )
    traits = template.traits()
    template = replace(
        template,
        tools=break_all(template.tools, traits.control, traits.folds),
        options=break_all(template.options, traits.control, traits.folds),
        lists=traits.lists,
    )
    chat = [break_message(message, traits) for message in given]
    fitted = _fitted(template, traits, chat, placement if preferences else None)

    def encoded(text: str) -> list[int]:
        return encode(tokenizer, _with_images(text, reader.token, images) if reader else text)

    base = encoded(fitted.text)
    if not base:
        raise TemplateError("The chat template renders these messages to an empty prompt.")
    preferred = []
    for preference in preferences:
        text = traits.defuse(preference.text)
        arranged = _arrange(fitted.chat, traits, fitted.changes, text, placement)
        # The preference is private: a template error that quotes it must not reach a log.
        preferred.append(encoded(template.render(arranged, quiet=True)))
    return _told_apart(Prompts(tuple(preferred), base))


def encode_alone(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    preferences: Sequence[Preference],
    *,
    tools: Sequence[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
    reader: ImageReader | None = None,
) -> list[int]:
    """Return the prompt for focus: the preferences without what was asked.

    It has the chat's system messages, then the preferences as the user's message, then what
    followed the user's last message: calls and their results, or an answer that is continued. It
    has no image, as images are part of what was asked.

    Args:
        tokenizer, messages, tools, template_options, reader: as for `encode_chat`.
        preferences: normal form, at least one of positive weight; negative ones are left out.

    Raises:
        TemplateError: the template refuses these messages.
    """
    system = [message for message in messages if message.get("role") in ("system", "developer")]
    users = [place for place, message in enumerate(messages) if message.get("role") == "user"]
    since = messages[users[-1] + 1 :] if users else ()
    wanted = Preference("\n".join(one.text for one in preferences if one.weight > 0))
    chat = [*system, {"role": "user", "content": ""}, *since]
    prompts = encode_chat(
        tokenizer,
        chat,
        [wanted],
        "user",
        tools=tools,
        template_options=template_options,
        reader=reader,
    )
    return prompts.preferred[0]


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    preferences: Sequence[Preference],
) -> Prompts:
    """Return the prompts of a raw completion: `prompt` with the tokenizer's own special tokens.

    A preference and a blank line precede the prompt, whatever the placement: raw text has no turns,
    and nothing may come between the prompt and its completion. Special tokens in the prompt's text
    are encoded as such; in a preference they are text. A BOS at the start of the prompt is not
    doubled, and no end-of-text token is appended.

    Args:
        tokenizer: any tokenizer.
        prompt: the text to continue.
        preferences: normal form, one preferred prompt for each.

    Raises:
        RequestError: the prompt is empty and the tokenizer has no BOS token.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"prompt is a {type(prompt).__name__}: expected text.")
    if getattr(tokenizer, "chat_template", None):
        traits = ChatTemplate(tokenizer, None, {}).traits()
    else:
        known = tokenizer.added_tokens_decoder.values()
        special = [token.content for token in known if token.special]
        control = token_pattern([*tokenizer.all_special_tokens, *special], is_uncased(tokenizer))
        traits = TemplateTraits(control=control, special=control)
    bos = tokenizer.bos_token or ""
    # SmolLM2 declares <|im_start|> as BOS but never adds it; only a BOS that is added can double.
    added = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    body = prompt.replace(BREAK, "")
    body = body.removeprefix(bos) if added else body

    base = encode(tokenizer, body, special=True)
    if not base:
        raise RequestError("prompt is empty, and the tokenizer has no BOS token to start from.")
    preferred = [
        encode(tokenizer, f"{traits.defuse(preference.text)}\n\n{body}", special=True)
        for preference in preferences
    ]
    return _told_apart(Prompts(tuple(preferred), base))


def _with_images(text: str, token: str, images: Sequence[PromptImage]) -> str:
    """Return a rendered chat with each placeholder as the model expects it for its image."""
    first, *rest = text.split(token)
    if len(rest) != len(images):
        raise TemplateError(
            f"The chat template shows {len(rest)} of {len(images)} images. Use the template that "
            "the model's processor has."
        )
    shown = [image.text + piece for image, piece in zip(images, rest, strict=True)]
    return "".join([first, *shown])


def _told_apart(prompts: Prompts) -> Prompts:
    if prompts.base in prompts.preferred:
        raise RequestError(
            "The prompts with and without the preference are the same: the tokenizer or the chat "
            "template drops every character of the preference."
        )
    return prompts


# ---- arranging messages so that the template accepts them, the same for all rows ----


class _Changes(NamedTuple):
    """Changes to a chat with which its template accepts it."""

    merge_system: bool
    merge_turns: bool
    fold_system: bool
    """The system message becomes the first user turn's beginning."""


class _Fitted(NamedTuple):
    chat: list[Message]
    changes: _Changes
    text: str
    """The base prompt."""


def _fitted(
    template: ChatTemplate,
    traits: TemplateTraits,
    chat: list[Message],
    placement: Placement | None,
) -> _Fitted:
    """Return the chat with the fewest changes with which the template shows all of it.

    Each attempt also renders the chat with sentinels in place of contents and of the preference
    (`placement` is None if there is none): a missing sentinel means that the template drops it.
    """
    refused: TemplateError | None = None
    dropped: list[str] = []
    unchecked: _Fitted | None = None
    all_changes = _all_changes(traits)
    for form, changes in ((form, changes) for form in call_forms(chat) for changes in all_changes):
        base = _arrange(form, traits, changes)
        marked, marks = _marked(form)
        if placement is not None:
            marks[PREFERENCE] = "the preference"
        twin = _arrange(marked, traits, changes, PREFERENCE if placement else "", placement)
        try:
            text, shown = template.render_all([base, twin])
        except TemplateError:
            try:
                text = template.render(base)
            except TemplateError as error:
                refused = refused or error
            else:  # it depends on the contents, or accepts no system message here
                unchecked = unchecked or _Fitted(form, changes, text)
            continue
        wanted, found = (Counter(_MARK.findall(text)) for text in (str(twin), shown.lower()))
        lost = [what for mark, what in marks.items() if found[mark] < wanted[mark]]
        if not lost:
            return _Fitted(form, changes, text)
        dropped = dropped or lost
    if unchecked is not None:
        return unchecked
    if dropped:
        raise TemplateError(
            f"The chat template silently drops {', '.join(dropped)}: the model would never see it. "
            "Leave it out, or use a template that shows it."
        )
    assert refused is not None
    raise refused


def _all_changes(traits: TemplateTraits) -> list[_Changes]:
    if not traits.has_system:
        return [_Changes(True, merge, True) for merge in (False, True)]
    merged = [_Changes(True, merge, fold) for merge in (False, True) for fold in (False, True)]
    return [_Changes(False, False, False), *merged]


def _marked(chat: list[Message]) -> tuple[list[Message], dict[str, str]]:
    """Return the chat with sentinels for contents and call names, and each sentinel's meaning."""
    marked: list[Message] = []
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        sentinel = f"zqx{len(marks)}xqz"
        marks[sentinel] = what
        return sentinel

    for index, message in enumerate(chat):
        what = f"messages[{index}] ({message['role']})"
        calls = message.get("tool_calls") or ()
        message = dict(message)
        if calls:
            message["tool_calls"] = [_named(call, mark(f"a tool call of {what}")) for call in calls]
        elif message["content"].strip():  # text in a message with calls may be dropped
            message["content"] = MARK * message["content"].count(MARK) + mark(what)
        marked.append(message)
    return marked, marks


def _named(call: Message, name: str) -> Message:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _arrange(
    chat: list[Message],
    traits: TemplateTraits,
    changes: _Changes,
    preference: str = "",
    placement: Placement | None = None,
) -> list[Message]:
    if changes.merge_system:
        chat = [{**message, "content": message.get("content") or ""} for message in chat]
        chat = _with_system(_late_system_as_user(chat), first=True)
    if preference:
        chat = _place(chat, preference, placement, traits.default_system)
    if changes.fold_system:
        chat = _with_system(chat, first=False)
    return _merge_turns(chat) if changes.merge_turns else chat


def _late_system_as_user(chat: list[Message]) -> list[Message]:
    """Turn system messages into user turns if they follow an answer and no user turn follows them.

    Moved to the front, they would leave the finished answer last, and it would be continued.
    """
    roles = [message["role"] for message in chat]
    before, after = _last_other(roles), reversed([*_last_other(reversed(roles))])
    return [
        {**message, "role": "user"}
        if message["role"] == "system" and last == "assistant" and then in ("", "assistant")
        else message
        for message, last, then in zip(chat, before, after, strict=True)
    ]


def _last_other(roles: Iterable[str]) -> Iterator[str]:
    """Yield for each role the last role before it that is not "system"; "" if there is none."""
    last = ""
    for role in roles:
        yield last
        last = last if role == "system" else role


def _place(
    chat: list[Message], text: str, placement: Placement | None, default: str
) -> list[Message]:
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
    """Merge all system messages into the first message, or into the first user turn's start."""
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
