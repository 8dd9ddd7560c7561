"""Prompt-lookup drafts: guesses of the next tokens, read from where the same words stood before.

An answer about given passages copies from them. A step that checks k guessed tokens costs little
more than one that decodes a single token, so right guesses are nearly free; what is decoded stays
what it would have been, as every token is chosen from its own distribution all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must have stood before in the same order
NARROW, WIDE = 3, 12  # least and most tokens of a draft
LONGEST_PAUSE = 64  # tokens


class Draft:
    """The drafts of one answer, as long as they have lately turned out right.

    Args:
        prompt: ids in which to look, besides the answer itself.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = list(prompt)
        self._prompt_length = len(self._ids)
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> index behind its latest
        self._indexed = NGRAM  # n-grams that end before this index are known
        self._width = NARROW
        self._pause = 2
        self._resume_at = 0  # of the answer's length in tokens

    def propose(self, answer: Sequence[int], limit: int) -> list[int]:
        """Return up to `limit` ids that may follow the answer so far; mostly none."""
        if len(answer) < self._resume_at or limit < 1:
            return []
        self._ids[self._prompt_length :] = answer
        # The n-gram at the end is not entered: it would only find itself.
        for end in range(self._indexed, len(self._ids)):
            self._followers[tuple(self._ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(self._ids))
        start = self._followers.get(tuple(self._ids[-NGRAM:]))
        return [] if start is None else self._ids[start : start + min(self._width, limit)]

    def learn(self, proposed: int, accepted: int, answer_length: int) -> None:
        """Take note of how many of the proposed ids were decoded indeed."""
        if accepted == proposed:
            self._width = min(2 * self._width, WIDE)
            self._pause = 2
        elif 2 * accepted < proposed:
            self._width = NARROW
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._resume_at = answer_length + self._pause
