"""Renders a chat template, finds what it supports, and keeps control tokens in contents text.

What a template supports (`TemplateTraits`) is found by rendering sentinels, never by its name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from amulet.errors import RequestError, TemplateError
from amulet.images import MARK, parts_of
from amulet.prompting.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables that belong to the rendering itself: a request that set them would change its form.
RESERVED_OPTIONS = frozenset(
    {"conversation", "messages", "tools", "chat_template", "add_generation_prompt"}
    | {"continue_final_message", "tokenize", "sanitize_control_tokens", "tokenizer_kwargs"}
    | {"padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask"}
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# A private-use character put inside a control token found in a content. The text is encoded piece
# by piece between these, so the token is read as text and the character itself is never encoded.
BREAK = "\U0010f6d5"
SYSTEM, USER, ANSWER, TOOL = (f"zqx{name}xqz" for name in ("system", "user", "answer", "tool"))
NEVER = re.compile(r"(?!)")
# The markers of thinking spans that models are trained with.
THINKING: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)


@dataclass(frozen=True)
class TemplateTraits:
    """The features of a chat template that matter for prompts.

    Attributes:
        has_system: a system message is rendered, not refused and not dropped.
        default_system: the system text that it writes if the chat has none; "" for none.
        control: the tokens that must not come from a content.
        special: those that must not come from the assistant's content either: special
            tokens, and those that start and end turns.
        markers: role markers that are plain text, such as `[/INST]` or `### Response:`.
        lists: the roles whose contents it shows only as lists of parts.
        folds: the tokenizer reads full-width letters as normal ones, or drops invisible ones.
    """

    has_system: bool = True
    default_system: str = ""
    control: re.Pattern[str] = NEVER
    special: re.Pattern[str] = NEVER
    markers: re.Pattern[str] = NEVER
    lists: frozenset[str] = frozenset()
    folds: bool = False

    def defuse(self, preference: str) -> str:
        """Return the preference with role markers spaced apart and control tokens broken up."""
        text = preference.replace(BREAK, "")
        if self.markers.search(folded := _folded(text)):
            text = folded
        return str(break_all(self.markers.sub(_spaced, text), self.control, folds=True))


@dataclass(frozen=True)
class ChatTemplate:
    """One tokenizer's chat template with a request's tools and template options.

    Attributes:
        lists: the roles whose contents are rendered as lists of parts.
        image_tokens: placeholders of images, which no content may have.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: list[Any] | None
    options: dict[str, Any]
    lists: frozenset[str] = frozenset()
    image_tokens: frozenset[str] = frozenset()
    source: str = field(init=False)

    def __post_init__(self) -> None:
        reserved = sorted(RESERVED_OPTIONS & self.options.keys())
        if reserved:
            raise RequestError(
                f"template_options has {', '.join(reserved)}: Amulet sets it itself; leave it out."
            )
        try:
            source = self.tokenizer.get_chat_template(None, self.tools)
        except (ValueError, AttributeError):
            raise TemplateError(
                "The tokenizer has no chat template: set tokenizer.chat_template to the model's "
                "template. For raw text use Amulet.complete(), AmuletLLM in LangChain and "
                "LlamaIndex, or /v1/completions."
            ) from None
        object.__setattr__(self, "source", source)

    def render(self, chat: list[Message], quiet: bool = False) -> str:
        """Return the prompt's text; the error of a refusal names the roles."""
        return self.render_all([chat], quiet)[0]

    def render_all(self, chats: list[list[Message]], quiet: bool = False) -> list[str]:
        """Render several chats, all of which or none of which end in an answer to continue."""
        chat = chats[0]
        continued = chat[-1]["role"] == "assistant"
        try:
            texts = self.tokenizer.apply_chat_template(
                [[self._listed(message) for message in chat] for chat in chats],
                tools=self.tools,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                tokenize=False,
                **self.options,
            )
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(message["role"] for message in chat)
            reason = str(error).replace(BREAK, "") or type(error).__name__
            if quiet:
                reason = f"{type(error).__name__}, once a preference was added"
            raise TemplateError(
                f"The chat template refuses these messages: {reason} (roles: {roles}). "
                "Reorder or merge them as the template expects."
            ) from None
        return [str(text) for text in texts]

    def _listed(self, message: Message) -> Message:
        content, thought = message.get("content"), message.get("reasoning_content")
        # gpt-oss's template has another name for it, and beside a call no room for both.
        named = ".thinking" in self.source and "thinking" not in message
        if thought and named and not (content and message.get("tool_calls")):
            message = {**message, "thinking": thought}
        if not isinstance(content, str) or (
            message["role"] not in self.lists and MARK not in content
        ):
            return message
        return {**message, "content": parts_of(content) or [{"type": "text", "text": ""}]}

    def traits(self) -> TemplateTraits:
        """Return the template's traits; probed once per template, options and day."""
        # The day: a default system text may state today's date.
        key = (
            *(self.source, repr(self.options), bool(self.tools), self.image_tokens),
            *(len(self.tokenizer), date.today()),
        )
        known = _known_traits.setdefault(self.tokenizer, {})
        if key not in known:
            if len(known) >= 64:
                known.clear()
            known[key] = _probe(self)
        return known[key]


