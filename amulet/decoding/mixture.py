"""Combines the rows of each generation in a step, applies the floor, and records traces.

`Mixture.scores` has one row per generation, `[generations, vocab]`, float32 or wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from amulet.backends.transfer import on_device
from amulet.decoding.sampling import NEVER
from amulet.game import steer, steer_many

FORCED = 50.0  # nats: the least that a processor adds to force a token, or takes to forbid it


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
        rows: the number of rows of each generation.
        exact: for each generation, whether its scores' absolute values matter; None means all. If
            not, its rows aren't normalised: that would shift all its scores by a constant, which
            changes no draw and no comparison with the likeliest token.

    Attributes:
        scores: unnormalised log-scores `[generations, vocab]`: `r + Σ w_i·(p_i − r)`. For a plain
            generation they are the logits, as Transformers' own processors get them.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        weights: Sequence[Sequence[float]],
        rows: Sequence[int],
        exact: Sequence[bool] | None = None,
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
        self._logits = take_rows(logits, base)
        self.scores = self._logits
        self._permitted: torch.Tensor | None = None
        self._wanted: torch.Tensor | None = None  # the rows of positive weight, and whose they are
        self._wanted_by: list[int] = []
        self._shares = [share for share in shares if share]  # theirs in the sum of each owner's
        if not preferred:
            return
        rows_log = logits
        if exact is None or any(exact):
            rows_log = logits.log_softmax(dim=-1)
            if exact is not None and not all(exact):
                own = [e for e, count in zip(exact, rows, strict=True) for _ in range(count)]
                rows_log = torch.where(on_device(own, logits.device)[:, None], rows_log, logits)
        base_log = take_rows(rows_log, base)
        preferred_log = take_rows(rows_log, preferred)
        positive = [i for i, share in enumerate(shares) if share]
        if positive:
            self._wanted = take_rows(preferred_log, positive)
            self._wanted_by = [owner[i] for i in positive]
        w = _constant(tuple(flat), logits.device, logits.dtype)
        if owner == list(range(len(base))) and all(shares):  # one preference each: no scatter
            steered = steer(preferred_log, base_log, w[:, None] - 1.0)
            least = torch.minimum(preferred_log, base_log)
        else:
            by_owner = on_device(owner, logits.device)
            steered = steer_many(preferred_log, base_log, w, by_owner)
            places = by_owner[:, None].expand_as(preferred_log)
            least = base_log.scatter_reduce(0, places, preferred_log, "amin")
        # A token that the model itself excludes (−inf) would be NaN in a difference.
        steered = steered.masked_fill(least == NEVER, NEVER)
        if len(set(owner)) == len(base):
            self.scores = steered
        else:
            is_steered = torch.zeros(len(base), 1, dtype=torch.bool, device=logits.device)
            is_steered[on_device(owner, logits.device)] = True
            self.scores = torch.where(is_steered, steered, self._logits)

    def _preferred_log(self, i: int) -> torch.Tensor | None:
        """Log-probabilities of generation `i` with its preferences, `[vocab]`.

        With several their mean by positive weight; None with none of that.
        """
        found: torch.Tensor | None = None
        for place, (owner, share) in enumerate(zip(self._wanted_by, self._shares, strict=True)):
            if owner == i and self._wanted is not None:
                part = share * self._wanted[place].log_softmax(dim=-1)
                found = part if found is None else found + part
        return found

    def permit(self, allowed: Sequence[torch.Tensor | None]) -> None:
        """Exclude the tokens that a grammar forbids from `scores`.

        Args:
            allowed: for each generation a bool mask `[vocab]` of permitted ids, or None.
        """
        for i, mask in enumerate(allowed):
            if mask is not None:
                if self._permitted is None:
                    self._permitted = torch.ones_like(self.scores, dtype=torch.bool)
                self._permitted[i] = False  # ids behind the tokenizer's last are not permitted
                size = min(mask.shape[0], self._permitted.shape[1])
                self._permitted[i, :size] = mask[:size]
        if self._permitted is not None:
            self.scores = self.scores.masked_fill(~self._permitted, NEVER)

    def lower(self, costs: Sequence[Mapping[int, float]]) -> None:
        """Take nats from the scores of single tokens: `{token id: nats}` for each generation."""
        places = [(i, token) for i, own in enumerate(costs) for token in own]
        if places:
            device = self.scores.device
            where = on_device(places, device).unbind(dim=1)
            nats = on_device([-cost for own in costs for cost in own.values()], device)
            nats = nats.to(self.scores.dtype)
            self.scores = self.scores.index_put(where, nats, accumulate=True)

    def cut(
        self,
        floors: Sequence[float],
        allowed: Sequence[torch.Tensor | None] = (),
        moved: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Exclude tokens below the plausibility floor from `scores`.

        The floor (Contrastive Decoding, arXiv 2210.15097, equation 2) is relative to the
        likeliest permitted token of a preferred row, so at least one token survives. The caller's
        logits processors take precedence: a token that they forbid is not permitted, and a token
        that they force is not cut.

        Args:
            floors: for each generation a share in [0, 1] of the likeliest token's probability;
                0 is off.
            allowed: further masks of permitted tokens; see `permit`.
            moved: the values that logits processors added to the scores, `[generations, vocab]`;
                None without processors.

        Returns:
            Which tokens the floor excludes, bool `[generations, vocab]`; None if it is off.
        """
        self.permit(allowed)
        if not any(floors):
            return None
        permitted = self._permitted
        if moved is not None:
            possible = moved > NEVER
            likely = moved > -FORCED  # not all processors forbid tokens with -inf
            permitted = possible if permitted is None else possible & permitted
            likely &= permitted
            permitted = torch.where(likely.any(dim=-1, keepdim=True), likely, permitted)
        plausibility = self._plausibility(permitted)
        shares = on_device(floors, plausibility.device, plausibility.dtype)
        excluded = plausibility < shares.log()[:, None]
        if moved is not None:
            excluded &= moved < FORCED
        self.scores = self.scores.masked_fill(excluded, NEVER)
        return excluded

    def _plausibility(self, permitted: torch.Tensor | None) -> torch.Tensor:
        """Return each token's log-probability minus the likeliest permitted one's.

        With several preferences it is the maximum over their rows, because each may propose tokens
        that the others find implausible. Without a preference of positive weight it is the base
        row's. The shape is `[generations, vocab]`.
        """
        if self._wanted is not None and self._wanted_by == list(range(len(self.scores))):
            return _relative(self._wanted, permitted)
        relative = _relative(self._logits, permitted)
        if self._wanted is None:
            return relative
        wanted_by = on_device(self._wanted_by, relative.device)
        wanted = _relative(self._wanted, None if permitted is None else permitted[wanted_by])
        relative = relative.clone()
        relative[wanted_by] = NEVER
        return relative.scatter_reduce(0, wanted_by[:, None].expand_as(wanted), wanted, "amax")

    def trace(self, i: int, token_id: int, top: int) -> TokenScores:
        """Return the log-probabilities of the token that generation `i` emitted."""
        base = self._logits[i].log_softmax(dim=-1)
        preferred = self._preferred_log(i)
        steered = self.scores[i].log_softmax(dim=-1)
        best = steered.topk(min(top, steered.shape[0]))
        return TokenScores(
            preferred=(base if preferred is None else preferred)[token_id].item(),
            base=base[token_id].item(),
            steered=steered[token_id].item(),
            unsteered_id=int(base.argmax()),
            top=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        )


