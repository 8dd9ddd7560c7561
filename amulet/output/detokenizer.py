"""Converts token ids to text while decoding runs, and finds stop sequences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amulet.prompting.chat_template import token_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What every tokenizer's decode returns for bytes that are not (yet) a character."""

_LETTERS = re.compile("[\ud800-\udfff]")

_HELD_LIMIT = 8
"""The number of held tokens from which invalid bytes are given up, piece by piece.

A character has at most four bytes, hence at most four tokens.
"""


class StopStrings:
    """Cuts a growing text at the first stop sequence; holds back what may become one.

    Args:
        strings: non-empty stop sequences; without any, all text is released.
        special: special tokens and the letters that stand for them in the text; see
            `special_letters`. They can be part of stop sequences and are never released.

    Attributes:
        found: the stop sequence that was complete first; after it, nothing is released.
    """

    def __init__(self, strings: Sequence[str], special: Mapping[str, str] | None = None) -> None:
        self.found: str | None = None
        letters = dict(special or {})
        pattern = token_pattern(letters)
        # A special token's own text may also be written by ordinary tokens.
        strings = [string for string in strings if not _LETTERS.search(string)]
        self._meant = {string: string for string in strings}
        self._meant |= {pattern.sub(lambda m: letters[m[0]], string): string for string in strings}
        self._strings = tuple(self._meant)
        self._longest_hold = max((len(string) for string in self._strings), default=1) - 1
        self._tail = ""

    def push(self, text: str, *, ended: bool = False) -> str:
        """Take the next text; return the text that can be released; with `ended`, all of it."""
        if self.found is not None:
            return ""
        text = self._tail + text
        found = [
            (start + len(string), start, string)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if found:
            _, keep, written = min(found)
            self.found = self._meant[written]
        else:
            keep = len(text) if ended else len(text) - self._held_length(text)
        self._tail = "" if found else text[keep:]
        return without_letters(text[:keep])

    def _held_length(self, text: str) -> int:
        """Return the length of the longest suffix that is the start of a stop sequence."""
        for length in range(min(self._longest_hold, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0


def special_letters(
    tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]
) -> dict[int, tuple[str, str]]:
    """Return the special tokens in stop sequences, by id: their text, and a letter for it.

    Decoding gives them no text. The letters are lone surrogates, which no decoded text contains.
    """
    named = [
        (token_id, token.content)
        for token_id, token in (tokenizer.added_tokens_decoder.items() if stop else ())
        if any(token.content in string for string in stop)
    ]
    return {
        token_id: (text, chr(0xD800 + rank))
        for rank, (token_id, text) in enumerate(named)
        if not tokenizer.decode([token_id], skip_special_tokens=True)
    }


def without_letters(text: str) -> str:
    """Return a text without the letters that stand for special tokens."""
    return _LETTERS.sub("", text)


class Detokenizer:
    """Decodes one answer token by token; an incomplete character waits for its other bytes.

    Pieces concatenate to `tokenizer.decode(all_ids)`, without clean-up of spaces. One difference: a
    `byte_fallback` tokenizer decodes a run of byte tokens that breaks off inside a character to
    nothing but U+FFFD; here the whole characters stay. A push decodes a few ids, however long the
    answer is: those of the last piece, on which the text of the next ids depends, and the pending.

    Args:
        tokenizer: any Transformers tokenizer.
        context: ids that the answer goes on from: some tokenizers drop a text's first space.
        skip_special_tokens: give special tokens no text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = list(context)
        self._pending: list[int] = []
        self._pending_text = ""
        self._released = 0  # characters of the pending text that are out already

    def push(self, token_id: int) -> str:
        """Take one id; return the characters that are whole now."""
        before, self._pending = self._pending, [*self._pending, token_id]
        text = self._decode_after(self._context, self._pending)
        if text == self._pending_text and self._is_silent(token_id, first=not before):
            self._pending = before
            return ""
        self._pending_text = text
        whole = text.rstrip(_UNFINISHED)
        if text and whole == text:
            return self._restart(len(self._pending), text)
        if len(self._pending) > _HELD_LIMIT:
            return self._give_up()
        return self._advance(len(whole))

    def finish(self) -> str:
        """Return the rest as decode gives it: U+FFFD for a character that was cut off."""
        return self._restart(len(self._pending), self._pending_text)

    def _restart(self, taken: int, text: str, rest: str = "") -> str:
        """Release `text`, that of the first `taken` pending ids; `rest` is what the others say."""
        piece = text[self._released :]
        self._released = max(0, self._released - len(text))
        if taken:
            self._context, self._pending = self._pending[:taken], self._pending[taken:]
        self._pending_text = rest
        return piece

    def _advance(self, end: int) -> str:
        """Release the pending text up to `end` and keep its ids: the last one is half released."""
        piece = self._pending_text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def _give_up(self) -> str:
        """Release most of a long run of bytes that aren't characters.

        A cut inside a character adds a U+FFFD, so the cut with the shortest text is between two.
        """
        held = len(self._pending)
        cuts = []
        for taken in range(max(1, held - _HELD_LIMIT), held):
            head = self._decode_after(self._context, self._pending[:taken])
            tail = self._decode(self._pending[taken:])
            cuts.append((len(head) + len(tail), -taken, head, tail))
        length, minus_taken, head, tail = min(cuts)
        if length > len(self._pending_text):
            return ""
        return self._restart(-minus_taken, head, tail)

    def _decode_after(self, context: list[int], ids: list[int]) -> str:
        if not context:
            return self._decode(ids)
        known, text = self._decode(context), self._decode(context + ids)
        # A byte_fallback run that is broken as a whole takes back the characters before the break.
        return text[len(known) :] if text.startswith(known) else self._decode(ids)

    def _is_silent(self, token_id: int, *, first: bool) -> bool:
        """True for special and unknown ids; not for a first space, which has no text but counts."""
        if self._decode([token_id]):
            return False
        at_start = first and not self._context
        return not at_start or bool(self._decode([token_id], skip_special_tokens=False))

    def _decode(self, ids: list[int], skip_special_tokens: bool | None = None) -> str:
        if skip_special_tokens is None:
            skip_special_tokens = self._skip_special_tokens
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
