"""Rows of finished answers, kept for later prompts with the same prefix.

The next turn of a conversation repeats the whole conversation, so only the new part needs a
prefill. Entries are found by their ids alone: a prompt can only reuse ids that it contains itself.
`Engine._reuse` copies them into rows, and the prefixes of running requests as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amulet.backends.base import Snapshot

LEAST = 16  # computing shorter prefixes again is faster than keeping them


@dataclass(frozen=True)
class KeptRow:
    """One row's ids, the backend's snapshot of it, and how few of the ids it can be cut back to."""

    ids: tuple[int, ...]
    saved: Snapshot
    least: int = 0


class Prefixes:
    """The most recently used rows, up to a number of bytes.

    Args:
        limit: bytes that may be held; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rows: list[KeptRow] = []  # the most recently used last

    @property
    def nbytes(self) -> int:
        """Bytes held; what rows share counts once."""
        parts = {id(part): part.nbytes for row in self._rows for part in row.saved.parts}
        return sum(parts.values())

    def takes(self, length: int, nbytes: int) -> bool:
        """Tell whether a row of `length` ids and `nbytes` bytes would be kept."""
        return length >= LEAST and nbytes <= self.limit

    def keep(self, row: KeptRow) -> None:
        """Add a row; rows that it replaces, then the least recently used, make room for it."""
        if not self.takes(len(row.ids), row.saved.nbytes):
            return
        begun = [kept for kept in self._rows if row.ids[: len(kept.ids)] == kept.ids]
        # Either the new row can be cut back as far, or a shorter one goes as far as it can be.
        unneeded = {
            id(kept)
            for kept in begun
            if row.least <= kept.least
            or any(
                len(other.ids) < len(kept.ids)
                and other.least <= kept.least
                and row.least <= len(other.ids) + 1
                for other in begun
            )
        }
        self._rows = [kept for kept in self._rows if id(kept) not in unneeded]
        self._rows.append(row)
        while self.nbytes > self.limit:
            self._rows.pop(0)

    def find(self, ids: Sequence[int]) -> tuple[KeptRow | None, int]:
        """Return the row with the longest usable prefix of a prompt, and the prefix's length.

        The prompt's last id counts, but can't be used: its logits are needed.
        """
        best, length = None, 0
        for row in self._rows:
            shared = shared_length(row.ids, ids)
            if shared > length and min(shared, len(ids) - 1) >= row.least:
                best, length = row, shared
        if best is None or length < LEAST:
            return None, 0
        self._rows.remove(best)
        self._rows.append(best)
        return best, length

    def seen(self, ids: Sequence[int]) -> int:
        """Return how many of a prompt's first ids a row begins with that may be unusable there."""
        rows = (row for row in self._rows if row.least)  # `find` finds all others
        return max((shared_length(row.ids, ids) for row in rows), default=0)

    def clear(self) -> None:
        """Discard all rows."""
        self._rows.clear()


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of two sequences' common prefix."""
    shortest = min(len(one), len(other))
    if tuple(one[:shortest]) == tuple(other[:shortest]):
        return shortest
    low, high = 0, shortest  # bisect: comparing slices is much faster than a loop over the ids
    while low < high:
        middle = (low + high + 1) // 2
        if tuple(one[:middle]) == tuple(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low
