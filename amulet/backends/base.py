"""The interface between decoding and models: above it ids and scores, below tensors and devices.

A backend computes a batch of *rows*. Row i has consumed some ids; a pass appends ids to rows and
returns logits. Only the engine knows each row's length, owner and purpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from amulet.images import PromptImage


class Snapshot(Protocol):
    """A saved row, for `Backend.load_row`."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def parts(self) -> Sequence[Any]:
        """What it consists of, each with its `nbytes`; other snapshots may have some of it, too."""


class Backend(Protocol):
    """Computes logits for rows of token ids. Only the decode thread calls it, except `queued`.

    Attributes:
        any_length: whether a row can be cut back by some ids, such as padding. If not, as with
            recurrent state, all rows of a pass get the same number of ids; see `least`.
        chunk: ids in one pass of a prefill.
        images_at_once: whether the columns of an image must be in one pass.
        pass_cost: the time that a pass takes besides that for its ids, in ids.
        worth_sharing: the number of ids saved from which a shared prefix is worth its own pass.
    """

    any_length: bool
    chunk: int
    images_at_once: bool
    pass_cost: int
    worth_sharing: int

    @property
    def model(self) -> Any:
        """The model; drivers of the same model share a decode thread."""

    @property
    def device(self) -> torch.device:
        """Where the logits are."""

    @property
    def nbytes(self) -> int:
        """Bytes that rows hold."""

    def queued(self) -> None:
        """Called in the caller's thread before it waits for the decode thread."""

    def renew(self, tokens: int, idle: bool) -> None:
        """Called before each answer: detect changes from outside, such as a new dtype.

        Args:
            tokens: the length that the answer's longest row may soon have.
            idle: no row is in use, so all memory may be freed.
        """

    def state(self) -> object:
        """Return an object that identifies the weights; replaced whenever the weights change."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` rows of `tokens` ids, keeping the present contents.

        Raises:
            Exception: out of memory (`is_out_of_memory`); nothing has changed then.
        """

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        """Append ids to rows: one pass of a prefill.

        Args:
            ids: for every row, the same number of ids. With `any_length` the last may be padding.
            starts: each row's current length; with `any_length` a smaller value truncates the row.
            first: the first of the rows, which are consecutive.
            keep: indices of the ids after which logits are needed.
            images: whose columns the negative ones among the ids are.

        Returns:
            Logits `[rows, kept ids, vocab]`.
        """

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Append one id, or a few, to each of the first rows: a decode step.

        Returns:
            Logits `[rows, ids per row, vocab]`, valid until the next call.
        """

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        """Return a context to hold during a step of `tokens` ids and the choice of its tokens."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` ids of a row to another row."""

    def save_row(self, row: int, length: int) -> Snapshot:
        """Return a copy of the first `length` ids of a row."""

    def load_row(self, row: int, snapshot: Any, length: int) -> None:
        """Restore the first `length` ids of a saved row."""

    def row_bytes(self, length: int) -> int:
        """Bytes of a saved row of `length` ids."""

    def least(self, row: int) -> int:
        """Return the fewest ids of a row that can be copied, saved, or gone on from.

        0 where all is kept; a recurrent state is only what all of the row's ids have made it.
        """

    def drop(self, first: int) -> None:
        """Called when the rows from `first` on are no longer in use."""

    def rest(self) -> None:
        """Called when no row is in use: free memory, and erase the rows' contents."""

    def clear(self) -> None:
        """Free all memory, after an error, without allocating any."""
