"""The distributions of one step: combine each generation's rows, cut the implausible, explain.

`Mixture.scores` has one row per generation, `[generations, vocab]`, float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from amulet.gain import steer_many
from amulet.sampling import NEVER


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of one decoded token, and the plain model's choice; see `TokenTrace`."""

    preferred: float
    base: float
    steered: float
    unsteered_id: int
    top: tuple[tuple[int, float], ...] = ()


class Mixture:
    """Scores of several generations in one step.

    Args:
        logits: float `[rows, vocab]`: the first generation's preferred rows, its base row, then
            the second's, and so on.
        weights: for each generation the w_i of its preferred rows; all zero, or none, is plain.
        rows: for each generation how many rows it has.

    Attributes:
        scores: unnormalised log-scores `[generations, vocab]`: `r + Σ w_i·(p_i − r)`; the logits
            themselves where a generation is plain, so that what follows sees what Transformers'
            own processors would see.
        reference: log-probabilities that the plausibility floor and the trace refer to: the
            preferred row, or with several their mean by positive weight.
    """

    def __init__(
        self, logits: torch.Tensor, weights: Sequence[Sequence[float]], rows: Sequence[int]
    ) -> None:
        preferred: list[int] = []
        base: list[int] = []
        owner: list[int] = []
        flat: list[float] = []
        shares: list[float] = []
        for i, (own, count) in enumerate(zip(weights, rows, strict=True)):
            first = base[-1] + 1 if base else 0
            base.append(first + count - 1)
            if count > 1 and any(own):
                preferred += range(first, first + count - 1)
                owner += [i] * (count - 1)
                flat += own
                shares += positive_shares(own)
        self._logits = logits[torch.tensor(base, device=logits.device)]
        self.scores = self._logits
        self._reference: torch.Tensor | None = None
        self._base_log: torch.Tensor | None = None
        if not preferred:
            return
        rows_log = logits.log_softmax(dim=-1)
        self._base_log = rows_log[torch.tensor(base, device=logits.device)]
        preferred_log = rows_log[torch.tensor(preferred, device=logits.device)]
        owners = torch.tensor(owner, device=logits.device)
        w = torch.tensor([flat, shares], dtype=logits.dtype, device=logits.device)
        steered = steer_many(preferred_log, self._base_log, w[0], owners)
        self._reference = steer_many(preferred_log, self._base_log, w[1], owners)
        if len(set(owner)) == len(base):
            self.scores = steered
        else:
            is_steered = torch.zeros(len(base), 1, dtype=torch.bool, device=logits.device)
            is_steered[owners] = True
            self.scores = torch.where(is_steered, steered, self._logits)

    @property
    def base_log(self) -> torch.Tensor:
        """Log-probabilities of the base rows, `[generations, vocab]`."""
        if self._base_log is None:
            self._base_log = self._logits.log_softmax(dim=-1)
        return self._base_log

    @property
    def reference(self) -> torch.Tensor:
        """Log-probabilities of the preferred rows, `[generations, vocab]`; see the class."""
        return self.base_log if self._reference is None else self._reference

    def cut(self, floors: Sequence[float], allowed: Sequence[torch.Tensor | None]) -> None:
        """Exclude from `scores` what a grammar forbids and what is below the plausibility floor.

        The floor (Contrastive Decoding, arXiv 2210.15097, equation 2) is relative to the
        likeliest permitted token, so that one always survives both.

        Args:
            floors: for each generation a share in [0, 1] of the likeliest token's probability
                under `reference`; 0 is off.
            allowed: for each generation a bool mask `[vocab]` of permitted ids, or None.
        """
        permitted = None
        if any(mask is not None for mask in allowed):
            permitted = torch.ones_like(self.scores, dtype=torch.bool)
            for i, mask in enumerate(allowed):
                if mask is not None:
                    permitted[i] = False  # ids behind the tokenizer's last are not permitted
                    size = min(mask.shape[0], permitted.shape[1])
                    permitted[i, :size] = mask[:size]
            self.scores = self.scores.masked_fill(~permitted, NEVER)
        if any(floors):
            reference = self.reference
            if permitted is not None:
                reference = reference.masked_fill(~permitted, NEVER)
            shares = torch.tensor(floors, dtype=reference.dtype, device=reference.device)
            least = reference.amax(dim=-1, keepdim=True) + shares.log()[:, None]
            self.scores = self.scores.masked_fill(reference < least, NEVER)

    def trace(self, i: int, token_id: int, top: int) -> TokenScores:
        """Return what each row thought of the token that generation `i` emitted."""
        base = self.base_log[i]
        steered = self.scores[i].log_softmax(dim=-1)
        best = steered.topk(min(top, steered.shape[0]))
        return TokenScores(
            preferred=self.reference[i, token_id].item(),
            base=base[token_id].item(),
            steered=steered[token_id].item(),
            unsteered_id=int(base.argmax()),
            top=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


def positive_shares(weights: Sequence[float]) -> list[float]:
    """Return the weights' positive parts, made to sum to 1 (all 0 where none is positive)."""
    positive = [max(weight, 0.0) for weight in weights]
    total = sum(positive)
    return [weight / total if total else 0.0 for weight in positive]
