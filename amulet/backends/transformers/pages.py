"""Rows of the KV cache in pages: rows with the same beginning share its pages.

For the C code (`cpu/layers.py`), which reads a shared page once for all of its rows. A page that
rows share is never written again: a row that continues in it first gets a copy. So shared pages
need no count of their users; the last row or kept row that lets go of a page frees it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from amulet.backends.transformers.cache import RowsInPass
from amulet.backends.transformers.states import RowStates

PAGE = 64  # columns of a page, as in `native/pages.h`
TRIMMED = 2**26  # bytes of pages, from which returning them to the system is worth its time
BLOCK = 4  # pages that a task of the C code attends to, as in `native/pages.h`

_system: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


class PageKind(NamedTuple):
    """What the pages of a model's rows hold."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def pair(self) -> int:
        """How many numbers are together in a word: two of bfloat16."""
        return 2 if self.dtype.itemsize == 2 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return 2 * self.layers * self.heads * PAGE * self.dim * self.dtype.itemsize


class Page:
    """`PAGE` columns of keys and values of all layers.

    Attributes:
        numbers: `[2, layers, kv_heads, PAGE * dim]`, in the layout of `native/tiles.h`.
        address: of the numbers.
        shared: whether several rows may have it, so that it may not change.
    """

    __slots__ = ("address", "numbers", "shared")

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers, self.address = numbers, numbers.data_ptr()
        self.shared = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.numbers.nbytes

    def keys(self, kind: PageKind, layer: int) -> torch.Tensor:
        """Return a view of a layer's keys, `[kv_heads, PAGE, dim / pair, pair]`."""
        words = self.numbers[0, layer].view(kind.heads, -1, PAGE, kind.pair)
        return words.transpose(1, 2)

    def values(self, kind: PageKind, layer: int) -> torch.Tensor:
        """Return a view of a layer's values, `[kv_heads, PAGE / pair, pair, dim]`."""
        words = self.numbers[1, layer].view(kind.heads, -1, kind.dim, kind.pair)
        return words.transpose(2, 3)