_known_traits: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, TemplateTraits]] = (
    WeakKeyDictionary()
)


def _probe(template: ChatTemplate) -> TemplateTraits:
    system = {"role": "system", "content": SYSTEM}
    user = {"role": "user", "content": USER}
    answer = {"role": "assistant", "content": ANSWER}
    call = {"type": "function", "function": {"name": TOOL, "arguments": {}}}
    calls: list[Message] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": TOOL, "content": TOOL + TOOL},
    ]

    def attempt(*chat: Message) -> str:
        try:
            return template.render(list(chat))
        except TemplateError:
            return ""

    for index, chat in ((0, [user]), (0, [system, user]), (1, [user, answer]), (2, [user, *calls])):
        given, known = chat[index], template
        if given["content"] not in attempt(*chat):
            template = replace(known, lists=known.lists | {given["role"]})
            if given["content"] not in attempt(*chat):
                template = known
    plain, steered = attempt(user), attempt(system, user)
    # If even a single user message is refused, the probe is inconclusive: assume a system role.
    has_system = SYSTEM in steered or not plain
    default, (before, found, after) = "", steered.partition(SYSTEM)
    if found and plain.startswith(before) and plain.endswith(after):
        default = plain[len(before) : max(len(plain) - len(after), len(before))]
    lead = [system] if has_system else []  # keeps a default text out of the markers
    shown = "\n".join(
        (attempt(*lead, user), attempt(*lead, user, answer, user), attempt(*lead, user, *calls))
    )
    # Up to the last user turn: a generation prompt may open a thinking span.
    turns = attempt(*lead, user, answer, user).rpartition(USER)[0]
    thinking = {marker for pair in THINKING for marker in pair}
    special, control = set(template.image_tokens), set()
    for token in template.tokenizer.added_tokens_decoder.values():
        if token.special or (token.content in turns and token.content not in thinking):
            if not token.content.isspace():
                special.add(token.content)
        # Gemma has "\n" and runs of spaces among its added tokens: whitespace controls nothing.
        elif not token.content.isspace() and (token.content in template.source + shown):
            control.add(token.content)
    special.update(template.tokenizer.all_special_tokens)
    any_case = is_uncased(template.tokenizer)
    pattern = token_pattern(special | control, any_case)
    return TemplateTraits(
        has_system,
        default,
        pattern,
        token_pattern(special, any_case),
        _markers(shown, pattern),
        template.lists,
        _folds(template.tokenizer),
    )


