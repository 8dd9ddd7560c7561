"""Rows of the KV cache in pages: rows with the same beginning share its pages.

For the C code (`cpu/layers.py`), which reads a shared page once for all of its rows. A page that
rows share is never written again: a row that continues in it first gets a copy. So shared pages
need no count of their users; the last row or kept row that lets go of a page frees it.

Layers with a sliding window have pages of their own, and a row drops those that it can't see again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from amulet.backends.transformers.cache import RowsInPass
from amulet.backends.transformers.states import RowStates

PAGE = 64  # columns of a page, as in `native/pages.h`
TRIMMED = 2**26  # bytes of pages, from which returning them to the system is worth its time
BEHIND = 2048  # columns that a row keeps before its window: cut back into them, it can be reused
BLOCK = 4  # pages that a task of the C code attends to, as in `native/pages.h`

_system: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


class PageKind(NamedTuple):
    """What the pages of some layers of a model's rows hold."""

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
    """`PAGE` columns of keys and values of some layers.

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


Pages: TypeAlias = list[Page | None]  # of a row: None where it has dropped one


class PagesInC(ctypes.Structure):
    """`struct pages` of `native/pages.h`."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("layers", "most", "count", "blocks")),
        *((name, ctypes.c_void_p) for name in ("table", "places", "tasks", "next")),
    ]


