"""One decode step as compiled code: `torch.compile` of the model over the rows of the KV cache.

One graph serves every number of rows and every length; nothing is compiled again during a chat.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from amulet import native
from amulet.attention import grouped
from amulet.cache import Masks, RowCache, StepCache, cache_argument
from amulet.cache_folder import cache_folder
from amulet.layers import are_native

logger = logging.getLogger("amulet")

LEAST_ROWS = 2  # a graph for one row would be another graph; a second row costs nearly nothing


class CompiledStep:
    """The forward pass of one token per row; falls back to None, with one line in the log.

    Args:
        model: a model whose attention is `sdpa`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._argument = cache_argument(model)
        self._compiled: Any = None
        self.broken = model.config._attn_implementation != "sdpa"

    def __call__(self, ids: Sequence[Sequence[int]], cache: RowCache) -> torch.Tensor | None:
        """Return logits `[rows, 1, vocab]` of the pass that `cache.begin` announced.

        None where the model can't be compiled: nothing is lost then, the pass can be made anew.
        """
        if self.broken:
            return None
        device = self._model.device
        masks = cache.masks(self._model.config, self._model.dtype, device, always=True)
        keys, values = cache.buffers()
        arguments = (
            torch.tensor(ids, device=device),
            cache.positions.to(device),
            masks,
            keys,
            values,
            cache.columns,
        )
        try:
            with grouped(self._model.config):
                if self._compiled is None:
                    return self._first(arguments)
                logits: torch.Tensor = self._compiled(*arguments)
                return logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.broken = True
            said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
            logger.warning(
                "The decode step can't be compiled and runs uncompiled: %s: %.300s",
                type(error).__name__,
                said,
            )
            return None

    def _first(self, arguments: tuple[Any, ...]) -> torch.Tensor:
        """Compile, which the first call does."""
        native.library()  # looked for now: the compiler can't trace that
        if are_native(self._model):
            logger.warning(
                "compile=True: this model's layers are C code, which was faster than compiled ones "
                "wherever it was measured; leave compile out."
            )
        # PyTorch keeps compiled code in the temporary folder, which a restart empties.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
        compiled = torch.compile(self._step, dynamic=True, fullgraph=True)
        start = time.perf_counter()
        with warnings.catch_warnings():  # the compiler's own, which nobody here can mend
            warnings.simplefilter("ignore")
            logits: torch.Tensor = compiled(*arguments)
        logger.info("Compiled the decode step in %.0f s.", time.perf_counter() - start)
        self._compiled = compiled
        return logits

    def _step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        columns: int,
    ) -> torch.Tensor:
        cache = StepCache(keys, values, positions, columns)
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=masks,
            use_cache=True,
            **{self._argument: cache},
        ).logits
        return logits
