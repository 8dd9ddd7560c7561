"""`GeneralBackend`: each row has a cache of Transformers' own and a pass of its own.

Slower than rows in one pass, and right for whatever `generate` decodes token by token: recurrent
and hybrid models, caches of a model's own, positions that are not handed in.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from amulet.backends.base import Backend
from amulet.backends.transformers.backend import TransformersBackend
from amulet.backends.transformers.model_backend import WHOLE, ModelBackend
from amulet.backends.transformers.restarting import RestartingBackend
from amulet.backends.transformers.support import (
    CARRYING,
    attends_to_all,
    check_decoder,
    forward_parameters,
    restarts,
    switches_rope,
    why_not_in_rows,
)
from amulet.images import PromptImage

logger = logging.getLogger("amulet")

# By these names outputs hold the cache; and by which the next pass takes it.
CACHES = {
    "past_key_values": "past_key_values",
    "cache": "cache",  # its name from Transformers 5.24 on
    "cache_params": "cache_params",  # Mamba
    "state": "state",  # RWKV
    "mems": "past_key_values",  # XLNet
    "past_buckets_states": "past_key_values",  # Reformer
}
# Layers of caches behind which any pass is what it is in one pass of all ids.
CONTINUED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer"}
# Model types whose prompt must be one pass: CPM-Ant's ids attend to later ones, Moshi's window
# begins behind the prompt, ProphetNet takes one id at a time behind its cache, XLM and XLNet
# predict only what is at a token behind all.
AT_ONCE = {"cpmant", "moshi", "prophetnet", "xlm", "xlnet"}
OWN_POSITIONS = {"reformer"}  # model types that count positions themselves, as `generate` lets them


@dataclass
class Row:
    """What a row has consumed.

    Attributes:
        ids: all of it.
        name: under which the model's forward takes the cache.
        cache: the model's own; None where it has none, and computes all ids in every pass.
    """

    ids: list[int]
    name: str = ""
    cache: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the ids."""
        return 8 * len(self.ids) + sum(tensor.nbytes for tensor in tensors(self.cache))

    @property
    def parts(self) -> tuple[Row]:
        """The row itself, which shares nothing."""
        return (self,)

    def copy(self) -> Row:
        """Return a row that shares no tensor with this one."""
        # A tensor's own deep copy takes along all of the memory that it is a part of.
        known: dict[int, Any] = {id(tensor): tensor.clone() for tensor in tensors(self.cache)}
        known |= {id(shared): shared for shared in _parts(self.cache) if _is_shared(shared)}
        return Row(list(self.ids), self.name, copy.deepcopy(self.cache, known))


