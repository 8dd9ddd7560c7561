"""Finds stop sequences in a growing text, also those with special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from amulet.prompting.chat_template import token_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = re.compile("[\ud800-\udfff]")


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
