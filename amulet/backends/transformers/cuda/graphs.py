"""Runs decode steps on a GPU as CUDA graphs: one launch instead of a thousand.

A GPU finishes most operations of a step before Python has launched the next one. A graph records a
step once per number of rows and of tokens per row, over all columns of the cache. A step then fills
in ids and positions and replays the graph. When the cache grows, graphs are recorded again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from amulet.backends.transfer import on_device
from amulet.backends.transformers.attention import grouped, try_triton
from amulet.backends.transformers.cache import RowCache
from amulet.backends.transformers.compiled import LEAST_ROWS, CompiledStep, forward_step
from amulet.backends.transformers.masks import has_indexer, has_states
from amulet.backends.transformers.weights import hooks
from amulet.errors import one_line

logger = logging.getLogger("amulet")

_recording_lock = (
    threading.Lock()
)  # one recording at a time per process; otherwise PyTorch fails both

GraphShape = tuple[int, int, bool]  # rows, tokens per row, and whether it is compiled


class Graph(NamedTuple):
    """A recorded pass: its inputs, the recording, and its logits."""

    given: torch.Tensor  # ids, positions and target columns, `[3, rows, width]`
    recording: torch.cuda.CUDAGraph
    logits: torch.Tensor  # `[rows, width, vocab]`; the next replay overwrites them


class StepGraphs:
    """The CUDA graphs of one model's steps.

    Args:
        model: a model that `check_supported` accepts.
        compiled: its compiled step, recorded if compiled steps are requested.
    """

    def __init__(self, model: PreTrainedModel, compiled: CompiledStep) -> None:
        self._model, self._compiled = model, compiled
        self._graphs: dict[GraphShape, Graph] = {}
        self._asked: set[GraphShape] = set()
        self._layout: object = None  # of the cache that the graphs use
        self._recorded: Any = []  # the model's fingerprint; None if it can't be recorded
        self._pool: Any = None  # their intermediate results share memory
        self._possible = model.device.type == "cuda" and _can_record(model)

    @property
    def serves(self) -> bool:
        """Tells whether steps are recorded.

        That is so on a GPU, if no Python code of the model has to run at every step and no
        recording has failed.
        """
        return self._possible and bool(self._recorded)

    def refresh(self, compiles: bool) -> bool:
        """Drop the graphs if the model has changed since they were recorded; once per answer.

        Args:
            compiles: whether compiled steps will be recorded.

        Returns:
            Whether the model has changed.
        """
        changed = self._possible and _fingerprint(self._model) != self._recorded
        if compiles and (changed or not self.serves):
            self._compiled.prepare()
        if not changed:
            return False
        if not self._recorded:
            try_triton(self._model)
        self._graphs.clear()
        self._recorded = _fingerprint(self._model)
        if self._recorded is None:
            logger.info("Decode steps can't be CUDA graphs: hooks or an adapter run at every step.")
        return True

    def blank(self) -> None:
        """Erase the last steps' tokens and logits."""
        for graph in self._graphs.values():
            graph.given.zero_()
            graph.logits.zero_()

    def __call__(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], cache: RowCache, compiled: bool
    ) -> torch.Tensor | None:
        """Pass each row's new tokens; return logits `[rows, width, vocab]`.

        None if there is no graph, in particular at a shape's first use, which may be its last. Then
        nothing has changed, and the pass can be run without a graph. The logits are valid until the
        next call.

        Args:
            ids: the same number for every row.
            starts: for each row, the column of its first id.
            cache: the rows are its first rows.
            compiled: record the compiled step.
        """
        if not self.serves:
            return None
        width, least = _width(len(ids[0])), LEAST_ROWS if compiled else 1
        cache.reserve(least, 0)
        most, columns = cache.capacity
        rows = min(_rows(max(len(ids), least)), most)
        shape = rows, width, compiled
        # Spare rows write to an unused column; if there is none, the cache is about to grow.
        if shape not in self._asked or max(starts) + width >= columns:
            self._asked.add(shape)
            return None
        if cache.layout is not self._layout:
            self._graphs.clear()
            self._layout = cache.layout
        given = _given(ids, starts, rows, width, columns - 1)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._record(given, cache, compiled)
            if graph is None:
                return None
            if compiled and (found := _fingerprint(self._model)) != self._recorded:
                self._graphs.clear()  # compiling has moved weights that they read
                self._recorded = found
            self._graphs[shape] = graph
        graph.given.copy_(on_device(given, graph.given.device), non_blocking=True)
        graph.recording.replay()
        return graph.logits[: len(ids), : len(ids[0])]

    def _record(self, given: Any, cache: RowCache, compiled: bool) -> Graph | None:
        device = self._model.device
        inputs = torch.tensor(given, device=device)
        keys, values = cache.buffers(0, inputs.shape[1])
        arguments: tuple[Any, ...] = (*inputs.unbind(), keys, values, cache.capacity[1])

        def forward() -> torch.Tensor:
            logits = self._compiled(*arguments) if compiled else None
            return forward_step(self._model, *arguments) if logits is None else logits

        try:
            with _recording_lock, grouped():
                return self._recording(inputs, forward)
        except Exception as error:  # also out of memory, of which a single pass takes less
            self._possible = False
            self._graphs.clear()
            logger.info(
                "Decode steps can't be CUDA graphs: %s: %.300s",
                type(error).__name__,
                one_line(error),
            )
            return None

    def _recording(self, inputs: torch.Tensor, forward: Callable[[], torch.Tensor]) -> Graph:
        stream: Any = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(stream):
            forward()  # first-time compilation and set-up can't be recorded
        torch.cuda.current_stream(inputs.device).wait_stream(stream)
        recording = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(
            recording, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            logits = forward()
        return Graph(inputs, recording, logits)


def _given(
    ids: Sequence[Sequence[int]], starts: Sequence[int], rows: int, width: int, spare: int
) -> list[list[list[int]]]:
    """Return ids, positions and target columns, `[3, rows, width]`.

    Unused rows write to the unused column `spare`. Tokens beyond a row's new ones are after its
    end, where they do no harm.
    """
    real, empty = len(ids[0]), rows - len(ids)
    short = [0] * (width - real)
    # Their positions stay within the row: a model may have no more than it needs.
    places = [[start + min(i, real - 1) for i in range(width)] for start in starts]
    targets = [list(range(start, start + width)) for start in starts]
    return [
        [[*row, *short] for row in ids] + [[0] * width] * empty,
        places + [[0] * width] * empty,
        targets + [[spare] * width] * empty,
    ]


def _rows(rows: int) -> int:
    """Return the number of rows of the graph to use for `rows` rows.

    An unused row costs little, because it attends to one column; each graph takes a tenth of a
    second and memory.
    """
    return 1 << (rows - 1).bit_length()


def _width(width: int) -> int:
    """Return the tokens per row of the graph to use for `width` tokens per row."""
    return 1 if width == 1 else -(-width // 4) * 4


def _can_record(model: PreTrainedModel) -> bool:
    """Tell whether a model's steps are the same operations at every position, without waiting.

    Experts are chosen, and some rotary embeddings change, on the host. Llama 4 may scale by the
    number of cached tokens. A failed recording corrupts PyTorch's memory management. Graphs
    cover keys and values only, not recurrent states or an indexer's keys.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = str(rope)  # of one kind for all layers, or one for each kind of layer
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return not (
        has_states(config)
        or has_indexer(config)
        or any(getattr(config, name, None) for name in counts)
        or "longrope" in kinds
        or "dynamic" in kinds
        or getattr(config, "attn_temperature_tuning", None)
    )


def _fingerprint(model: nn.Module) -> Any:
    """Return a value that changes with the model; None if steps can't be recorded.

    Hooks and adapters run Python code, which a graph would leave out.
    """
    found: list[int] = []
    left: list[Any] = [model]
    while left:  # an answer waits for this; `modules()` and `parameters()` take five times as long
        module = left.pop()
        own, children = vars(module), module._modules
        if hooks(module) or "_hf_hook" in own:
            return None
        if "base_layer" in children:  # a PEFT adapter around it
            return None
        found.append(id(module))
        found += [p.data_ptr() for p in module._parameters.values() if p is not None]
        left += [child for child in children.values() if child is not None]
    return found
