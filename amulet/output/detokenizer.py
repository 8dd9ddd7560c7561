"""Converts token ids to text while decoding runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What every tokenizer's decode returns for bytes that are not (yet) a character."""

_HELD_LIMIT = 8
"""The number of held tokens from which invalid bytes are given up, piece by piece.

A character has at most four bytes, hence at most four tokens.
"""


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
