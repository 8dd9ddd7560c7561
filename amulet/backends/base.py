"""The seam between decoding and models: above it ids and scores, below it tensors and devices.

A backend computes a batch of *rows*. Row i has consumed some ids; a pass appends ids to rows and
returns logits. How long a row is, whose it is and what it is for is the engine's knowledge alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Snapshot(Protocol):
    """What a backend remembers of a row, for `Backend.load_row`."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class Backend(Protocol):
    """Computes logits for rows of token ids. Only the decode thread calls it, but for `queued`.

    Attributes:
        any_length: whether a row can be copied, kept and written anew at any length. If not, as
            with recurrent state, only at the length that it has, and all rows of a pass get as
            many ids as each other.
        chunk: ids in one pass of a prefill.
        worth_sharing: ids spared, from which a shared beginning is worth a pass of its own.
    """

    any_length: bool
    chunk: int
    worth_sharing: int

    @property
    def model(self) -> Any:
        """The model; what decodes over the same one shares a thread."""

    @property
    def device(self) -> torch.device:
        """Where the logits are."""

    @property
    def nbytes(self) -> int:
        """Bytes that rows hold."""

    def queued(self) -> None:
        """Told in the caller's thread that it is about to wait for the decode thread."""

    def renew(self, tokens: int, idle: bool) -> None:
        """Told before each answer: notice what was changed from outside, such as the dtype.

        Args:
            tokens: how long the answer's longest row may soon be.
            idle: no row is in use, so all memory may be freed.
        """

    def state(self) -> object:
        """Return what the next pass computes with; another object once the weights have changed."""

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many ids; what is there stays.

        Raises:
            Exception: there is no room (`is_out_of_memory`); nothing has changed then.
        """

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
    ) -> torch.Tensor:
        """Append ids to rows: one pass of a prefill.

        Args:
            ids: of every row, as many of each. With `any_length` those at the end may be padding.
            starts: for each row the length that it has; with `any_length` less cuts it.
            first: the first of the rows, which are consecutive.
            keep: after which of the ids logits are wanted.

        Returns:
            Logits `[rows, kept places, vocab]`.
        """

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Append one id, or a few, to each of the first rows: a decode step.

        Returns:
            Logits `[rows, ids per row, vocab]`, which last until the next call.
        """

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        """Return what is held during a step of so many ids, and while its tokens are chosen."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make a row what another one is, up to a length."""

    def save_row(self, row: int, length: int) -> Snapshot:
        """Return a copy of a row, up to a length."""

    def load_row(self, row: int, snapshot: Any, length: int) -> None:
        """Make a row what `save_row` returned, up to a length."""

    def row_bytes(self, length: int) -> int:
        """Bytes of what `save_row` returns for so many ids."""

    def rest(self) -> None:
        """Told that no row is in use: free memory, and forget what users said."""

    def clear(self) -> None:
        """Free all memory, after an error; needs none itself."""
