"""The logits processor that combines the rows of each steered request and chooses one token.

vLLM calls it once per step for the whole batch, `[rows, vocab]` in float32, after `min_tokens`,
`logit_bias` and `bad_words` and before temperature. It computes with `amulet.decoding.mixture`, as
Amulet's own engine does, and draws the same tokens if the request has a seed. The token is drawn
here, once; then every row of the request has no other choice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from amulet.backends.transfer import on_device
from amulet.decoding.loop_guard import Repeats
from amulet.decoding.mixture import Mixture, put_rows, take_rows
from amulet.decoding.sampling import NEVER, Sampling, draw, warp
from amulet.vllm_backend.version import check_vllm
from amulet.vllm_backend.wire import Pair, Row

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

check_vllm()


@dataclass
class _Entry:
    """A row in the batch: its `Row`, its prompt, and vLLM's own list of its output tokens."""

    row: Row
    prompt: list[int]
    output: list[int]


@dataclass
class _Steered:
    """A request whose rows are all in the batch.

    Attributes:
        row: its first row.
        indices: positions of its rows in the batch, the base row last.
        prompt: token ids of its base row.
        output: output tokens of its first row: vLLM's own list, which grows.
        generator: the generator of its draws, which has drawn for `drawn` tokens.
        read: the number of output tokens searched for spans; `inside` tells whether a span is open
            after them, and `behind` is the end of the last closed one.
        header: where the header after the last message began; -1 inside a message.
    """

    row: Row
    indices: list[int]
    prompt: list[int]
    output: list[int]
    generator: torch.Generator | None = None
    drawn: int = 0
    read: int = 0
    inside: bool = field(init=False)
    behind: int = 0
    header: int = field(init=False)
    sampling: Sampling = field(default_factory=Sampling)
    repeats: Repeats | None = None

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.read, self.behind, self.inside = 0, 0, self.row.pair.inside
        self.header = 0 if self.inside else -1

    def weights(self) -> Sequence[float]:
        """Return the weights w_i of this step; none inside a machine-read span."""
        pair = self.row.pair
        if pair.spans or pair.heads:
            if len(self.output) < self.read:
                self._begin()
            for place, token in enumerate(self.output[self.read :], self.read + 1):
                for opening, closing in pair.spans or ():
                    if token in (opening, closing):
                        self.inside, self.behind = token == opening, place
                if pair.heads:
                    self._read_header(token, place, pair.heads, pair.ends or ())
            self.read = len(self.output)
        return [0.0] * len(pair.weights) if self.inside else pair.weights

    def _read_header(
        self, token: int, place: int, heads: Sequence[list[int]], ends: Sequence[int]
    ) -> None:
        """Take a token of an answer whose messages have headers; `place` is where it ends."""
        if token in ends:
            self.inside, self.header = True, place
        elif self.header >= 0 and token == heads[0][-1]:
            self.inside = self.output[self.header : place] not in heads
            self.header, self.behind = -1, place

    def costs(self, weights: Sequence[float]) -> dict[int, float]:
        """Return the loop guard's penalties in this step, for the tokens after the last span."""
        guard = self.row.pair.loop_guard
        if not guard or not any(weights):
            self.repeats = None
            return {}
        if self.repeats is None or len(self.output) < self.repeats.read:
            self.repeats = Repeats(guard, start=self.behind)
        return self.repeats.costs(self.output)

    def noise(self, device: torch.device, vocab: int) -> torch.Generator:
        """Return the generator, positioned at the draw of the next token.

        Token n of a request takes the n-th draw, even after a preemption, and even if vLLM
        discarded the last choice, as it does while prompts are read in parts.
        """
        number = len(self.output)
        if self.generator is None or self.drawn != number:
            self.generator = torch.Generator(device=device)
            self.generator.manual_seed(self.row.seed)
            unread = torch.empty(vocab, dtype=torch.float32, device=device)
            for _ in range(number):
                unread.exponential_(generator=self.generator)
        self.drawn = number + 1
        return self.generator

    def number(self) -> float:
        """Return a number in [0, 1) for the next token, the same in every worker."""
        return random.Random(f"{self.row.seed} {len(self.output)}").random()


