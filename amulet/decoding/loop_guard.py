"""The loop guard: finds tokens that would continue a repetition, and penalises them.

The rule is that of DRY ("don't repeat yourself"): a token that would extend a repeated run loses
likelihood, more for longer runs. Only the answer's own tokens count, so copying from the prompt,
such as from a passage, is free.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST = 0.8  # nats that the first token beyond the limit loses
GROWTH = 1.75  # factor for each further token
MOST = 100.0  # nats: excludes the token if there is any alternative
LEVELS = 10  # tokens beyond the limit from which the penalty is `MOST`


class Repeats:
    """Finds an answer's repetitions.

    Args:
        free: the number of tokens that may be repeated freely, at least 1.
        start: index of the first id that counts; earlier ones are not for the reader.
    """

    def __init__(self, free: int, start: int = 0) -> None:
        self._free = free
        self._start = start
        # Run of `free` ids -> each id that followed it, with the position before it.
        self._seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        self.read = start  # number of ids processed so far

    def costs(self, answer: Sequence[int]) -> dict[int, float]:
        """Return the nats lost by each token that would make a repeated run too long.

        Args:
            answer: the answer's ids, of which only the end is new since the last call.
        """
        free, start, end = self._free, self._start, len(answer)
        for place in range(max(self.read, start + free), end):
            first = max(start, place - free - LEVELS)
            followed = self._seen.setdefault(tuple(answer[place - free : place]), set())
            followed.add(tuple(answer[first : place + 1]))
        self.read = end
        longest: dict[int, int] = {}
        if end - start >= free:
            for *before, token in self._seen.get(tuple(answer[end - free : end]), ()):
                length = free
                while length < len(before) and before[-1 - length] == answer[end - 1 - length]:
                    length += 1
                longest[token] = max(length, longest.get(token, 0))
        return {token: cost_of(length - free) for token, length in longest.items()}


def cost_of(over: int) -> float:
    """Return the nats that a token loses `over` tokens beyond the free repetition."""
    return min(FIRST * GROWTH ** min(over, LEVELS), MOST)
