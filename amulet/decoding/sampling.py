"""From scores to one token per request: pure functions on `[requests, vocab]`, one value per row.

The order of Transformers' warpers: repetition penalty, temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amulet.backends.transfer import on_device

NEVER = float("-inf")
COLDEST = 1e-6  # scores are float32: their last bit is more than this


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens; ranges are checked by `Request`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is chosen: below `COLDEST` a draw would choose it too."""
        return self.temperature < COLDEST


def penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return scores `[vocab]` with the seen tokens made less likely (CTRL, arXiv 1909.05858).

    Args:
        scores: logits or log-probabilities of one request, `[vocab]`.
        seen: bool `[vocab]`, the tokens of its prompt and answer.
        penalty: above 1 lowers them, below 1 raises them.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(scores: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Return scores `[requests, vocab]` after temperature, top-k, top-p and min-p.

    Every temperature must be at least `COLDEST`. Stages that no request uses are skipped.
    """

    def column(values: list[float]) -> torch.Tensor:
        return on_device(values, scores.device, scores.dtype)[:, None]

    scores = scores / column([s.temperature for s in samplings])
    vocab = scores.shape[-1]
    if any(s.top_k or s.top_p < 1.0 for s in samplings):
        ordered, index = scores.sort(dim=-1, descending=True)
        ks = column([float(min(s.top_k or vocab, vocab)) for s in samplings])
        # Ties with the k-th token stay, as in Transformers: the cut does not depend on the order.
        kth = ordered.gather(1, ks.long() - 1)
        ordered = ordered.masked_fill(ordered < kth, NEVER)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = before >= column([s.top_p for s in samplings])
        outside[:, 0] = False
        outside &= column([s.top_p for s in samplings]) < 1.0
        scores = torch.empty_like(scores).scatter_(1, index, ordered.masked_fill(outside, NEVER))
    if any(s.min_p for s in samplings):
        probabilities = scores.softmax(dim=-1)
        least = column([s.min_p for s in samplings]) * probabilities.amax(dim=-1, keepdim=True)
        scores = scores.masked_fill(probabilities < least, NEVER)
    return scores


def draw(scores: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw one token per request from softmax(scores), `[requests]`, int64.

    Each request's noise comes from its own generator, so its tokens do not depend on the rest of
    the batch. The argmax of `probability / exponential noise` is an exact draw and, unlike
    multinomial, needs no synchronisation with the host.
    """
    noise = torch.stack(
        [
            torch.empty(scores.shape[-1], dtype=torch.float32, device=scores.device).exponential_(
                generator=generator
            )
            for generator in generators
        ]
    )
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)


def choose(
    scores: torch.Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator | None],
) -> torch.Tensor:
    """Return the next token of each request, `[requests]`: argmax or a draw."""
    chosen = scores.argmax(dim=-1)
    drawn = [i for i, sampling in enumerate(samplings) if not sampling.is_greedy]
    if drawn:
        own = [generator for i in drawn if (generator := generators[i]) is not None]
        index = on_device(drawn, scores.device)
        warped = warp(scores[index], [samplings[i] for i in drawn])
        chosen[index] = draw(warped, own)
    return chosen