def is_uncased(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer lower-cases text, perhaps also its added tokens."""
    small, capital = (tokenizer.encode(text, add_special_tokens=False) for text in "aA")
    return bool(small == capital)


def _folds(tokenizer: PreTrainedTokenizerBase) -> bool:
    plain, *others = (
        tokenizer.encode(t, add_special_tokens=False) for t in ("<", "\uff1c", "\u200b<")
    )
    return plain in others


def token_pattern(tokens: Iterable[str], any_case: bool = False) -> re.Pattern[str]:
    """Return a pattern that finds any of the tokens, the longest first."""
    # A token of one character can't be broken up; no template's control token is that short.
    longest_first = sorted({t for t in tokens if len(t.strip()) > 1}, key=lambda t: (-len(t), t))
    flags = re.IGNORECASE if any_case else 0
    return re.compile("|".join(map(re.escape, longest_first)) or NEVER.pattern, flags)


def _markers(rendered: str, control: re.Pattern[str]) -> re.Pattern[str]:
    """Find the role markers that are plain text, between the sentinels."""
    found: set[str] = set()
    between = re.sub(f"{SYSTEM}|{USER}|{ANSWER}|{TOOL}", "\n", control.sub("\n", rendered))
    for line in between.splitlines():
        bracketed = re.findall(r"(?<!\S)[^\w\s]+\w[^\s]*[^\w\s](?!\S)", line)
        rest = [word for word in line.split() if word not in bracketed]
        found.update(bracketed)
        # A marker needs a sign that prose lacks (a bare "user" is only half of one: its control
        # token is already broken) and is short: longer lines are a preamble, not a role.
        if 0 < len(rest) <= 4 and re.search(r"\w", line) and re.search(r"[^\w\s]", "".join(rest)):
            found.add(" ".join(rest))
    found = {marker for marker in found if '"' not in marker and re.search(r"\w", marker)}
    longest_first = sorted(found, key=lambda marker: (-len(marker), marker))
    words = (r"\s+".join(map(re.escape, marker.split())) for marker in longest_first)
    return re.compile("|".join(words) or NEVER.pattern)


def _spaced(match: re.Match[str]) -> str:
    # "[/INST]" -> "[ /INST]", "Human:" -> "Human :"; still readable, but no longer a marker.
    marker = match[0]
    cut = len(marker) - 1 if marker[0].isalnum() else 1
    return f"{marker[:cut]} {marker[cut:]}"


# ---- control tokens as text ----


def break_message(message: Message, traits: TemplateTraits) -> Message:
    """Put `BREAK` into the control tokens of a message, those of the assistant's texts excepted."""
    broken: Message = break_all(message, traits.control, traits.folds)
    if message["role"] == "assistant":
        own = {key: text for key, text in message.items() if isinstance(text, str)}
        broken.update(break_all(own, traits.special, traits.folds))
    return {**broken, "role": message["role"]}


def break_all(value: Any, pattern: re.Pattern[str], folds: bool = False) -> Any:
    """Put `BREAK` into every control token of the strings in `value`, keys too.

    Args:
        value: any JSON, or another object, which becomes the text that a template would write.
        pattern: finds the tokens.
        folds: also find those that folding would create; a text with one of them is folded.
    """
    if isinstance(value, str):
        text = _broken(value.replace(BREAK, ""), pattern)
        if folds and pattern.search(folded := _folded(text)):
            text = _broken(folded, pattern)
        return text
    if isinstance(value, Mapping):
        return {
            break_all(key, pattern, folds): break_all(entry, pattern, folds)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [break_all(entry, pattern, folds) for entry in value]
    # A template writes any object, such as a path or a date, as its text.
    return broken if BREAK in (broken := break_all(str(value), pattern, folds)) else value


def _broken(text: str, pattern: re.Pattern[str]) -> str:
    while pattern.search(text):  # breaking one token can leave another intact
        text = pattern.sub(lambda match: match[0][:1] + BREAK + match[0][1:], text)
    return text


def _folded(text: str) -> str:
    """Return a text with wide letters folded and invisible ones dropped.

    Some tokenizers do so, so a control token or marker that results is treated as one.
    """
    if text.isascii():
        return text
    normal = unicodedata.normalize("NFKC", text)
    return "".join(letter for letter in normal if unicodedata.category(letter) != "Cf")


def check_unicode(text: str) -> None:
    """Raise for text that no tokenizer accepts.

    Raises:
        RequestError: it is not a string, or contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise RequestError(f"a text of type {type(text).__name__}: expected str.")
    if _SURROGATE.search(text):
        raise RequestError(
            "A text contains a lone surrogate, which is not a character: give valid Unicode, "
            'such as text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Encode once, or piece by piece if `BREAK` separates characters; see `check_unicode`."""
    check_unicode(text)
    first, *pieces = text.split(BREAK)
    ids = list(tokenizer(first, add_special_tokens=special, verbose=False)["input_ids"])
    # Some tokenizers end every text with a token; a prompt to be continued must not have one.
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if special and ids and ids[-1] == end and not first.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1] if len(ids) > 1 or end != bos else ids
    inside = _encode_inside(tokenizer, set(pieces))
    for piece in pieces:
        ids += inside[piece]
    return ids


def _encode_inside(tokenizer: PreTrainedTokenizerBase, pieces: set[str]) -> dict[str, list[int]]:
    """Return the ids of pieces, in one call, because a hostile text has very many."""
    if not pieces:
        return {}
    # SentencePiece puts a space before a text's first word; after a newline it does not.
    texts = ["\n", *("\n" + piece for piece in pieces), *pieces]
    newline, *ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    cut = len(newline)
    return {
        piece: list(led[cut:] if led[:cut] == newline else bare)
        for piece, led, bare in zip(pieces, ids[: len(pieces)], ids[len(pieces) :], strict=True)
    }
