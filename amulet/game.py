"""The paper's game as one gain, and the step that applies it to log-probabilities.

Paper: "Amulet: ReAlignment During Test Time for Personalized Preference Adaptation of LLMs",
arXiv 2502.19148. Every step of its online game is linear in the two log-distributions and its
coefficients sum to one, so T steps collapse to `log π ∝ p + g·(p − r)`.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

from amulet.errors import RequestError, shown

if TYPE_CHECKING:
    import torch


def game_gain(
    iterations: int = 60, alpha: float = 2.0, lam: float = 2.0, eta: float = 10.0
) -> float:
    """Return the gain g that is equivalent to T steps of the paper's game.

    The t-th policy is `log π_t ∝ p + b_t·(p − r)`, with

        b_0 = 0
        b_t = ((α/t)·Σ_{i<t} (b_i + 1) + b_{t−1}/(η·t)) / (λ + 1/(η·t))

    from the closed form of the paper's update (section 3, the FTRL step). The result is b_T.

    Args:
        iterations: T, the number of game steps, at least 0.
        alpha: α, the weight of the utility `log π − r`, at least 0.
        lam: λ, the weight that holds the policy to its start, above 0.
        eta: η, the step size, above 0.

    Raises:
        RequestError: a number is out of range or not finite.

    >>> round(game_gain(), 4)
    4.6487
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise RequestError(f"iterations={shown(iterations)}: expected a whole number, 0 or more.")
    for name, value, least in (("alpha", alpha, 0.0), ("lam", lam, None), ("eta", eta, None)):
        is_finite = isinstance(value, Real) and math.isfinite(value)
        if not is_finite or value < 0 or (least is None and value == 0):
            bound = "0 or more" if least is not None else "above 0"
            raise RequestError(f"{name}={shown(value)}: expected a finite number, {bound}.")
    gain, total = 0.0, 0.0
    for t in range(1, iterations + 1):
        total += gain + 1.0
        inertia = 1.0 / (eta * t)
        gain = (alpha / t * total + inertia * gain) / (lam + inertia)
    if not math.isfinite(gain):
        raise RequestError(
            f"iterations={iterations}, alpha={alpha}, lam={lam}, eta={eta} give an infinite gain; "
            "use fewer iterations, a smaller alpha or a larger lam."
        )
    return gain


def steer(preferred: torch.Tensor, base: torch.Tensor, gain: torch.Tensor | float) -> torch.Tensor:
    """Return the unnormalised log-scores `p + g·(p − r)`, shape `[..., vocab]`.

    Args:
        preferred: p, log-probabilities under the preferred row, finite, `[..., vocab]`.
        base: r, log-probabilities under the base row, same shape.
        gain: g, a number or a tensor that broadcasts, such as `[rows, 1]`. −1 gives r back,
            0 gives p back.

    Neither input is changed. Apply masks (−inf) after this step: −inf in both rows gives NaN here.
    """
    return base.lerp(preferred, gain + 1.0)  # one operation, which reads both once


def steer_many(
    preferred: torch.Tensor, base: torch.Tensor, weights: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    """Return `r + Σ_i w_i·(p_i − r)`, any number of preferences each, `[requests, vocab]`.

    Args:
        preferred: p_i, log-probabilities of all preferred rows, `[preferences, vocab]`.
        base: r, log-probabilities of each request's base row, `[requests, vocab]`.
        weights: w_i, `[preferences]`; with one preference w = 1 + g, and a negative weight
            steers away from it.
        owner: for each preferred row the index of its request, `[preferences]`, int64.
    """
    push = weights.unsqueeze(-1) * (preferred - base[owner])
    return base.index_add(0, owner, push)