def _relative(logs: torch.Tensor, permitted: torch.Tensor | None) -> torch.Tensor:
    likely = logs if permitted is None else logs.masked_fill(~permitted, NEVER)
    return logs - likely.amax(dim=-1, keepdim=True)


@lru_cache(maxsize=16)
def _constant(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights on the device, `[preferences]`; cached, as many steps use the same."""
    return on_device(weights, device, dtype)


def take_rows(rows: torch.Tensor, index: Sequence[int]) -> torch.Tensor:
    """Return `rows[index]`; a view if the index increases in equal steps, which is usual."""
    return rows[_places(index, rows.device)]


def put_rows(rows: torch.Tensor, index: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Write values into `rows[index]`, in place, and return `rows`."""
    rows[_places(index, rows.device)] = values.to(rows.dtype)
    return rows


def _places(index: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and list(index) == list(range(index[0], index[-1] + 1, step)):
        return slice(index[0], index[-1] + 1, step)
    return on_device(index, device)


def positive_shares(weights: Sequence[float]) -> list[float]:
    """Return the weights' positive parts, scaled to sum to 1 (all 0 if none is positive)."""
    positive = [max(weight, 0.0) for weight in weights]
    total = sum(positive)
    return [weight / total if total else 0.0 for weight in positive]
