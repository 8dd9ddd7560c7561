"""Compiles the decode step: `torch.compile` of the model over the rows of the KV cache.

One graph works for any number of rows and any length, so nothing is compiled during a chat.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from amulet.backends.transformers.attention import grouped
from amulet.backends.transformers.cache import ColumnCache, StepCache
from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cuda.siblings import join_siblings, joint_products
from amulet.backends.transformers.masks import (
    Masks,
    additive_dtype,
    attention_kind,
    by_kind,
    column_mask,
)
from amulet.backends.transformers.support import cache_argument
from amulet.cache_folder import cache_folder
from amulet.errors import is_out_of_memory, one_line

logger = logging.getLogger("amulet")

MOST_COMPILED = 64  # kinds of layers and passes over all models; PyTorch's default limit is 8
LEAST_ROWS = 2  # one row would need its own graph; a second row costs almost nothing


def forward_pass(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    masks: Masks,
    cache: ColumnCache,
    **options: Any,
) -> torch.Tensor:
    """Pass some tokens per row through a model; return its logits, `[rows, width, vocab]`.

    Args:
        model: a model that `check_supported` accepts.
        ids, positions: of the tokens, `[rows, width]`; no positions where the model takes none.
        masks: the result of `RowCache.masks`.
        cache: receives their keys and values.
        options: of the model's forward; `input_ids` or `inputs_embeds` go for the ids.
    """
    if "inputs_embeds" not in options:
        options.setdefault("input_ids", ids)
    if positions is not None:
        options["position_ids"] = positions
    logits: torch.Tensor = model(
        attention_mask=masks,
        use_cache=True,
        **{cache_argument(model): cache},
        **options,
    ).logits
    return logits


def forward_step(
    model: PreTrainedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    columns: int,
) -> torch.Tensor:
    """Pass a few tokens per row, only with operations on tensors; see `forward_pass`.

    Args:
        model, ids, positions: as in `forward_pass`.
        targets: the columns to write to: their positions, if the row is in use.
        keys, values: `[rows, kv_heads, columns or more, head_dim]` per layer.
        columns: the number of columns that the pass attends over.
    """
    text = model.config.get_text_config()
    additive = additive_dtype(model.config, model.dtype)
    masks = by_kind(text, lambda kind: column_mask(kind, text, positions, columns, additive))
    return forward_pass(model, ids, positions, masks, StepCache(keys, values, targets, columns))


class CompiledStep:
    """`forward_step` compiled; on failure, it logs a message and returns None.

    On the CPU it is compiled as a whole, because entering compiled code takes time. On a GPU, where
    a graph records the step, one layer is compiled for all equal layers, in seconds, not minutes.

    Args:
        model: a model that `check_supported` accepts.
        by_layer: compile layers; None means only on a GPU.
    """

    def __init__(self, model: PreTrainedModel, by_layer: bool | None = None) -> None:
        self._model = model
        self._by_layer = model.device.type == "cuda" if by_layer is None else by_layer
        self._compiled: Any = None
        self.broken = attention_kind(model.config) != "sdpa"

    def prepare(self) -> None:
        """Put the weights into the order that compiled layers read; also after they were moved."""
        if self._by_layer and not self.broken:
            join_siblings(self._model)

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        columns: int,
    ) -> torch.Tensor | None:
        """Return the result of `forward_step`.

        None if the model can't be compiled; then nothing has changed and the pass can be repeated.
        """
        if self.broken:
            return None
        config: Any = torch.compiler.config
        # Layers of other kinds and models, and passes with and without a mask, all count. Early
        # versions of PyTorch lack this setting.
        limit = {"recompile_limit": MOST_COMPILED} if hasattr(config, "recompile_limit") else {}
        try:
            with grouped(), config.patch(limit):
                arguments = ids, positions, targets, keys, values, columns
                if self._compiled is None:
                    self._compile(arguments)
                return self._run(*arguments)
        except Exception as error:
            if is_out_of_memory(error):  # not the compiler's fault
                raise
            self.broken = True
            logger.warning(
                "The decode step can't be compiled and runs uncompiled: %s: %.300s",
                type(error).__name__,
                one_line(error),
            )
            return None

    def _run(self, *arguments: Any) -> torch.Tensor:
        if self._by_layer:
            with self._layers_compiled():
                return forward_step(self._model, *arguments)
        logits: torch.Tensor = self._compiled(self._model, *arguments)
        return logits

    def _compile(self, arguments: tuple[Any, ...]) -> None:
        """Compile everything that will be needed, so that nothing is compiled during a chat."""
        if self._model.device.type == "cpu":
            native.library()  # loaded now, because the compiler can't trace that
        self.prepare()
        if are_native(self._model):
            logger.warning(
                "compile=True: this model's layers are C code, which was faster than compiled ones "
                "wherever it was measured; leave compile out."
            )
        # By default, PyTorch keeps compiled code in the temporary folder, which a restart empties.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        source = _forward_layer if self._by_layer else forward_step
        self._compiled = torch.compile(source, dynamic=True, fullgraph=True)
        start = time.perf_counter()
        with warnings.catch_warnings():  # the compiler's own warnings
            warnings.simplefilter("ignore")
            if self._by_layer:
                self._try_layers(*arguments[3:5])
            else:
                self._run(*arguments)
        logger.info("Compiled the decode step in %.0f s.", time.perf_counter() - start)

    def _try_layers(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Compile layers for one token per row and for several, on dummy rows.

        Their sizes match no model's, so that the compiled code does not depend on a coincidence.
        """
        rows, columns = 3, 83
        room = [
            [b.new_zeros((rows, b.shape[1], columns, b.shape[3])) for b in buffers]
            for buffers in (keys, values)
        ]
        for width in (1, 8):
            positions = torch.arange(width, device=keys[0].device).repeat(rows, 1)
            ids = torch.zeros_like(positions)
            self._run(ids, positions, positions, *room, columns)

    @contextmanager
    def _layers_compiled(self) -> Iterator[None]:
        """Run the model's decoder layers compiled in the block."""
        count = self._model.config.get_text_config().num_hidden_layers
        lists = (m for m in self._model.modules() if isinstance(m, nn.ModuleList))
        layers: Any = next(found for found in lists if len(found) == count)
        if any("forward" in layer.__dict__ for layer in layers):
            raise ValueError("other code has replaced the forward of its layers")
        try:
            for number, layer in enumerate(layers):
                layer.forward = partial(self._layer, layer, number)
            with joint_products():
                yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    def _layer(self, layer: nn.Module, number: int, *args: Any, **options: Any) -> Any:
        """Run a layer with its own cache, so that no code depends on its number."""
        for name, value in options.items():
            if isinstance(value, StepCache):
                options[name] = value.by_layer[number]
        return self._compiled(layer, *args, **options)


def _forward_layer(layer: nn.Module, *args: Any, **options: Any) -> Any:
    return type(layer).forward(layer, *args, **options)
