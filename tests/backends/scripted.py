"""A backend whose logits are a function of a row's ids: engine tests take microseconds a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from amulet.images import PromptImage

VOCAB = 64


def scores(ids: Sequence[int]) -> torch.Tensor:
    """Return logits `[VOCAB]` that depend on all ids and on their order."""
    state = 1.0
    for place, id_ in enumerate(ids):
        state = math.sin(3.0 * state + id_ + 0.1 * place)
    places = torch.arange(VOCAB, dtype=torch.float64)
    return 4 * torch.sin(places * (1.7 + state))


@dataclass(frozen=True)
class Ids:
    """A saved row."""

    ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 8 * len(self.ids)

    @property
    def parts(self) -> tuple[Ids]:
        return (self,)


class ScriptedBackend:
    """See `amulet.backends.base.Backend`; it checks what it is asked, too.

    Args:
        any_length: False is a recurrent model: its rows can't be cut.
        logits: of the ids of a row.

    Attributes:
        passes: the shapes `(rows, ids per row)` that were asked for.
    """

    chunk = 24
    images_at_once = False
    worth_sharing = 4
    pass_cost = 4
    device = torch.device("cpu")

    def __init__(
        self,
        any_length: bool = True,
        logits: Callable[[Sequence[int]], torch.Tensor] = scores,
    ) -> None:
        self.any_length = any_length
        self.model = self
        self.rows: dict[int, list[int]] = {}
        self.room = 0, 0
        self.passes: list[tuple[int, int]] = []
        self._logits = logits
        self._state = object()

    @property
    def nbytes(self) -> int:
        return 8 * self.room[0] * self.room[1]

    def queued(self) -> None: ...

    def renew(self, tokens: int, idle: bool) -> None: ...

    def state(self) -> object:
        return self._state

    def changed(self) -> None:
        """Be another model from now on."""
        self._state = object()

    def reserve(self, rows: int, tokens: int) -> None:
        self.room = max(self.room[0], rows), max(self.room[1], tokens)

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        self.passes.append((len(ids), len(ids[0])))
        assert len({len(new) for new in ids}) == 1, "rows of a pass have as many ids as each other"
        assert first + len(ids) <= self.room[0]
        found = []
        for i, (new, start) in enumerate(zip(ids, starts, strict=True)):
            row = self.rows.setdefault(first + i, []) if start else []
            assert start <= len(row) if self.any_length else start == len(row), "no such length"
            assert start + len(new) <= self.room[1]
            row = self.rows[first + i] = [*row[:start], *new]
            found.append(torch.stack([self._logits(row[: start + place + 1]) for place in keep]))
        return torch.stack(found)

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        return self.forward(ids, starts, 0, range(len(ids[0])))

    def _cut(self, row: Sequence[int], length: int) -> list[int]:
        assert length <= len(row) if self.any_length else length == len(row), "no such length"
        return list(row[:length])

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.rows[target] = self._cut(self.rows[source], length)

    def save_row(self, row: int, length: int) -> Ids:
        return Ids(tuple(self._cut(self.rows[row], length)))

    def load_row(self, row: int, snapshot: Ids, length: int) -> None:
        self.rows[row] = self._cut(snapshot.ids, length)

    def row_bytes(self, length: int) -> int:
        return 8 * length

    def least(self, row: int) -> int:
        return 0 if self.any_length else len(self.rows[row])

    def drop(self, first: int) -> None:
        self.rows = {row: ids for row, ids in self.rows.items() if row < first}

    def rest(self) -> None:
        self.rows, self.room = {}, (0, 0)

    def clear(self) -> None:
        self.rest()