class PagesInC(ctypes.Structure):
    """`struct pages` of `native/pages.h`."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("layers", "most", "count", "blocks")),
        *((name, ctypes.c_void_p) for name in ("table", "places", "tasks", "next")),
    ]


class PageCache(RowsInPass):
    """Keys and values of all rows, in pages.

    Args:
        kind: of its pages.

    Attributes:
        states: none; models with recurrent states have a `RowCache`.
    """

    def __init__(self, kind: PageKind) -> None:
        super().__init__()
        self.kind = kind
        self.states = RowStates()
        self._rows: list[list[Page]] = []
        self._planned: tuple[int, int] | None = None  # the rows of which `in_c` knows the pages
        self.in_c = PagesInC()
        self._held: tuple[torch.Tensor, ...] = ()  # what `in_c` points to
        self._made = 0  # bytes of pages since the heap was last trimmed

    # The engine's side

    def reserve(self, rows: int, columns: int) -> None:
        """Do nothing: a pass allocates its pages, all or none, before it computes."""

    def begin(self, first: int, starts: Sequence[int], width: int) -> None:
        """Set where the next pass writes, and give its rows pages there; see `RowsInPass.begin`.

        All or nothing: after an error no row has changed.
        """
        self._rows += [[] for _ in range(first + len(starts) - len(self._rows))]
        changed: dict[int, list[Page]] = {}
        for row, start in enumerate(starts, first):
            have, written, count = self._rows[row], start // PAGE, -(-(start + width) // PAGE)
            assert len(have) * PAGE >= start, f"row {row} has {len(have)} pages, not {start} tokens"
            if len(have) == count and not any(page.shared for page in have[written:]):
                continue
            kept = have[:count]
            for i in range(written, count):
                if i >= len(kept):
                    kept.append(self._new())
                elif kept[i].shared:
                    partly = i == written and start % PAGE
                    kept[i] = self._copy(kept[i], start % PAGE) if partly else self._new()
            changed[row] = kept
        if changed:
            self._planned = None  # here, as an error below leaves the old plan
        for row, pages in changed.items():
            self._rows[row] = pages
        super().begin(first, starts, width)
        if changed or self._planned != (first, len(starts)):
            self._plan(first, len(starts))
        self.in_c.places = self._positions.data_ptr()

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the pages of the first `length` tokens of another."""
        self.write_row(target, self.row(source, length), length)

    def row(self, row: int, length: int) -> tuple[Page, ...]:
        """Return the pages of a row's first `length` tokens, for `write_row`."""
        pages = tuple(self._rows[row][: -(-length // PAGE)])
        for page in pages:
            page.shared = True
        return pages

    def write_row(self, row: int, pages: Sequence[Any], length: int) -> None:
        """Let a row begin with the first `length` tokens of what `row` returned."""
        self._rows += [[] for _ in range(row + 1 - len(self._rows))]
        self._rows[row] = list(pages[: -(-length // PAGE)])
        self._planned = None

    def row_bytes(self, length: int) -> int:
        """Bytes of what `row` returns for `length` tokens."""
        return -(-length // PAGE) * self.kind.nbytes

    def drop(self, first: int) -> None:
        """Let go of the rows from `first` on."""
        del self._rows[first:]
        self._planned = None

    def blank(self) -> None:
        """Let go of all rows, and return the memory of many pages to the system.

        The heap would keep them: other memory lies between them, and kept rows have some of them.
        """
        self.drop(0)
        if self._made >= TRIMMED and hasattr(_system, "malloc_trim"):  # not in each C library
            self._made = 0
            _system.malloc_trim(0)

    free = clear = blank

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' pages, each counted once."""
        return len({id(page) for pages in self._rows for page in pages}) * self.kind.nbytes

    @property
    def capacity(self) -> tuple[int, int]:
        """The number of rows, and of the columns of the longest."""
        return len(self._rows), PAGE * max(map(len, self._rows), default=0)

    def _new(self) -> Page:
        """Return an empty page. Zeros, as a masked column is still multiplied by a weight of 0."""
        kind = self.kind
        size = 2, kind.layers, kind.heads, PAGE * kind.dim
        self._made += kind.nbytes
        return Page(torch.zeros(size, dtype=kind.dtype))

    def _copy(self, page: Page, length: int) -> Page:
        """Return a copy of a page's first `length` columns.

        The others may be another user's. Though masked, a value is multiplied by a weight of 0,
        which makes NaN of infinity.
        """
        kind, copy = self.kind, Page(page.numbers.clone())
        keys = copy.numbers[0].view(-1, kind.dim // kind.pair, PAGE, kind.pair)
        values = copy.numbers[1].view(-1, PAGE // kind.pair, kind.dim, kind.pair)
        keys[:, :, length:] = 0
        values[:, -(-length // kind.pair) :] = 0
        if length % kind.pair:
            values[:, length // kind.pair, :, 1] = 0
        return copy

    def _plan(self, first: int, count: int) -> None:
        """Tell the C code the rows' pages, and which rows share which blocks of them."""
        self._planned = None
        rows = self._rows[first : first + count]
        most = max(map(len, rows))
        blocks = -(-most // BLOCK)
        table = [[page.address for page in pages] + [0] * (most - len(pages)) for pages in rows]
        following = [[-1] * count for _ in range(blocks)]
        tasks: list[tuple[int, int]] = []
        for block in range(blocks):
            last: dict[tuple[int, ...], int] = {}  # the last row with these pages
            for row, pages in enumerate(rows):
                part = tuple(table[row][block * BLOCK : (block + 1) * BLOCK])
                if len(pages) <= block * BLOCK:
                    continue
                if part in last:
                    following[block][last[part]] = row
                else:
                    tasks.append((block, row))
                last[part] = row
        self._held = (
            torch.tensor(table, dtype=torch.long),
            torch.tensor(tasks, dtype=torch.int32),
            torch.tensor(following, dtype=torch.int32),
        )
        self.in_c = PagesInC(self.kind.layers, most, len(tasks), blocks)
        self.in_c.table, self.in_c.tasks, self.in_c.next = (t.data_ptr() for t in self._held)
        self._planned = first, count

    # The model's side: its own code, where a layer can't be C code

    def __len__(self) -> int:
        return self.kind.layers

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the pass's keys and values `[rows, kv_heads, width, dim]`; return all columns."""
        kind, found = self.kind, []
        rows = self._rows[self._first : self._first + len(self._starts)]
        for states, name in ((key_states, "keys"), (value_states, "values")):
            gathered = states.new_zeros(len(rows), kind.heads, self.columns, kind.dim)
            for row, (pages, start) in enumerate(zip(rows, self._starts, strict=True)):
                end = start + self._width
                for i, page in enumerate(pages):
                    begin, words = i * PAGE, getattr(page, name)(kind, layer_idx)
                    columns = words.reshape(kind.heads, PAGE, kind.dim)
                    low, high = max(start - begin, 0), min(end - begin, PAGE)
                    if low < high:
                        columns = columns.clone()  # it may be a view or a copy
                        columns[:, low:high] = states[
                            row, :, begin + low - start : begin + high - start
                        ]
                        words.copy_(columns.view(words.shape))
                    room = gathered[row, :, begin : begin + PAGE]
                    room.copy_(columns[:, : room.shape[1]])
            found.append(gathered)
        return found[0], found[1]
