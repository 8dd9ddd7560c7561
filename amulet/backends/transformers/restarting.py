"""`RestartingBackend`: rows that share passes, but can't always go on from where they are.

Mamba begins its recurrent state anew in each pass of several ids. The rotary embedding "longrope"
is another one beyond some length, for all ids of a row. Where a row can't go on, it is computed
from its first id, as in `generate`; all others still share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel

from amulet.backends.transformers.backend import SavedRow, TransformersBackend
from amulet.backends.transformers.model_backend import WHOLE
from amulet.backends.transformers.support import switches_rope
from amulet.images import PromptImage

FEW = 1 / 4  # of the ids that Mamba has consumed: so many more pass one by one, in less time


class _Way(NamedTuple):
    """How a row is passed, and whether by the rotary embedding of long rows."""

    kind: Literal["on", "one by one", "anew"]
    is_long: bool = False


@dataclass
class _Consumed:
    """A row's ids and images, and whether the ids were rotated as those of a long row."""

    ids: list[int] = field(default_factory=list)
    is_long: bool = False
    images: Sequence[PromptImage] = ()

    @property
    def nbytes(self) -> int:
        return 8 * len(self.ids)

    def copy(self, length: int) -> _Consumed:
        assert length == len(self.ids), f"no such length: {length} of {len(self.ids)} ids"
        return _Consumed(list(self.ids), self.is_long, self.images)


@dataclass(frozen=True)
class _Saved:
    row: SavedRow
    consumed: _Consumed

    @property
    def nbytes(self) -> int:
        return self.row.nbytes + self.consumed.nbytes

    @property
    def parts(self) -> list[Any]:
        return [*self.row.parts, self.consumed]


class RestartingBackend(TransformersBackend):
    """See `Backend`. Steps are neither compiled nor CUDA graphs, and rows are reused only whole.

    Args:
        model: a model that `restarts` accepts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.any_length = False
        self._longest = switches_rope(model)  # of rows that are not long; None: none ever is
        if self._longest is None:
            self.chunk = self.worth_sharing = WHOLE
        self._consumed: dict[int, _Consumed] = {}

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        """See `Backend.forward`: rows that go on alike share a pass."""
        ways = [self._way(row, start, len(ids[0])) for row, start in enumerate(starts, first)]
        groups: list[list[int]] = []
        for place, way in enumerate(ways):
            if groups and way.kind != "anew" and way == ways[groups[-1][-1]]:
                groups[-1].append(place)
            else:
                groups.append([place])
        logits = []
        for group in groups:
            for place in group:
                consumed = self._consumed.setdefault(first + place, _Consumed())
                consumed.ids[starts[place] :] = ids[place]
                consumed.is_long = ways[place].is_long
                consumed.images = images or (consumed.images if starts[place] else ())
            begin, end = group[0], group[-1] + 1
            kind = ways[begin].kind
            part = ids[begin:end], starts[begin:end]
            logits.append(self._go(kind, *part, first + begin, keep, images))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _way(self, row: int, start: int, width: int) -> _Way:
        if self._longest is None:
            if start == 0 or width == 1:
                return _Way("on")
            return _Way("one by one" if width <= FEW * start else "anew")
        is_long = start + width > self._longest
        changes = start > 0 and self._consumed[row].is_long != is_long
        return _Way("anew" if changes else "on", is_long)

    def _go(
        self,
        kind: str,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage],
    ) -> torch.Tensor:
        """Pass rows in one way; see `forward`."""
        consumed = self._consumed[first]
        if kind == "on":
            return super().forward(ids, starts, first, keep, images)
        if kind == "anew":
            kept = [starts[0] + place for place in keep]
            return super().forward([consumed.ids], [0], first, kept, consumed.images)
        found = [
            super(RestartingBackend, self).forward(
                [[new[place]] for new in ids], [start + place for start in starts], first, [0]
            )
            for place in range(len(ids[0]))
        ]
        return torch.cat([found[place] for place in keep], dim=1)

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """See `Backend.step`."""
        return self.forward(ids, starts, 0, range(len(ids[0])))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy one row to another."""
        self._consumed[target] = self._consumed[source].copy(length)
        super().copy_row(source, target, length)

    def save_row(self, row: int, length: int) -> Any:
        """Return a copy of a row."""
        return _Saved(super().save_row(row, length), self._consumed[row].copy(length))

    def load_row(self, row: int, snapshot: Any, length: int) -> None:
        """Put what `save_row` returned into a row."""
        self._consumed[row] = snapshot.consumed.copy(length)
        super().load_row(row, snapshot.row, length)

    def row_bytes(self, length: int) -> int:
        """Bytes of a saved row of `length` ids."""
        return super().row_bytes(length) + 8 * length

    def least(self, row: int) -> int:
        """See `Backend.least`."""
        return len(self._consumed[row].ids)

    def drop(self, first: int) -> None:
        """Let go of the rows from `first` on."""
        super().drop(first)
        self._consumed = {row: held for row, held in self._consumed.items() if row < first}

    def rest(self) -> None:
        """Free memory; see `Backend.rest`."""
        super().rest()
        self._consumed = {}

    def clear(self) -> None:
        """Free all memory."""
        super().clear()
        self._consumed = {}
