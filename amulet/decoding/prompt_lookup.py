"""Prompt-lookup drafts: the next tokens are guessed from earlier text with the same n-gram.

An answer about given passages copies from them. A step that checks k guessed tokens costs little
more than a step that decodes one, so correct guesses are nearly free. The answer is unchanged,
because every token is still chosen from its own distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must have occurred before in the same order
NARROW, WIDE = 3, 12  # minimum and maximum length of a draft
LONGEST_PAUSE = 64  # tokens


class Draft:
    """The drafts of one answer; their length adapts to how many guesses were correct.

    Args:
        prompt: ids to search, in addition to the answer.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._ids = list(prompt)
        self._prompt_length = len(self._ids)
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> index after its last place
        self._indexed = NGRAM  # n-grams that end before this index have been entered
        self._width = NARROW
        self._pause = 2
        self._resume_at = 0  # of the answer's length in tokens

    def propose(self, answer: Sequence[int], limit: int) -> list[int]:
        """Return up to `limit` ids that may follow the answer so far; usually none."""
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
        """Adapt to how many of the proposed ids were correct."""
        if accepted == proposed:
            self._width = min(2 * self._width, WIDE)
            self._pause = 2
        elif 2 * accepted < proposed:
            self._width = NARROW
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._resume_at = answer_length + self._pause
