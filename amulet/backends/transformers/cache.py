"""Rows of the KV cache: column = position, so rows join, leave and share a prefix without padding.

Token number t of a row is in column t of the row's keys and values, independent of other rows.
Only the engine knows a row's length: columns beyond it are stale, masked, and overwritten when the
row reaches them. This is the only file that uses Transformers' cache API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

from amulet.backends.transformers.masks import (
    INDEXED,
    Masks,
    additive_dtype,
    by_kind,
    column_mask,
    reach,
)
from amulet.backends.transformers.states import Place, RowStates

COLUMN_STEP = 256  # capacity grows in steps of this many tokens: rarely, and never once per token
GPU_COLUMN_STEP = 512  # each growth invalidates the CUDA graphs


class ColumnCache(Cache):
    """Transformers' cache interface where columns are positions; subclasses hold the buffers."""

    _keys: Sequence[torch.Tensor | None]

    @property
    def columns(self) -> int:
        """How many columns the pass attends over."""
        raise NotImplementedError

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        """Position of the pass's first token."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns attended over, and the first of them."""
        return self.columns, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum: `RowCache.reserve` grows the buffers."""
        return -1

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def is_compileable(self) -> bool:
        """False: `CompiledStep` compiles passes over `StepCache`, not Transformers."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """False: sliding layers keep all columns too; their mask hides those outside the window."""
        return [False] * max(len(self), 1)


class BufferKind(NamedTuple):
    """The shape and type of a layer's keys or values, for any number of rows and columns."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, rows: int, columns: int) -> torch.Tensor:
        """Return a buffer `[rows, heads, columns, dim]`.

        Zeros, because a masked column may still be multiplied by a weight of 0.
        """
        shape = rows, self.heads, columns, self.dim
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


def _kind(buffer: torch.Tensor) -> BufferKind:
    return BufferKind(buffer.shape[1], buffer.shape[3], buffer.dtype, buffer.device)


_NO_POSITIONS = torch.zeros(1, 1, dtype=torch.long)  # made here: `clear` must need no memory


class RowsInPass(ColumnCache):
    """Rows that start a pass at positions of their own.

    Attributes:
        causal: whether no token of the pass attends to a later one.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.causal = True
        self._first, self._starts, self._width = 0, [0], 0
        self._positions = _NO_POSITIONS

    def begin(self, first: int, starts: Sequence[int], width: int) -> None:
        """Set where the next forward pass writes.

        Args:
            first: the first row of the pass; it covers `len(starts)` consecutive rows.
            starts: for each row the column of its first new token.
            width: how many tokens each row gets.
        """
        self._first, self._starts, self._width = first, list(starts), width
        self._positions = torch.tensor(self._starts)[:, None] + torch.arange(width)

    @property
    def positions(self) -> torch.Tensor:
        """Positions of the tokens of the pass, `[rows, width]`, on the CPU."""
        return self._positions

    @property
    def columns(self) -> int:
        """The number of columns that the pass attends over."""
        return max(self._starts) + self._width

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the pass; only asked where all rows start alike."""
        return self._starts[0]

    def masks(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        causal_behind_cached: bool = False,
        also: torch.Tensor | None = None,
    ) -> Masks:
        """Return the attention mask of the pass in the form that the model's forward expects.

        A tensor `[rows, 1, width, columns]`, or a dict of them by layer type for models that mix
        full and sliding attention; None where plain causal attention is already right. `also` is as
        for `column_mask`.
        """
        self.causal = also is None
        text = config.get_text_config()
        additive = additive_dtype(config, dtype)
        level = len(set(self._starts)) == 1  # all rows at the same position
        causal = level and (self._width == 1 or self._starts[0] == 0 or causal_behind_cached)

        def mask(kind: str) -> torch.Tensor | None:
            within = self.columns <= (reach(kind, text) or self.columns)
            skips = additive is None and also is None and kind != INDEXED  # an indexer reads it
            if causal and within and skips:
                return None
            positions = self._positions.to(device)
            return column_mask(kind, text, positions, self.columns, additive, also)

        return by_kind(text, mask)


