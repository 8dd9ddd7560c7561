"""Finds the tokens of an answer's content, with their bytes and offsets, for `logprobs`.

Clients expect the tokens to add up to the content. But the end-of-turn token, thinking, tool calls
and stop sequences are decoded, too, and a character may take several tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from amulet.reply import Event, TokenTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOST = "\N{REPLACEMENT CHARACTER}"  # for invalid bytes; their number varies
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Written:
    """A token of the content.

    Attributes:
        token: what was decoded.
        raw: the part of its bytes that is in the content; a stop sequence may cut a token.
        offset: of its first character, in characters from the start of the content.
    """

    token: TokenTrace
    raw: bytes
    offset: int

    @property
    def text(self) -> str:
        """The bytes as text, with U+FFFD for an incomplete character."""
        return readable(self.raw)


class Content:
    """Finds the tokens of one answer's content from its events.

    Args:
        raw: the bytes of the tokenizer's tokens.
    """

    def __init__(self, raw: TokenBytes) -> None:
        self._raw = raw
        self._text = ""  # content whose tokens have not been found yet
        self._waiting: list[TokenTrace] = []
        self._length = 0

    def take(self, event: Event) -> list[Written]:
        """Take the next event; return the content's tokens that are known so far."""
        if event.kind != "text":
            return self.end()
        self._text += event.text
        self._waiting += event.tokens
        return list(self._found(ended=False))

    def end(self) -> list[Written]:
        """Return the remaining tokens at the end of the text."""
        found = list(self._found(ended=True))
        self._text, self._waiting = "", []
        return found

    def _found(self, ended: bool) -> Iterator[Written]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        group: list[TokenTrace] = []
        said, done = "", 0  # text of the group, and the number of pending tokens before it
        for place, token in enumerate(self._waiting):
            if not self._text:
                break
            is_last = ended and place == len(self._waiting) - 1
            group.append(token)
            said += decoder.decode(self._raw.of(token.token_id) or b"", final=is_last)
            if not is_last and (not said or decoder.getstate()[0]):  # inside a character
                continue
            end = self._match(said, ended)
            if end is None:  # more text may follow
                break
            if end:
                yield from self._written(group, self._text[:end])
            group, said, done = [], "", place + 1
        self._waiting = self._waiting[done:]

    def _match(self, said: str, ended: bool) -> int | None:
        """Return how much of the text these tokens wrote, 0 if none, or None if not known yet."""
        # Some tokenizers drop an answer's first space, and space around spans is dropped.
        for text in dict.fromkeys((said, said.removeprefix(" "), said.lstrip())):
            if not text:
                continue
            if self._text.startswith(text):
                return len(text)
            if text.startswith(self._text):
                return len(self._text) if ended else None
            lost = re.sub(f"{_LOST}+", f"{_LOST}+", re.escape(text))
            if _LOST in self._text and (found := re.match(f"{_LOST}*{lost}", self._text)):
                return found.end()
        return 0

    def _written(self, group: Sequence[TokenTrace], text: str) -> Iterator[Written]:
        before, self._text = self._length, self._text[len(text) :]
        self._length += len(text)
        known = b"".join(self._raw.of(token.token_id) or b"" for token in group)
        # Without the dropped space, and only up to where the content was cut.
        start, end = 0, len(known)
        if _LOST not in text:  # otherwise its bytes differ from the tokens'
            start = max(0, known.find(text.encode()))
            end = start + len(text.encode())
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        at, offset = 0, before
        for token in group:
            raw = self._raw.of(token.token_id)
            if raw is None:
                continue
            kept = raw[max(0, start - at) : max(0, end - at)]
            at += len(raw)
            if kept or not raw:
                yield Written(token, kept, offset)
            offset = min(offset + len(decoder.decode(kept)), self._length)


class TokenBytes:
    """The bytes of a tokenizer's tokens, including tokens that are only part of a character.

    Args:
        tokenizer: byte-level BPE, or pieces with `▁` for a space and `<0xE2>` for a byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        silent = tokenizer.all_special_tokens
        self._added = {id_: token.content.encode() for id_, token in added}
        self._silent = {id_ for id_, t in added if t.special or t.content in silent}
        ids = tokenizer.encode("é", add_special_tokens=False)
        tokens = "".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
        self._is_byte_level = _byte_level(tokens).endswith("é".encode())

    def of(self, token_id: int) -> bytes | None:
        """Return a token's bytes in an answer, or None for a special token, which has no text."""
        return None if token_id in self._silent else self.named(token_id)

    def named(self, token_id: int) -> bytes:
        """Return a token's bytes; for a special token, those of its name."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # the vocabulary is padded
            return b""
        if self._is_byte_level:
            return _byte_level(token)
        if byte := _BYTE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    letters = _alphabet()
    if not all(letter in letters for letter in token):
        return b""
    return bytes(letters[letter] for letter in token)


@cache
def _alphabet() -> dict[str, int]:
    """Return byte-level BPE's alphabet: printable bytes are themselves, others U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def readable(raw: bytes) -> str:
    """Return a token's bytes as text, with U+FFFD for an incomplete character."""
    return raw.decode("utf-8", "replace")