class LayerPages:
    """The rows' pages of those layers that see equally many columns.

    Args:
        kind: of the pages.
        window: how many columns the layers see at most; 0 is all.

    Attributes:
        rows: the pages of each row. All kinds of layers have equally many, dropped ones included.
        made: bytes of pages since the heap was last trimmed.
    """

    def __init__(self, kind: PageKind, window: int = 0) -> None:
        self.kind, self.window = kind, window
        self.rows: list[Pages] = []
        self.made = 0
        self.in_c = PagesInC()
        self._planned: tuple[int, int] | None = None  # the rows of which `in_c` knows the pages
        self._held: tuple[torch.Tensor, ...] = ()  # what `in_c` points to

    def changes(self, first: int, starts: Sequence[int], width: int) -> dict[int, Pages]:
        """Return new lists of pages for those rows that a pass needs to have others."""
        changed: dict[int, Pages] = {}
        for row, start in enumerate(starts, first):
            have, written, count = self.rows[row], start // PAGE, -(-(start + width) // PAGE)
            dropped = self.dropped(start)
            assert len(have) * PAGE >= start, f"row {row} has {len(have)} pages, not {start} tokens"
            needed = max(start + 1 - self.window, 0) // PAGE if self.window else 0
            assert not start or have[min(needed, len(have) - 1)] is not None, (
                f"row {row} has dropped what {start} tokens need"
            )
            if (
                len(have) == count
                and not any(page is None or page.shared for page in have[written:])
                and (not dropped or have[dropped - 1] is None)
            ):
                continue
            kept = have[:count]
            kept[:dropped] = [None] * dropped
            for i in range(written, count):
                page = kept[i] if i < len(kept) else None
                if page is None:
                    kept[i : i + 1] = [self._new()]
                elif page.shared:
                    partly = i == written and start % PAGE
                    kept[i] = self._copy(page, start % PAGE) if partly else self._new()
            changed[row] = kept
        if changed:
            self.forget()  # here, as an error leaves the old plan
        return changed

    def dropped(self, length: int) -> int:
        """Return how many pages a row of so many tokens drops, whole blocks."""
        behind = length + 1 - self.window - BEHIND
        return max(behind // (BLOCK * PAGE), 0) * BLOCK if self.window else 0

    def least(self, row: int) -> int:
        """Return the fewest tokens that a row can be cut back to."""
        pages = self.rows[row]
        if not self.window or not pages or pages[0] is not None:
            return 0
        dropped = next((i for i, page in enumerate(pages) if page is not None), len(pages))
        return dropped * PAGE + self.window - 1

    def row_pages(self, length: int) -> int:
        """Return how many pages a row of so many tokens holds."""
        return -(-length // PAGE) - self.dropped(max(length - 1, 0))

    def forget(self) -> None:
        """Make `plan` tell the C code all pages anew."""
        self._planned = None

    def _new(self) -> Page:
        """Return an empty page. Zeros, as a masked column is still multiplied by a weight of 0."""
        kind = self.kind
        size = 2, kind.layers, kind.heads, PAGE * kind.dim
        self.made += kind.nbytes
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

    def plan(self, first: int, count: int) -> None:
        """Tell the C code the rows' pages, and which rows share which blocks of them."""
        if self._planned == (first, count):
            return
        self._planned = None
        rows = self.rows[first : first + count]
        most = max(map(len, rows))
        blocks = -(-most // BLOCK)
        table = [
            [0 if page is None else page.address for page in pages] + [0] * (most - len(pages))
            for pages in rows
        ]
        following = [[-1] * count for _ in range(blocks)]
        tasks: list[tuple[int, int]] = []
        for block in range(blocks):
            last: dict[tuple[int, ...], int] = {}  # the last row with these pages
            for row in range(count):
                part = tuple(table[row][block * BLOCK : (block + 1) * BLOCK])
                if not part[0]:  # behind the row's end, or dropped
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

    def write(
        self, layer: int, first: int, starts: Sequence[int], states: torch.Tensor, name: str
    ) -> torch.Tensor:
        """Write new keys or values; return those of all columns of the rows.

        Args:
            layer: among those of these pages.
            first: the first row.
            starts: for each row the column of its first new token.
            states: `[rows, kv_heads, width, dim]`.
            name: "keys" or "values".
        """
        kind, width = self.kind, states.shape[2]
        columns = max(starts) + width
        gathered = states.new_zeros(len(starts), kind.heads, columns, kind.dim)
        for row, (pages, start) in enumerate(zip(self.rows[first:], starts, strict=False)):
            end = start + width
            for i, page in enumerate(pages):
                if page is None:  # no token sees it any more
                    continue
                begin, words = i * PAGE, getattr(page, name)(kind, layer)
                found = words.reshape(kind.heads, PAGE, kind.dim)
                low, high = max(start - begin, 0), min(end - begin, PAGE)
                if low < high:
                    found = found.clone()  # it may be a view or a copy
                    found[:, low:high] = states[row, :, begin + low - start : begin + high - start]
                    words.copy_(found.view(words.shape))
                room = gathered[row, :, begin : begin + PAGE]
                room.copy_(found[:, : room.shape[1]])
        return gathered


class PageCache(RowsInPass):
    """Keys and values of all rows, in pages.

    Args:
        kind: of all layers' pages.
        windows: how many columns each layer sees at most, 0 for all; by default all see all.

    Attributes:
        by_window: the pages of the layers without a window, then of those with one.
        states: none; models with recurrent states have a `RowCache`.
    """

    def __init__(self, kind: PageKind, windows: Sequence[int] = ()) -> None:
        super().__init__()
        self.kind = kind
        self.states = RowStates()
        windows = windows or [0] * kind.layers
        self.by_window = [
            LayerPages(kind._replace(layers=windows.count(window)), window)
            for window in sorted(set(windows) or {0})
        ]
        found = {pages.window: pages for pages in self.by_window}
        self._of_layer = [
            (found[window], windows[:layer].count(window)) for layer, window in enumerate(windows)
        ]

    def of_layer(self, layer: int) -> tuple[LayerPages, int]:
        """Return a layer's pages, and its index in them.

        Raises:
            IndexError: there is no such layer.
        """
        if layer >= len(self):
            raise IndexError(f"no room for layer {layer} in pages of {len(self)} layers")
        return self._of_layer[layer]

    # The engine's side

    def reserve(self, rows: int, columns: int) -> None:
        """Do nothing: a pass allocates its pages, all or none, before it computes."""

    def begin(self, first: int, starts: Sequence[int], width: int) -> None:
        """Set where the next pass writes, and give its rows pages there; see `RowsInPass.begin`.

        After an error no row has lost a token before its start in the pass, or got one.
        """
        for pages in self.by_window:
            pages.rows += [[] for _ in range(first + len(starts) - len(pages.rows))]
        changes = [pages.changes(first, starts, width) for pages in self.by_window]
        for pages, changed in zip(self.by_window, changes, strict=True):
            for row, others in changed.items():
                pages.rows[row] = others
        super().begin(first, starts, width)
        for pages in self.by_window:
            pages.plan(first, len(starts))
            pages.in_c.places = self._positions.data_ptr()

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Let a row begin with the pages of the first `length` tokens of another."""
        self.write_row(target, self.row(source, length), length)

    def row(self, row: int, length: int) -> tuple[Page | None, ...]:
        """Return the pages of a row's first `length` tokens, for `write_row`."""
        count = -(-length // PAGE)
        found = tuple(page for pages in self.by_window for page in pages.rows[row][:count])
        for page in found:
            if page is not None:
                page.shared = True
        return found

    def write_row(self, row: int, pages: Sequence[Any], length: int) -> None:
        """Let a row begin with the first `length` tokens of what `row` returned."""
        have, count = len(pages) // len(self.by_window), -(-length // PAGE)
        for i, of_layers in enumerate(self.by_window):
            of_layers.rows += [[] for _ in range(row + 1 - len(of_layers.rows))]
            of_layers.rows[row] = list(pages[i * have : i * have + count])
            of_layers.forget()

    def row_bytes(self, length: int) -> int:
        """Bytes of what `row` returns for `length` tokens."""
        return sum(pages.row_pages(length) * pages.kind.nbytes for pages in self.by_window)

    def least(self, row: int) -> int:
        """Return the fewest tokens that a row can be cut back to."""
        return max(pages.least(row) for pages in self.by_window)

    def drop(self, first: int) -> None:
        """Let go of the rows from `first` on."""
        for pages in self.by_window:
            del pages.rows[first:]
            pages.forget()

    def blank(self) -> None:
        """Let go of all rows, and return the memory of many pages to the system.

        The heap would keep them: other memory lies between them, and kept rows have some of them.
        """
        self.drop(0)
        made = sum(pages.made for pages in self.by_window)
        if made >= TRIMMED and hasattr(_system, "malloc_trim"):  # not in each C library
            for pages in self.by_window:
                pages.made = 0
            _system.malloc_trim(0)

    free = clear = blank

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' pages, each counted once."""
        held = {
            id(page): page.nbytes
            for of_layers in self.by_window
            for pages in of_layers.rows
            for page in pages
            if page is not None
        }
        return sum(held.values())

    @property
    def capacity(self) -> tuple[int, int]:
        """The number of rows, and of the columns of the longest."""
        rows = self.by_window[0].rows
        return len(rows), PAGE * max(map(len, rows), default=0)

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
        pages, layer = self.of_layer(layer_idx)
        at = layer, self._first, self._starts
        return pages.write(*at, key_states, "keys"), pages.write(*at, value_states, "values")
