"""The recurrent states of rows, which linear attention, Mamba-2 and short convolutions need.

A state contains all that its layer needs from the ids consumed so far. It can be copied, but not
truncated to fewer ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad


class Place(NamedTuple):
    """The key of a state: "conv" or "recurrent", the layer, and the state's number in it."""

    kind: str
    layer: int
    number: int


class RowStates:
    """The states of all rows, a tensor `[rows, ...]` per place; created by a row's first pass."""

    def __init__(self) -> None:
        self._states: dict[Place, torch.Tensor] = {}
        self._rows = 0
        self._lengths: dict[int, int] = {}  # ids that each row has consumed
        self._pass = slice(0, 0)
        self._begun = False

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows, keeping the present states; fewer rows never fail."""
        for place, state in self._states.items():  # one by one: never all of them twice
            self._states[place] = _resized(state, rows)
        self._rows = rows

    def begin(self, first: int, starts: Sequence[int], width: int) -> None:
        """Set the rows of the next pass; those that start at 0 have no state yet."""
        for row, start in enumerate(starts, first):
            if start:
                self._check(row, start)
            self._lengths[row] = start + width
        self._pass = slice(first, first + len(starts))
        self._begun = any(starts)
        fresh = [first + i for i, start in enumerate(starts) if not start]
        for state in self._states.values() if self._begun and fresh else ():
            state[fresh] = 0  # a layer's initial state

    def get(self, place: Place) -> torch.Tensor | None:
        """Return the states of the pass's rows, `[rows, ...]`, to read or to update in place.

        None if none of them has one.
        """
        state = self._states.get(place) if self._begun else None
        return None if state is None else state[self._pass]

    def update(self, place: Place, new: torch.Tensor) -> torch.Tensor:
        """Replace the states of the pass's rows, `[rows, ...]`; return them."""
        room = self._room(place, new[0])[self._pass]
        room.copy_(new)
        return room

    def extend(self, place: Place, new: torch.Tensor, size: int | None) -> torch.Tensor:
        """Append a convolution's inputs `[rows, channels, width]`; keep the last `size` of them.

        Returns:
            The kept inputs followed by the new ones, at least `size`.
        """
        before = self.get(place)
        size = new.shape[-1] if size is None else size
        whole = new if before is None else torch.cat([before, new], dim=-1)
        whole = pad(whole, (max(size - whole.shape[-1], 0), 0))
        self.update(place, whole[..., -size:])
        return whole

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy a row's states after its first `length` ids to another row."""
        self._check(source, length)
        self._lengths[target] = length
        for state in self._states.values():
            state[target] = state[source]

    def row(self, row: int, length: int) -> dict[Place, torch.Tensor]:
        """Return copies of a row's states after its first `length` ids."""
        self._check(row, length)
        return {place: state[row].clone() for place, state in self._states.items()}

    def write_row(self, row: int, states: Mapping[Place, torch.Tensor], length: int) -> None:
        """Restore states returned by `row`."""
        self._lengths[row] = length
        for place, state in states.items():
            self._room(place, state)[row] = state

    def least(self, row: int) -> int:
        """Return the fewest ids to which a row can be cut back: all that it has consumed."""
        return self._lengths[row] if self._states else 0

    def blank(self) -> None:
        """Erase all states, but keep the memory."""
        for state in self._states.values():
            state.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(state.nbytes for state in list(self._states.values()))  # a pass may add some

    def _check(self, row: int, length: int) -> None:
        consumed = self._lengths.get(row, 0)
        assert not self._states or length == consumed, f"no such length: {length} of {consumed} ids"

    def _room(self, place: Place, like: torch.Tensor) -> torch.Tensor:
        state = self._states.get(place)
        if state is None:
            state = self._states[place] = like.new_zeros((self._rows, *like.shape))
        return state


def _resized(state: torch.Tensor, rows: int) -> torch.Tensor:
    if rows <= len(state):
        return state[:rows]
    made = state.new_zeros((rows, *state.shape[1:]))
    made[: len(state)] = state
    return made
