"""`TransformersBackend`: rows of a Transformers model, over one KV cache.

A pass goes through the model's own forward. A decode step is also a CUDA graph on a GPU, or
compiled where that is wanted; each of them gives way to the plain pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from amulet.backends.transformers.attention import (
    causal_behind_cached,
    grouped,
    head_dim,
    steps_are_native,
)
from amulet.backends.transformers.cache import COLUMN_STEP, GPU_COLUMN_STEP, RowCache
from amulet.backends.transformers.compiled import LEAST_ROWS, CompiledStep, forward_pass
from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cpu.packed_layers import native_rows
from amulet.backends.transformers.cuda.graphs import StepGraphs
from amulet.backends.transformers.masks import has_indexer, has_states, kind_of_layer, reach
from amulet.backends.transformers.model_backend import ModelBackend
from amulet.backends.transformers.pages import PageCache, PageKind
from amulet.backends.transformers.states import Place
from amulet.backends.transformers.support import check_supported, forward_parameters
from amulet.backends.transformers.vision import AT_ONCE, Places, own_images, pass_inputs
from amulet.images import Place as ImagePlace
from amulet.images import PromptImage

logger = logging.getLogger("amulet")

COMPILE_AFTER = 60.0  # seconds of decoding; an "auto" program that ends sooner never compiles
KEPT_FOR_GRAPHS = 1 / 8  # of a GPU's memory: so much KV cache stays for its CUDA graphs when idle
TOO_LONG = 4  # times the columns that an answer needs: kept rows that are longer are made anew
TEAM_ROWS = 32  # rows of a step up to which PyTorch's small operations need no second thread


@dataclass(frozen=True)
class SavedRow:
    """One row's keys and values, as its cache's `row` returns them, its states and its places."""

    buffers: tuple[Any, ...]
    states: dict[Place, torch.Tensor]
    places: list[ImagePlace]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> list[Any]:
        """Tensors, or pages, which other rows may share."""
        return [part for part in (*self.buffers, *self.states.values()) if part is not None]


class TransformersBackend(ModelBackend):
    """See `Backend`.

    Args:
        model: a causal language model that `check_supported` accepts.
        compile: compile the decode step; "auto" does once decoding has taken `COMPILE_AFTER`, but
            not where whole layers are C code, which is faster.
    """

    def __init__(self, model: PreTrainedModel, compile: bool | Literal["auto"] = False) -> None:
        check_supported(model)
        super().__init__(model)
        text = model.config.get_text_config()
        self.any_length = not has_states(text)
        self.images_at_once = model.config.model_type in AT_ONCE
        keeps_more = has_states(text) or has_indexer(text)  # than keys and values
        if compile is True and keeps_more:
            logger.warning(
                "compile=True: the step of a model with recurrent states or an indexer is not "
                "compiled; leave compile out."
            )
        self._compile = (
            False if keeps_more or (compile == "auto" and are_native(model)) else compile
        )
        self._compiled = CompiledStep(model)
        self._graphs = StepGraphs(model, self._compiled)
        self._seconds = 0.0  # spent on steps
        on_gpu = model.device.type == "cuda"
        self._cache = self._new_cache()
        self._places = Places(model)
        self._kind = model.dtype, model.device  # of what the cache holds
        self._causal_behind_cached = causal_behind_cached(model)
        # Up to how many rows a step is the C code's, but for small operations.
        rows = native_rows(model) if steps_are_native(model) else 0
        self._team_rows = min(rows, TEAM_ROWS)
        parameters = forward_parameters(model)
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters  # Mamba has none
        self._kept_bytes = 0  # of the KV cache, when nothing runs
        if on_gpu:  # graphs are recorded over these very buffers
            memory = torch.cuda.get_device_properties(model.device).total_memory
            self._kept_bytes = int(KEPT_FOR_GRAPHS * memory)

    @property
    def nbytes(self) -> int:
        """Bytes held by the KV cache."""
        return self._cache.nbytes

    def renew(self, tokens: int, idle: bool) -> None:
        """See `Backend.renew`: graphs over another model's weights, and rows of another dtype."""
        changed = self._graphs.refresh(self._compiles())
        kind = self.model.dtype, self.device
        if not idle:
            return
        if kind != self._kind:  # cast, or moved
            self._kind = kind
            self._cache = self._new_cache()
        # What an idle GPU kept may be on another one, or as long as somebody's long answer.
        if changed or self._cache.capacity[1] > TOO_LONG * tokens:
            self._cache.clear()

    def _new_cache(self) -> RowCache | PageCache:
        """Return pages where whole layers are C code, which reads them; else buffers."""
        model = self.model
        if are_native(model) and not self._compile:
            return PageCache(page_kind(model), windows(model))
        return RowCache(GPU_COLUMN_STEP if model.device.type == "cuda" else COLUMN_STEP)

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for `rows` rows of `tokens` ids; see `Backend.reserve`."""
        self._cache.reserve(rows, tokens)

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        """Return the C code's thread team where a step of so many tokens is its own."""
        # Compiled code brings loops for OpenMP's threads, which the team's would get in the way of.
        alone = tokens <= self._team_rows and not self._compiles()
        return native.team() if alone else nullcontext()

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        """One pass over rows `first ...`; return logits `[rows, kept places, vocab]`."""
        device, model = self.device, self.model
        self._cache.begin(first, starts, len(ids[0]))
        options: dict[str, Any] = {}
        if self._keeps_logits:
            options["logits_to_keep"] = torch.tensor(keep, device=device)
        tokens = torch.tensor(ids, device=device)
        whole = self.images_at_once and bool(images)
        masks = self._cache.masks(
            model.config,
            model.dtype,
            device,
            causal_behind_cached=self._causal_behind_cached,
            also=own_images(tokens, starts) if whole else None,
        )
        places = self._places.of_pass(ids, starts, first, images)
        positions = None
        if self._takes_positions:
            positions = (self._cache.positions if places is None else places).to(device)
        if images:
            options |= pass_inputs(model, tokens, images)
        with grouped():
            logits = forward_pass(model, tokens, positions, masks, self._cache, **options)
        return logits if self._keeps_logits else logits[:, list(keep)]

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """One decode step; return logits `[rows, ids per row, vocab]`.

        By a CUDA graph on a GPU, and compiled where that is wanted; on the CPU a step that checks
        drafts is not, as it would have to be compiled for itself.
        """
        begun = time.perf_counter()
        compiles, logits, cache = self._compiles(), None, self._cache
        if self._places.serve(len(ids)):
            logits = None  # their positions are not their columns
        elif self._graphs.serves and isinstance(cache, RowCache):
            logits = self._graphs(ids, starts, cache, compiles)
        elif compiles and isinstance(cache, RowCache) and len(ids[0]) == 1:
            logits = self._step_compiled(cache, ids, starts)
        if logits is None:
            logits = self.forward(ids, starts, 0, range(len(ids[0])))
        self._seconds += time.perf_counter() - begun
        return logits

    def _step_compiled(
        self, cache: RowCache, ids: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> torch.Tensor | None:
        spare = max(LEAST_ROWS - len(ids), 0)  # rows that are filled meanwhile, or nobody's
        columns = max(starts) + 1
        cache.reserve(len(ids) + spare, columns + 1)
        unused = cache.capacity[1] - 1  # a column that none of the rows has come to
        device = self.device
        positions = torch.tensor([*starts, *[0] * spare], device=device)[:, None]
        targets = torch.tensor([*starts, *[unused] * spare], device=device)[:, None]
        keys, values = cache.buffers(0, len(positions))
        tokens = torch.tensor([*ids, *[[0]] * spare], device=device)
        logits = self._compiled(tokens, positions, targets, keys, values, columns)
        return None if logits is None else logits[: len(ids)]

    def _compiles(self) -> bool:
        due = self._seconds > COMPILE_AFTER if self._compile == "auto" else self._compile
        return due and not self._compiled.broken

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` ids of one row to another."""
        self._cache.copy_row(source, target, length)
        self._places.put(target, self._places.row(source, length))

    def save_row(self, row: int, length: int) -> SavedRow:
        """Return a copy of a row's first `length` ids."""
        return SavedRow(
            self._cache.row(row, length),
            self._cache.states.row(row, length),
            self._places.row(row, length),
        )

    def load_row(self, row: int, snapshot: SavedRow, length: int) -> None:
        """Put the first `length` ids of what `save_row` returned into a row."""
        self._cache.write_row(row, snapshot.buffers, length)
        self._cache.states.write_row(row, snapshot.states, length)
        self._places.put(row, snapshot.places[:length])

    def row_bytes(self, length: int) -> int:
        """Bytes of a saved row of `length` ids."""
        return self._cache.row_bytes(length)

    def least(self, row: int) -> int:
        """See `Backend.least`."""
        return self._cache.least(row)

    def drop(self, first: int) -> None:
        """Let go of the rows' pages; buffers of rows stay for the next."""
        self._places.drop(first)
        if isinstance(self._cache, PageCache):
            self._cache.drop(first)

    def rest(self) -> None:
        """Free all memory; but on a GPU keep some, emptied, for its CUDA graphs."""
        self._places.drop(0)
        if self._graphs.serves and self._cache.nbytes < self._kept_bytes:
            self._cache.blank()
            self._graphs.blank()
        else:
            self._cache.free()

    def clear(self) -> None:
        """Free all memory."""
        self._places.drop(0)
        self._cache.clear()


def page_kind(model: PreTrainedModel) -> PageKind:
    """Return the kind of pages that a model needs whose layers are C code."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return PageKind(text.num_hidden_layers, heads, head_dim(text), model.dtype)


def windows(model: PreTrainedModel) -> list[int]:
    """Return how many columns each of a model's layers sees at most, 0 for all."""
    text = model.config.get_text_config()
    kinds = (kind_of_layer(text, layer) for layer in range(text.num_hidden_layers))
    return [reach(kind, text) or 0 for kind in kinds]