class RowCache(RowsInPass):
    """Keys and values of all rows, one buffer `[rows, kv_heads, columns, head_dim]` per layer.

    An indexer's keys, where a layer has one, are a third buffer, of one head.

    Args:
        column_step: capacity grows in steps of this many tokens.

    Attributes:
        layout: an object that is replaced whenever the buffers are reallocated.
        states: recurrent states of all rows, of the layers that have such.
    """

    def __init__(self, column_step: int = COLUMN_STEP) -> None:
        super().__init__()
        self.layout = object()
        self._column_step = column_step
        self._keys: list[torch.Tensor | None] = []
        self._values: list[torch.Tensor | None] = []
        self._indexed: list[torch.Tensor | None] = []
        self._capacity = (0, 0)
        self._known: tuple[list[BufferKind | None], ...] = [], [], []  # the buffers as they were
        self.states = RowStates()

    @property
    def _lists(self) -> tuple[list[torch.Tensor | None], ...]:
        """All buffers: lists of the same length, one place per layer."""
        return self._keys, self._values, self._indexed

    @property
    def _buffers(self) -> Iterator[torch.Tensor]:
        return (buffer for buffer in chain(*self._lists) if buffer is not None)

    # The engine's side

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` tokens, keeping the present contents.

        All or nothing: after an error or an interrupt the capacity is unchanged.
        """
        have_rows, have_columns = self._capacity
        if rows <= have_rows and columns <= have_columns:
            return
        if have_rows and rows > have_rows:  # double: each growth copies everything
            rows = max(rows, 2 * have_rows)
        step = self._column_step
        columns = -(-max(columns, have_columns) // step) * step
        rows = max(rows, have_rows)
        self.layout = object()

        def grown(buffer: torch.Tensor) -> torch.Tensor:
            made = _kind(buffer).zeros(rows, columns)
            made[:have_rows, :, :have_columns] = buffer[:have_rows, :, :have_columns]
            return made

        try:
            self.states.reserve(rows)  # first, as they are the smaller part
            if self._keys:
                self._replace(grown)  # layer by layer: never two whole caches at once
            else:
                self._make_as_before(rows, columns)
        except BaseException:  # all layers have the old size again
            self.states.reserve(have_rows)
            self._replace(lambda buffer: buffer[:have_rows, :, :have_columns])
            raise
        self._capacity = rows, columns

    def begin(self, first: int, starts: Sequence[int], width: int) -> None:
        """See `RowsInPass.begin`."""
        super().begin(first, starts, width)
        self.states.begin(first, starts, width)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        self.states.copy_row(source, target, length)

    def row(self, row: int, length: int) -> tuple[torch.Tensor | None, ...]:
        """Return copies of a row's first `length` tokens: keys, then values, then indexers' keys.

        `[kv_heads, length, dim]` per layer; None for a layer that has none.
        """
        buffers = chain(*self._lists)
        return tuple(None if b is None else b[row, :, :length].clone() for b in buffers)

    def row_bytes(self, length: int) -> int:
        """Bytes of what `row` and `RowStates.row` return for `length` tokens."""
        rows, columns = (max(size, 1) for size in self._capacity)
        states = self.states.nbytes
        return (self.nbytes - states) * length // (rows * columns) + states // rows

    def least(self, row: int) -> int:
        """Return the fewest tokens that a row can be cut back to."""
        return self.states.least(row)

    def write_row(self, row: int, buffers: Sequence[torch.Tensor | None], length: int) -> None:
        """Write the first `length` tokens of what `row` returned into a row."""
        layers = len(buffers) // len(self._lists)
        for place, states in enumerate(buffers):
            if states is not None:
                own, layer = self._lists[place // layers], place % layers
                self._buffer(own, layer, _kind(states[None]))[row, :, :length] = states[:, :length]

    def blank(self) -> None:
        """Erase all tokens, but keep the memory."""
        for buffer in self._buffers:
            buffer.zero_()
        self.states.blank()

    def free(self) -> None:
        """Free all memory, but remember the buffers' shapes and types."""
        if self._keys or self.states.nbytes:
            known = tuple(
                [b if b is None else _kind(b) for b in buffers] for buffers in self._lists
            )
            self.clear()
            self._known = known

    def clear(self) -> None:
        """Free all memory, and forget the buffers' shapes and types."""
        self.__init__(self._column_step)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers) + self.states.nbytes

    @property
    def capacity(self) -> tuple[int, int]:
        """The allocated rows and columns."""
        return self._capacity

    def buffers(self, first: int, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return keys and values of some rows, `[rows, kv_heads, columns, dim]` per layer.

        The lists may be empty before the first pass.
        """
        part = slice(first, first + rows)
        return (
            [keys[part] for keys in self._keys if keys is not None],
            [values[part] for values in self._values if values is not None],
        )

    def _replace(self, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for buffers in self._lists:
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    buffers[layer] = other(buffer)

    def _make_as_before(self, rows: int, columns: int) -> None:
        """Allocate the freed buffers again before a pass allocates them among its own tensors.

        Otherwise the memory that the pass frees would fragment the heap.
        """
        self._keys, self._values, self._indexed = (
            [kind if kind is None else kind.zeros(rows, columns) for kind in kinds]
            for kinds in self._known
        )

    def _buffer(
        self, buffers: list[torch.Tensor | None], layer: int, kind: BufferKind
    ) -> torch.Tensor:
        """Return a layer's buffer in one of the lists, allocated on first use."""
        buffer = buffers[layer] if layer < len(buffers) else None
        if buffer is None:
            buffer = kind.zeros(*self._capacity)
            for one in self._lists:
                one += [None] * (layer + 1 - len(one))
            buffers[layer] = buffer
        return buffer

    # The model's side

    @property
    def first(self) -> int:
        """The first row of the pass."""
        return self._first

    def buffers_of(
        self, layer: int, keys: tuple[int, int], values: tuple[int, int], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, `[rows, kv_heads, columns, dim]`, with room for a pass.

        Args:
            layer: the layer's index.
            keys, values: `(kv_heads, dim)` of each.
            like: a tensor of their dtype and device.

        Raises:
            IndexError: `reserve` made no room for the pass, or the layer's heads differ.
        """
        rows, found = self._first + len(self._starts), []
        for buffers, shape in ((self._keys, keys), (self._values, values)):
            buffer = self._buffer(buffers, layer, BufferKind(*shape, like.dtype, like.device))
            # Check the buffer's own shape: C code may write into it.
            have_rows, heads, have_columns, dim = buffer.shape
            if rows > have_rows or self.columns > have_columns or (heads, dim) != shape:
                raise IndexError(
                    f"no room for {rows} rows of {self.columns} tokens of {shape} numbers in "
                    f"buffers of {list(buffer.shape)}"
                )
            found.append(buffer)
        return found[0], found[1]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the pass's keys and values `[rows, kv_heads, width, dim]`; return all columns."""
        shapes = [(states.shape[1], states.shape[3]) for states in (key_states, value_states)]
        found = self.buffers_of(layer_idx, shapes[0], shapes[1], key_states)
        rows = slice(self._first, self._first + len(self._starts))
        keys, values = (buffer[rows, :, : self.columns] for buffer in found)
        self._write(keys, key_states)
        self._write(values, value_states)
        return keys, values

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Write the keys `[rows, width, dim]` of a layer's indexer; return all columns."""
        states = indexer_key_states[:, None]
        buffer = self._buffer(self._indexed, layer_idx, _kind(states))
        keys = buffer[self._first : self._first + len(self._starts), :, : self.columns]
        self._write(keys, states)
        return keys[:, 0]

    def _write(self, room: torch.Tensor, states: torch.Tensor) -> None:
        if len(set(self._starts)) == 1:
            start = self._starts[0]
            room[:, :, start : start + self._width] = states
            return
        if self._positions.device != states.device:
            self._positions = self._positions.to(states.device)
        index = torch.arange(len(self._starts), device=states.device)[:, None]
        room[index, :, self._positions] = states.transpose(1, 2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A convolution's last inputs, `[rows, channels, kernel]`; None in a row's first pass."""
        return self.states.get(Place("conv", layer_idx, state_idx))

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append the pass's inputs; return the last ones before them with them."""
        return self.states.extend(
            Place("conv", layer_idx, state_idx), conv_states, conv_kernel_size
        )

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """A layer's state, `[rows, ...]`; None in a row's first pass."""
        return self.states.get(Place("recurrent", layer_idx, state_idx))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Replace a layer's state, `[rows, ...]`."""
        return self.states.update(Place("recurrent", layer_idx, state_idx), recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """False: a state can't be taken back to what it was before a pass."""
        return False


class LayerCache(ColumnCache):
    """One layer's buffers in one pass; it ignores the layer's index.

    Args:
        keys, values: `[rows, kv_heads, columns or more, head_dim]`.
        rows: `[rows, 1]`, the rows' indices.
        targets: columns of the new tokens, `[rows, width]`.
        columns: how many of them the pass attends over.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        columns: int,
    ) -> None:
        super().__init__(layers=[])
        self._keys = [keys]
        self._buffers = keys, values
        self._places = rows, targets
        self._columns = columns

    @property
    def columns(self) -> int:
        """How many columns the pass attends over."""
        return self._columns

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the pass's keys and values `[rows, kv_heads, width, dim]`; return all columns."""
        keys, values = self._buffers
        rows, targets = self._places
        keys[rows, :, targets] = key_states.transpose(1, 2)
        values[rows, :, targets] = value_states.transpose(1, 2)
        return keys[:, :, : self._columns], values[:, :, : self._columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the pass, in the longest row."""
        return self._columns - self._places[1].shape[1]


class StepCache(ColumnCache):
    """Buffers of a `RowCache` in one pass, in the form that compilers and CUDA graphs need.

    Args:
        keys, values: `[rows, kv_heads, columns or more, head_dim]` per layer.
        targets: columns of the new tokens, `[rows, width]`.
        columns: how many of them the pass attends over.
    """

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        targets: torch.Tensor,
        columns: int,
    ) -> None:
        super().__init__(layers=[])
        rows = torch.arange(len(targets), device=targets.device)[:, None]
        self._keys = keys
        self.by_layer = [
            LayerCache(*buffers, rows, targets, columns)
            for buffers in zip(keys, values, strict=True)
        ]

    @property
    def columns(self) -> int:
        """How many columns the pass attends over."""
        return self.by_layer[0].columns

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the pass's keys and values `[rows, kv_heads, width, dim]`; return all columns."""
        return self.by_layer[layer_idx].update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the pass, in the longest row."""
        return self.by_layer[0].get_seq_length()