class GeneralBackend(ModelBackend):
    """See `Backend`. A pass takes as long as its rows one after the other.

    Args:
        model: a model that `check_decoder` accepts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_decoder(model)
        super().__init__(model)
        parameters = forward_parameters(model)
        self._keeps_logits = "logits_to_keep" in parameters
        text = model.config.get_text_config()
        self._type = text.model_type
        self._takes_positions = "position_ids" in parameters and self._type not in OWN_POSITIONS
        self._rows: dict[int, Row] = {}
        # What one rotary embedding computed is of no use where another one has begun.
        self._at_once = bool(switches_rope(model)) or attends_to_all(text) or self._type in AT_ONCE
        self.pass_cost = 0  # each row has a pass of its own
        expected = expected_cache(model)
        if not self._goes_on(expected):
            self.chunk = self.worth_sharing = WHOLE
        self.any_length = can_cut(expected) and not self._at_once

    @property
    def nbytes(self) -> int:
        """Bytes held by the rows' caches."""
        return sum(row.nbytes for row in list(self._rows.values()))

    def renew(self, tokens: int, idle: bool) -> None:
        """See `Backend.renew`; nothing is kept from one answer to the next."""

    def reserve(self, rows: int, tokens: int) -> None:
        """See `Backend.reserve`; these caches grow by themselves."""

    def working(self, tokens: int) -> AbstractContextManager[Any]:
        """See `Backend.working`; nothing need be held."""
        return nullcontext()

    def forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: Sequence[int],
        images: Sequence[PromptImage] = (),
    ) -> torch.Tensor:
        """One pass for each of the rows `first ...`; return logits `[rows, kept places, vocab]`."""
        found = []
        for number, (new, start) in enumerate(zip(ids, starts, strict=True), first):
            row = self._rows[number] if start else Row([])
            self._cut(row, start)
            logits = self._pass(row, new, len(new) - min(keep))
            self._rows[number] = row
            found.append(logits[[place - len(new) for place in keep]])
        return torch.stack(found)

    def _pass(self, row: Row, new: Sequence[int], kept: int) -> torch.Tensor:
        """Append ids to a row as `generate` does; return the last logits, `[kept, vocab]`."""
        model: Any = self.model
        if len(new) > 1 and not self._goes_on(row.cache):
            row.cache = None
        begins = row.cache is None
        row.ids += new
        options: dict[str, Any] = {} if begins else {row.name: row.cache}
        if self._takes_positions:
            options["position_ids"] = torch.arange(len(row.ids), device=self.device)[None]
        if self._keeps_logits:
            options["logits_to_keep"] = kept
        inputs = model.prepare_inputs_for_generation(
            torch.tensor([row.ids], device=self.device),
            next_sequence_length=None if begins else len(new),
            is_first_iteration=begins,
            attention_mask=None,
            use_cache=True,
            **options,
        )
        out = model(**inputs, return_dict=True)
        row.name, row.cache = next(
            ((CACHES[name], out[name]) for name in CACHES if out.get(name) is not None), ("", None)
        )
        logits: torch.Tensor = out.logits[0, -kept:]
        return logits

    def step(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
        """One decode step; return logits `[rows, ids per row, vocab]`."""
        return self.forward(ids, starts, 0, range(len(ids[0])))

    def _cut(self, row: Row, length: int) -> None:
        """Take back what lies behind a row's first ids."""
        assert length == len(row.ids) or (self.any_length and length < len(row.ids)), (
            f"no such length: {length} of {len(row.ids)} ids"
        )
        if length == len(row.ids):
            return
        del row.ids[length:]
        if not can_cut(row.cache):
            row.cache = None  # the next pass computes it anew
            return
        for layer in row.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy one row to another."""
        self._rows[target] = self.save_row(source, length)

    def save_row(self, row: int, length: int) -> Row:
        """Return a copy of a row."""
        saved = self._rows[row].copy()
        self._cut(saved, length)
        return saved

    def load_row(self, row: int, snapshot: Row, length: int) -> None:
        """Put what `save_row` returned into a row."""
        self._rows[row] = snapshot.copy()
        self._cut(self._rows[row], length)

    def row_bytes(self, length: int) -> int:
        """Bytes of what `save_row` returns for so many ids, judged by a row that has them."""
        rows = [row for row in self._rows.values() if len(row.ids) >= length]
        if not rows:
            return 0
        row = min(rows, key=lambda row: len(row.ids))
        return row.nbytes * length // len(row.ids)

    def least(self, row: int) -> int:
        """See `Backend.least`."""
        return 0 if self.any_length else len(self._rows[row].ids)

    def drop(self, first: int) -> None:
        """Free the rows from `first` on."""
        self._rows = {number: row for number, row in self._rows.items() if number < first}

    def rest(self) -> None:
        """Free all memory."""
        self._rows = {}

    def clear(self) -> None:
        """Free all memory."""
        self._rows = {}

    def _goes_on(self, cache: Any) -> bool:
        """Whether a pass of several ids behind others is what one pass of all would be."""
        if self._at_once or not isinstance(cache, Cache):
            return False
        kinds = {type(layer).__name__ for layer in cache.layers}
        return kinds <= CONTINUED or self._type in CARRYING


def expected_cache(model: PreTrainedModel) -> Cache | None:
    """Return an empty cache such as `generate` hands to most models; None where it can't."""
    try:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    except Exception:  # of layers that only the model's own cache knows
        return None


def can_cut(cache: Any) -> bool:
    """Whether a cache holds keys and values of all ids in their order, and nothing else."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def tensors(cache: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object of a cache holds, each once."""
    return (part for part in _parts(cache) if isinstance(part, torch.Tensor))


def _is_shared(part: Any) -> bool:
    return isinstance(part, nn.Module | PretrainedConfig)


def _parts(whole: Any) -> Iterator[Any]:
    """Yield what an object is made of, down to tensors and to what it shares with the model."""
    left, seen = [whole], set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor) or _is_shared(part):
            yield part
        elif isinstance(part, Mapping):
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part
        elif hasattr(part, "__dict__"):
            left += vars(part).values()


def backend_of(model: PreTrainedModel, compile: bool | Literal["auto"] = False) -> Backend:
    """Return a backend for a model: rows of one cache where they are right, else this.

    Raises:
        ModelError: the model does not write text token by token.
    """
    check_decoder(model)
    if reason := why_not_in_rows(model):
        logger.warning(
            "%s decodes row after row, which is slower (docs/models.md): %s.",
            model.config.model_type,
            reason,
        )
        return GeneralBackend(model)
    if restarts(model):
        return RestartingBackend(model)
    return TransformersBackend(model, compile)