class PairProcessor(LogitsProcessor):
    """Combines rows; used by `--logits-processors amulet.vllm_backend.processor:PairProcessor`."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse an invalid pair; vLLM converts the error to an HTTP 400."""
        Pair.read(sampling_params.extra_args)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._entries: dict[int, _Entry] = {}
        self._steered: list[_Steered] = []

    def is_argmax_invariant(self) -> bool:
        """Return False: it changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Update the positions of the rows in the batch."""
        if process_dict_updates(self._entries, batch_update, _entry):
            self._steered = self._complete()

    def _complete(self) -> list[_Steered]:
        """Return the requests whose rows are all present, with their previous state."""
        known = {steered.row.request: steered for steered in self._steered}
        found: dict[str, dict[int, int]] = {}
        for index, entry in self._entries.items():
            found.setdefault(entry.row.request, {})[entry.row.number] = index
        complete = []
        for request, places in found.items():
            indices = [places[number] for number in sorted(places)]
            first, base = self._entries[indices[0]], self._entries[indices[-1]]
            if len(indices) < first.row.count:
                continue  # its prompts are still read in parts, so there is no token to choose
            before = known.get(request)
            if before is not None and before.output is first.output:
                before.indices = indices
                complete.append(before)
                continue
            row = first.row
            complete.append(
                _Steered(
                    row,
                    indices,
                    base.prompt,
                    first.output,
                    sampling=Sampling(row.temperature, row.top_k, row.top_p, row.min_p),
                )
            )
        return complete

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Write the combined scores into the rows of steered requests, in place."""
        steered = self._steered
        if not steered:
            return logits
        weights = [one.weights() for one in steered]
        mix = Mixture(
            take_rows(logits, [index for one in steered for index in one.indices]),
            weights,
            [len(one.indices) for one in steered],
        )
        mix.lower([one.costs(own) for one, own in zip(steered, weights, strict=True)])
        # Tokens that vLLM excluded are -inf in all rows, so the floor applies to the others.
        mix.cut([one.row.pair.floor for one in steered])
        scores = _penalised(mix.scores, steered)
        drawn = [i for i, one in enumerate(steered) if not one.sampling.is_greedy]
        if drawn:
            tokens = _drawn(take_rows(scores, drawn), [steered[i] for i in drawn])
            only = torch.full((len(drawn), scores.shape[-1]), NEVER, device=scores.device)
            only.scatter_(1, tokens[:, None], 0.0)
            scores = put_rows(scores.clone(), drawn, only) if len(drawn) < len(scores) else only
        # All first rows, then all second rows, ..., so the scores need not be repeated by row.
        for number in range(max(len(one.indices) for one in steered)):
            having = [i for i, one in enumerate(steered) if number < len(one.indices)]
            rows = [steered[i].indices[number] for i in having]
            put_rows(logits, rows, take_rows(scores, having))
        return logits


def _entry(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Entry | None:
    row = Row.read(params.extra_args)
    return None if row is None else _Entry(row, prompt or [], output)


def _drawn(scores: torch.Tensor, steered: Sequence[_Steered]) -> torch.Tensor:
    """Return a token for each request, `[requests]`, by its temperature, top-k, top-p and min-p.

    A request with a seed gets the token that Amulet's own engine draws, which takes noise for the
    whole vocabulary per request. The others take one number each, whose place in the cumulative
    probabilities is the token.
    """
    scores = warp(scores, [one.sampling for one in steered])
    tokens = torch.empty(len(steered), dtype=torch.int64, device=scores.device)
    seeded = [i for i, one in enumerate(steered) if one.row.is_seeded]
    if seeded:
        noise = [steered[i].noise(scores.device, scores.shape[-1]) for i in seeded]
        put_rows(tokens, seeded, draw(take_rows(scores, seeded), noise))
    others = [i for i, one in enumerate(steered) if not one.row.is_seeded]
    if others:
        upto = take_rows(scores, others).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        numbers = on_device([[steered[i].number()] for i in others], upto.device, upto.dtype)
        # Relative to the sum, which is 1 up to rounding, so that the place is never after the last
        # token.
        places = torch.searchsorted(upto, numbers * upto[:, -1:], right=True)
        put_rows(tokens, others, places[:, 0])
    return tokens


def _penalised(scores: torch.Tensor, steered: Sequence[_Steered]) -> torch.Tensor:
    """Apply penalties as vLLM does where requested, with the base row's prompt as the prompt.

    vLLM itself applies them later, when every row has another prompt, preferences included.
    """
    asked = [i for i, one in enumerate(steered) if tuple(one.row.penalties) != (1.0, 0.0, 0.0)]
    scores = scores.clone() if asked else scores
    for i in asked:
        repetition, presence, frequency = steered[i].row.penalties
        counts = Counter(steered[i].output)
        seen = on_device(list({*steered[i].prompt, *counts}), scores.device)
        found = scores[i, seen]
        scores[i, seen] = torch.where(found > 0, found / repetition, found * repetition)
        costs = [presence + frequency * count for count in counts.values()]
        said = on_device(list(counts), scores.device, torch.int64)
        scores[i, said] -= on_device(costs, scores.device, scores.dtype)
    return scores
