"""The decode loop: `admit`, `step`, `retire`. Ids in, ids out; it knows no text, chat or HTTP.

A `Generation` is one answer being decoded. It owns rows of the batch: a plain one has one row, a
steered one a preferred row per preference and one base row. All rows take part in one forward pass
per step; the scores of a generation's rows are combined into one distribution, one token is
chosen from it and appended to all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from amulet.cache import RowCache, cache_argument, check_supported
from amulet.errors import DecodeError, OutOfMemoryError
from amulet.mixture import Mixture, TokenScores
from amulet.sampling import Sampling, choose, penalise


@dataclass(eq=False)
class Generation:
    """One answer being decoded.

    Args:
        prompts: ids of each of its rows: the preferred prompts, then the base prompt; one alone
            is decoded as it is.
        weights: w_i of `r + Σ w_i·(p_i − r)`, one per preferred row. May be changed between
            steps: all zero decodes the base row, that is plainly.
        floor: plausibility floor in [0, 1]: tokens below this share of the likeliest preferred
            token's probability are excluded; 0 is off.
        max_new_tokens: limit in tokens.
        sampling: how tokens are chosen.
        seed: for sampling; None draws one.
        end_ids: ids that end the answer.
        on_token: called with each id but the ending one as it is decoded; True ends the answer.
        allowed: called before each choice; a bool mask `[vocab]` of permitted ids, or None.
        processors: Transformers logits processors, applied to the combined scores.
        trace: collect `TokenScores`; with `top_logprobs` alternatives each.
    """

    prompts: Sequence[list[int]]
    weights: Sequence[float] = ()
    floor: float = 0.0
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    end_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] | None = None
    allowed: Callable[[], torch.Tensor | None] | None = None
    processors: Sequence[LogitsProcessor] = ()
    trace: bool = False
    top_logprobs: int = 0

    token_ids: list[int] = field(default_factory=list, init=False)
    scores: list[TokenScores] = field(default_factory=list, init=False)
    finish_reason: str | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    rows: list[int] = field(default_factory=list, init=False, repr=False)
    generator: torch.Generator | None = field(default=None, init=False, repr=False)
    seen: torch.Tensor | None = field(default=None, init=False, repr=False)

    @property
    def done(self) -> bool:
        """Whether it takes part in no further step."""
        return self.finish_reason is not None or self.error is not None


class Engine:
    """Decodes any number of generations together over one model. Not thread-safe: see `Driver`."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model)
        self.model = model
        self.running: list[Generation] = []
        # True while tokens are handed over: an interrupt elsewhere loses nothing, as the step is
        # simply made again.
        self.committing = False
        self._cache = RowCache()
        self._cache_argument = cache_argument(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._owners: list[tuple[Generation, int]] = []  # of row i: whose it is, and which

    @property
    def device(self) -> torch.device:
        """Where token ids are expected."""
        return self.model.device

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the KV cache."""
        return self._cache.nbytes

    @torch.inference_mode()
    def admit(self, generation: Generation) -> None:
        """Prefill a generation's prompts, decode its first token, and let it join the batch.

        Its rows share their common prefix: that is computed once and copied.

        Raises:
            OutOfMemoryError: there is no room; the running generations are unharmed.
        """
        first, rows = len(self._owners), len(generation.prompts)
        longest = max(map(len, generation.prompts))
        try:
            self._cache.reserve(first + rows, longest + 1)
            logits = self._prefill(generation.prompts, first)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(first + rows, longest) from error
        self._prepare(generation, logits)
        generation.rows = list(range(first, first + rows))
        self._owners += [(generation, i) for i in range(rows)]
        self.running.append(generation)
        self._decide([generation], logits, list(range(rows)))
        self.sweep()

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token of every running generation; those that end leave the batch."""
        if not self.running:
            return
        ids = [[generation.token_ids[-1]] for generation, _ in self._owners]
        starts = [
            len(generation.prompts[i]) + len(generation.token_ids) - 1
            for generation, i in self._owners
        ]
        try:
            self._cache.reserve(len(ids), max(starts) + 1)
            logits = self._forward(ids, starts, first=0)[:, -1]  # [rows, vocab]
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(len(ids), max(starts)) from error
        order = [row for generation in self.running for row in generation.rows]
        self._decide(self.running, logits, order)
        self.sweep()

    def retire(self, generation: Generation, reason: str = "cancelled") -> None:
        """End a generation now; its rows leave the batch."""
        if not generation.done:
            generation.finish_reason = reason
        self.sweep()

    @torch.inference_mode()
    def sweep(self) -> None:
        """Drop the rows of finished generations; the last rows move into their places."""
        if all(not generation.done for generation in self.running):
            return
        for row in range(len(self._owners) - 1, -1, -1):
            if self._owners[row][0].done:
                generation, i = self._owners.pop()
                if row < len(self._owners):
                    length = len(generation.prompts[i]) + len(generation.token_ids) - 1
                    self._cache.copy_row(len(self._owners), row, length)
                    self._owners[row] = (generation, i)
                    generation.rows[i] = row
        self.running = [generation for generation in self.running if not generation.done]
        if not self.running:
            self._cache.clear()

    def fail_all(self, error: BaseException) -> None:
        """End every running generation with an error and free the cache."""
        for generation in self.running:
            generation.error = error
        self.running, self._owners = [], []
        self.committing = False
        self._cache.clear()

    def _prepare(self, generation: Generation, logits: torch.Tensor) -> None:
        if generation.sampling.temperature > 0:
            generation.generator = torch.Generator(device=logits.device)
            if generation.seed is None:
                generation.generator.seed()
            else:
                generation.generator.manual_seed(generation.seed)
        if generation.sampling.repetition_penalty != 1.0:
            seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            seen[torch.tensor(generation.prompts[0], device=logits.device)] = True
            generation.seen = seen

    def _prefill(self, prompts: Sequence[list[int]], first: int) -> torch.Tensor:
        """Fill the rows from `first` on; return the logits after each prompt, `[rows, vocab]`."""
        shared = common_prefix(prompts)
        if shared:
            self._forward([prompts[0][:shared]], [0], first)
            for row in range(1, len(prompts)):
                self._cache.copy_row(first, first + row, shared)
        # Padding on the right is harmless: its columns lie behind the row's end.
        rests = [prompt[shared:] for prompt in prompts]
        width = max(map(len, rests))
        padded = [rest + [0] * (width - len(rest)) for rest in rests]
        keep = sorted({len(rest) - 1 for rest in rests})
        logits = self._forward(padded, [shared] * len(rests), first, keep)
        last = [keep.index(len(rest) - 1) for rest in rests]
        return logits[torch.arange(len(rests)), last]

    def _forward(
        self,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        first: int,
        keep: list[int] | None = None,
    ) -> torch.Tensor:
        """One pass over rows `first ...`; return float logits `[rows, kept positions, vocab]`."""
        device, model = self.device, self.model
        self._cache.begin(first, starts, len(ids[0]))
        options: dict[str, Any] = {self._cache_argument: self._cache}
        if self._keeps_logits:
            options["logits_to_keep"] = 1 if keep is None else torch.tensor(keep, device=device)
        logits: torch.Tensor = model(
            input_ids=torch.tensor(ids, device=device),
            position_ids=self._cache.positions.to(device),
            attention_mask=self._cache.masks(model.config, model.dtype, device),
            use_cache=True,
            **options,
        ).logits
        if not self._keeps_logits:
            logits = logits[:, -1:] if keep is None else logits[:, keep]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _decide(
        self, generations: Sequence[Generation], logits: torch.Tensor, order: Sequence[int]
    ) -> None:
        """Combine, cut, choose and append one token per generation.

        Args:
            generations: whose tokens are chosen.
            logits: float `[rows, vocab]`.
            order: the rows of the first generation, then those of the second, ...
        """
        logits = logits[torch.tensor(order, device=logits.device)]
        mix = Mixture(
            logits,
            [generation.weights for generation in generations],
            [len(generation.prompts) for generation in generations],
        )
        mix.cut(
            [generation.floor for generation in generations],
            [self._allowed(generation, logits) for generation in generations],
        )
        scores = mix.scores
        if any(generation.trace for generation in generations):
            scores = scores.clone()  # the trace shows them as they are before the penalties
        for i, generation in enumerate(generations):
            if generation.error is None:
                self._process(generation, scores[i])
        chosen = choose(
            scores,
            [generation.sampling for generation in generations],
            [generation.generator for generation in generations],
        )
        token_ids = chosen.tolist()  # the step's one transfer to the host
        self.committing = True
        for i, (generation, token_id) in enumerate(zip(generations, token_ids, strict=True)):
            if generation.error is None:
                if generation.trace:
                    generation.scores.append(mix.trace(i, token_id, generation.top_logprobs))
                self._append(generation, token_id)
        self.committing = False

    def _allowed(self, generation: Generation, logits: torch.Tensor) -> torch.Tensor | None:
        """Ask a generation's grammar for the permitted ids; its failure is that generation's own."""
        if generation.allowed is None:
            return None
        try:
            mask = generation.allowed()
        except Exception as error:
            generation.error = error
            return None
        return None if mask is None else mask.to(logits.device)

    def _process(self, generation: Generation, scores: torch.Tensor) -> None:
        """Apply a generation's own processors and repetition penalty to its scores, in place."""
        try:
            if generation.seen is not None:
                penalty = generation.sampling.repetition_penalty
                scores.copy_(penalise(scores, generation.seen, penalty))
            if generation.processors:
                ids = torch.tensor(
                    [generation.prompts[0] + generation.token_ids], device=scores.device
                )
                for processor in generation.processors:
                    scores.copy_(processor(ids, scores[None].clone())[0])
        except Exception as error:
            generation.error = error

    def _append(self, generation: Generation, token_id: int) -> None:
        generation.token_ids.append(token_id)
        if generation.seen is not None:
            generation.seen[token_id] = True
        if token_id in generation.end_ids:
            generation.finish_reason = "stop"
            return
        try:
            stopped = generation.on_token is not None and generation.on_token(token_id)
        except Exception as error:
            generation.error = error
            return
        if generation.done:  # cancelled meanwhile
            return
        if stopped:
            generation.finish_reason = "stop"
        elif len(generation.token_ids) >= generation.max_new_tokens:
            generation.finish_reason = "length"

    def _out_of_memory(self, rows: int, tokens: int) -> DecodeError:
        return OutOfMemoryError(
            f"Out of memory on {self.device} with {rows} rows of up to {tokens} tokens "
            f"({self.cache_bytes / 2**20:.0f} MiB of KV cache); use fewer requests at once, a "
            "shorter prompt, or a smaller dtype."
        )


def common_prefix(prompts: Sequence[list[int]]) -> int:
    """Return how many leading ids all prompts share, leaving each at least one of its own."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    for i in range(shortest):
        if any(prompt[i] != prompts[0][i] for prompt in prompts[1:]):
            return i
    return shortest
