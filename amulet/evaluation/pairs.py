"""Decodes with Transformers' `generate`: beam search, the literal game, varying strength.

This is for methods that the library's own step does not support; it is slower, and greedy.
Preferred and base prompt are two rows of one batch, padded on the left. A logits processor writes
the combined scores into both rows, so that both continue with the same token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import GenerationConfig, LogitsProcessor

from amulet.evaluation.literal import play
from amulet.evaluation.methods import BEAMS, Method
from amulet.game import steer

if TYPE_CHECKING:
    from amulet import Amulet

HALF_LIFE = 32  # tokens after which `adapt=decay` has half its strength

Combine: TypeAlias = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass
class Decoded:
    """The tokens of one answer.

    Attributes:
        token_ids: every decoded id, the end-of-turn id included.
        finish_reason: "stop" or "length".
        changed: for each token, whether the base row's likeliest token is another one.
        gains: for each token, steered minus base log-probability.
    """

    token_ids: list[int]
    finish_reason: str
    changed: list[bool] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)


def combine_of(method: Method) -> Combine:
    """Return the function that combines p and r at a step to scores, `[answers, vocab]`.

    p and r are log-probabilities of that shape; steps count from 0. With g the strength:

        None, opposite, default-system   g
        jsd                              g·JSD(p, r), in bits, 0 to 1
        decay                            g·2^(−step/32)
        entropy                          g·min(1, H(p)), in nats
    """
    if method.kind == "amulet_literal":
        return lambda preferred, base, step: play(preferred, base)
    strength = method.strength or 0.0
    if method.adapt == "jsd":
        return lambda p, r, step: steer(p, r, strength * divergence(p, r))
    if method.adapt == "decay":
        return lambda p, r, step: steer(p, r, strength * 2.0 ** (-step / HALF_LIFE))
    if method.adapt == "entropy":
        return lambda p, r, step: steer(p, r, strength * entropy(p).clamp(max=1.0))
    return lambda p, r, step: steer(p, r, strength)


def divergence(p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of two log-distributions in bits, `[rows, 1]`."""
    middle = torch.logaddexp(p, r) - math.log(2.0)
    both = p.exp() * (p - middle) + r.exp() * (r - middle)
    return both.sum(dim=-1, keepdim=True) / (2.0 * math.log(2.0))


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a log-distribution in nats, `[rows, 1]`."""
    return -(p.exp() * p).sum(dim=-1, keepdim=True)


class Pairing(LogitsProcessor):
    """Combines rows 0..n−1 (preferred) with rows n..2n−1 (base); records each token's gain."""

    def __init__(self, combine: Combine, floor: float) -> None:
        self._combine = combine
        self._floor = floor
        self._step = 0
        self.changed: list[torch.Tensor] = []
        self.gains: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the combined scores twice, `[2n, vocab]`."""
        logs = scores.float().log_softmax(dim=-1)
        preferred, base = logs.chunk(2)
        combined = self._combine(preferred, base, self._step)
        if self._floor:
            least = preferred.amax(dim=-1, keepdim=True) + math.log(self._floor)
            combined = combined.masked_fill(preferred < least, -math.inf)
        best = combined.argmax(dim=-1, keepdim=True)
        gained = combined.log_softmax(dim=-1).gather(-1, best) - base.gather(-1, best)
        self.gains.append(gained[:, 0])
        self.changed.append(best[:, 0] != base.argmax(dim=-1))
        self._step += 1
        return combined.repeat(2, 1)


def decode_pairs(
    amulet: Amulet,
    prompts: Sequence[tuple[list[int], list[int]]],
    method: Method,
    max_new_tokens: int,
) -> list[Decoded]:
    """Return the greedy answers to (preferred, base) prompts, decoded in one batch."""
    rows = [preferred for preferred, _ in prompts] + [base for _, base in prompts]
    pairing = Pairing(combine_of(method), method.floor or 0.0)
    answers = _generate(amulet, rows, max_new_tokens, processors=[pairing])[: len(prompts)]
    gains = torch.stack(pairing.gains, dim=1).tolist()
    changed = torch.stack(pairing.changed, dim=1).tolist()
    for answer, gained, differs in zip(answers, gains, changed, strict=True):
        answer.gains = gained[: len(answer.token_ids)]
        answer.changed = differs[: len(answer.token_ids)]
    return answers


def decode_beams(
    amulet: Amulet, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[Decoded]:
    """Return the answers of a beam search, decoded in one batch of 16 rows each."""
    return _generate(amulet, prompts, max_new_tokens, beams=BEAMS)


def _generate(
    amulet: Amulet,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    beams: int = 1,
    processors: Sequence[LogitsProcessor] = (),
) -> list[Decoded]:
    longest = max(map(len, prompts))
    end_ids = sorted(amulet.end_ids)
    padding = end_ids[0] if end_ids else 0
    ids = torch.full((len(prompts), longest), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    # Overrides sampling and penalties in the model's own generation config.
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=beams,
        repetition_penalty=1.0,
        pad_token_id=padding,
        eos_token_id=end_ids or None,
    )
    out = amulet.model.generate(
        ids.to(amulet.model.device),
        attention_mask=mask.to(amulet.model.device),
        generation_config=config,
        logits_processor=list(processors),
    )
    return [_until_end(row, amulet.end_ids) for row in out[:, longest:].tolist()]


def _until_end(token_ids: list[int], end_ids: frozenset[int]) -> Decoded:
    for place, token_id in enumerate(token_ids):
        if token_id in end_ids:
            return Decoded(token_ids[: place + 1], "stop")
    return Decoded(token_ids, "length")
