"""`LlamaBackend`: implements rows as sequences of one llama.cpp context.

All rows keep their keys and values in one cache of cells. Rows with a common prefix share its
cells. The cache grows when a pass finds no free cells.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from amulet.backends.llamacpp.model import KV_TYPES, GGUFModel, reasons
from amulet.images import PromptImage

logger = logging.getLogger("amulet")

BATCH = 2048  # ids in one call of llama.cpp
CHUNK = 512  # ids that llama.cpp computes at once
PASS_COST = 16  # the time that a call of llama.cpp's takes besides that for its ids, in ids
WORTH_SHARING = 16  # a shared prefix costs no memory and hardly any time
MOST_ROWS = 255  # sequences of a context (LLAMA_MAX_SEQ), minus one for saving rows
CELLS = 256  # the cache's size is a multiple of this, as in llama.cpp
NO_SLOT = 1  # returned by `llama_decode` if the cache has no room
NO_MEMORY = -2


@dataclass(frozen=True)
class SavedRow:
    """One sequence in llama.cpp's own format."""

    data: Any  # a C array of bytes
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return len(self.data)

    @property
    def parts(self) -> tuple[SavedRow]:
        """The row itself, which shares nothing."""
        return (self,)


class LlamaBackend:
    """See `Backend`.

    Args:
        model: the model to decode.
    """

    worth_sharing = WORTH_SHARING
    chunk = CHUNK
    images_at_once = False
    pass_cost = PASS_COST
    device = torch.device("cpu")

    def __init__(self, model: GGUFModel) -> None:
        self.model = model
        self.any_length = model.any_length
        self._lib = model.lib
        self._context: _Context | None = None
        self._lengths: dict[int, int] = {}  # ids in each row that holds any
        self._stepped = 0  # rows of the last step
        self._ahead = 0  # cells that the next answer may need
        self._per_id = 0.0  # bytes of a saved row, per id
        self._per_row = 0.0  # plus this constant
        self._state = object()
        self._batch = _Batch(BATCH)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        context = self._context  # the decode thread may close it meanwhile
        return int(context.cells * self._per_id) if context is not None else 0

    def queued(self) -> None:
        """Do nothing: llama.cpp has its own threads."""

    def renew(self, tokens: int, idle: bool) -> None:
        """Record how long the next answer may become."""
        self._ahead = tokens

    def state(self) -> object:
        """Return a constant, because a file's weights don't change."""
        return self._state

    def reserve(self, rows: int, tokens: int) -> None:
        """See `Backend.reserve`. Cells are allocated in a pass, when the shared ones are known.

        Raises:
            MemoryError: more rows than llama.cpp has sequences, or out of memory.
        """
        if rows > MOST_ROWS:
            raise MemoryError(f"{rows} rows: llama.cpp has {MOST_ROWS} sequences")
        context = self._context
        if context is not None and rows <= context.rows:
            return
        # A context has room for the logits of all its sequences: 255 would take 25 ms to allocate.
        rows = min(max(8, 2 * rows), MOST_ROWS)
        if context is None:
            self._context = self._make(max(tokens, self._ahead), rows)
        else:
            self._replace(context.cells, rows)

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        """Append ids to rows from `first` on; return logits `[rows, kept ids, vocab]`."""
        return self._pass(ids, starts, first, keep).clone()

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """Run a decode step; return logits `[rows, ids per row, vocab]` in llama.cpp's memory."""
        for row in range(len(ids), self._stepped):  # rows that left the batch
            self._cut(row, 0)
        self._stepped = len(ids)
        return self._pass(ids, starts, 0, range(len(ids[0])))

    def _pass(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
    ) -> torch.Tensor:
        width = len(ids[0])
        for row, start in enumerate(starts, first):
            self._cut(row, start)
        flags = np.zeros(width, np.int8)
        flags[list(keep)] = 1
        tokens = np.asarray(ids, np.int32).reshape(-1)
        positions = (np.asarray(starts, np.int32)[:, None] + np.arange(width)).reshape(-1)
        rows = np.repeat(np.arange(first, first + len(ids)), width)
        wanted = np.tile(flags, len(ids))
        found = []
        size = self._open().batch
        for begin in range(0, len(tokens), size):
            part = slice(begin, begin + size)
            self._decode(tokens[part], positions[part], rows[part], wanted[part])
            count = int(wanted[part].sum())
            if count:
                found.append(self._logits(count))
                if len(tokens) > size:  # the next call overwrites the logits
                    found[-1] = found[-1].clone()
        for row, start in enumerate(starts, first):
            self._lengths[row] = start + width
        self._measure(first)
        logits = found[0] if len(found) == 1 else torch.cat(found)
        return logits.view(len(ids), len(keep), -1)

    def _decode(self, tokens: Any, positions: Any, rows: Any, wanted: Any) -> None:
        batch = self._batch.filled(tokens, positions, rows, wanted)
        while True:
            context = self._open()
            with reasons() as reason:
                code = self._lib.llama_decode(context.pointer, batch)
            if code == 0:
                return
            if code == NO_SLOT:
                self._grow(len(tokens))
                continue
            said = f"llama.cpp could not compute a pass (code {code}): {reason()}"
            raise MemoryError(said) if code == NO_MEMORY else RuntimeError(said)

    def _logits(self, count: int) -> torch.Tensor:
        context, vocab = self._open(), self.model.vocab_size
        pointer = self._lib.llama_get_logits(context.pointer)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return torch.from_numpy(np.ctypeslib.as_array(address, (count, vocab)))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Let a row share the cells of another row's first `length` ids."""
        self._cut(target, 0)
        self._share(source, target, length)
        self._lengths[target] = length

    def save_row(self, row: int, length: int) -> SavedRow:
        """Return a copy of a row's first `length` ids, in main memory."""
        lib, context = self._lib, self._open()
        source = row
        if length != self._lengths[row]:
            source = context.spare
            self._share(row, source, length)
        size = lib.llama_state_seq_get_size(context.pointer, source)
        data = (ctypes.c_uint8 * size)()
        written = lib.llama_state_seq_get_data(context.pointer, data, size, source)
        if source != row:
            lib.llama_memory_seq_rm(context.memory, source, -1, -1)
        if written != size:
            raise RuntimeError(f"llama.cpp saved {written} of {size} bytes of a row")
        return SavedRow(data, length)

    def least(self, row: int) -> int:
        """See `Backend.least`."""
        return 0 if self.any_length else self._lengths[row]

    def drop(self, first: int) -> None:
        """Free the cells of the rows from `first` on."""
        for row in [row for row, length in self._lengths.items() if row >= first and length]:
            self._cut(row, 0)
        self._stepped = min(self._stepped, first)  # a step would empty rows that are filled since

    def load_row(self, row: int, snapshot: SavedRow, length: int) -> None:
        """Restore the first `length` ids of a saved row."""
        self._cut(row, 0)
        while True:
            context = self._open()
            read = self._lib.llama_state_seq_set_data(
                context.pointer, snapshot.data, snapshot.nbytes, row
            )
            if read:
                break
            self._grow(snapshot.length)
        self._lengths[row] = snapshot.length
        self._cut(row, length)

    def row_bytes(self, length: int) -> int:
        """Bytes of a saved row of `length` ids."""
        return round(self._per_row + self._per_id * length)

    def rest(self) -> None:
        """Free the context and all rows."""
        self.clear()

    def clear(self) -> None:
        """Free the context and all rows."""
        self._lengths.clear()
        self._stepped = 0
        if self._context is not None:
            self._context.close()
            self._context = None

    # ---- rows ----

    def _cut(self, row: int, start: int) -> None:
        """Truncate a row to its first `start` ids."""
        length = self._lengths.get(row, 0)
        if start > length:
            raise RuntimeError(f"row {row} has {length} ids, not {start}")
        if start == length:
            return
        context = self._open()
        whole = start == 0
        if not self._lib.llama_memory_seq_rm(context.memory, row, -1 if whole else start, -1):
            raise RuntimeError(f"row {row} of {length} ids can't be truncated to {start}")
        self._lengths[row] = start

    def _share(self, source: int, target: int, length: int) -> None:
        whole = self._lengths[source]
        assert self.any_length or length == whole, f"no such length: {length} of {whole} ids"
        end = length if self.any_length else -1  # a recurrent row is copied whole
        self._lib.llama_memory_seq_cp(self._open().memory, source, target, -1, end)

    def _measure(self, row: int) -> None:
        """Estimate the bytes of a saved row, from this row and from its first id alone."""
        length = self._lengths[row]
        if self._per_id and (self.any_length or not self._per_row):
            return
        lib, context = self._lib, self._open()
        whole = lib.llama_state_seq_get_size(context.pointer, row)
        if not self.any_length:
            self._per_id = whole / length
            return
        if length < 2:
            return
        self._share(row, context.spare, 1)
        one = lib.llama_state_seq_get_size(context.pointer, context.spare)
        lib.llama_memory_seq_rm(context.memory, context.spare, -1, -1)
        self._per_id = (whole - one) / (length - 1)
        self._per_row = one - self._per_id

    # ---- the context ----

    def _open(self) -> _Context:
        assert self._context is not None, "nothing is reserved"
        return self._context

    def _make(self, cells: int, rows: int) -> _Context:
        limit = self.model.context
        if limit is not None:
            cells = min(cells, limit)
        return _Context(self.model, -(-cells // CELLS) * CELLS, rows)

    def _grow(self, tokens: int) -> None:
        """Make room for this many more ids, plus an eighth.

        Raises:
            MemoryError: the model's `context` or the memory is exhausted.
        """
        cells, limit = self._open().cells, self.model.context
        if limit is not None and cells >= limit:
            raise MemoryError(f"the context of {limit} tokens is full; give a larger context")
        self._replace(cells + max(tokens, cells // 8), self._open().rows)

    def _replace(self, cells: int, rows: int) -> None:
        """Move to a new context, with all rows and what they share."""
        old = self._open()
        new = self._make(cells, rows)
        lib = self._lib
        if any(self._lengths.values()):
            size = lib.llama_state_get_size(old.pointer)
            data = (ctypes.c_uint8 * size)()
            lib.llama_state_get_data(old.pointer, data, size)
            if not lib.llama_state_set_data(new.pointer, data, size):
                new.close()
                raise RuntimeError("llama.cpp could not move the rows to a larger context")
        self._context = new
        old.close()


class _Context:
    """A llama.cpp context: memory for the KV cache and for a pass.

    Args:
        model: the context's model.
        cells: ids that it has room for.
        rows: sequences, in addition to `spare`.

    Raises:
        MemoryError: there is not enough memory.
    """

    def __init__(self, model: GGUFModel, cells: int, rows: int) -> None:
        lib = model.lib
        self.rows = self.spare = rows
        threads = model.threads or torch.get_num_threads()
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = BATCH
        parameters.n_ubatch = CHUNK
        parameters.n_seq_max = self.rows + 1
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = KV_TYPES[model.kv_type]
        if model.kv_type == "f32":  # flash attention would round them to f16
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified = True  # rows can share cells
        parameters.swa_full = True  # and be truncated, even with sliding-window attention
        parameters.no_perf = True
        with reasons() as reason:
            self.pointer = lib.llama_init_from_model(model.pointer, parameters)
            if not self.pointer:
                raise MemoryError(f"llama.cpp created no context of {cells} tokens: {reason()}")
        self.cells = int(lib.llama_n_ctx(self.pointer))
        self.batch = int(lib.llama_n_batch(self.pointer))  # at most as many ids as cells
        self.memory = lib.llama_get_memory(self.pointer)
        self._model = model  # freed after this
        self._free = lib.llama_free

    def close(self) -> None:
        """Free the context."""
        if self.pointer:
            self._free(self.pointer)
            self.pointer = None

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self.close()


class _Batch:
    """A `llama_batch` over NumPy arrays, filled without a Python loop."""

    def __init__(self, size: int) -> None:
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._rows = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)  # each id belongs to one row
        self._places = self._rows.ctypes.data + 4 * np.arange(size, dtype=np.uintp)

    def filled(self, tokens: Any, positions: Any, rows: Any, wanted: Any) -> Any:
        """Return a batch of these ids, valid until the next call."""
        from llama_cpp import llama_cpp

        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._rows[:count] = rows
        self._wanted[:count] = wanted

        def address(array: Any, kind: Any) -> Any:
            return ctypes.cast(array.ctypes.data, kind)

        numbers = ctypes.POINTER(ctypes.c_int32)
        return llama_cpp.llama_batch(
            n_tokens=count,
            token=address(self._tokens, numbers),
            embd=None,
            pos=address(self._positions, numbers),
            n_seq_id=address(self._counts, numbers),
            seq_id=address(self._places, ctypes.POINTER(numbers)),
            logits=address(self._wanted, ctypes.POINTER(ctypes.c_int8)),
        )
