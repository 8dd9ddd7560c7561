"""Plays the paper's online game step by step over the vocabulary, in torch.

`amulet.game.game_gain` is its closed form. This module only serves to check that: it takes T passes
over the vocabulary for one multiply-add.
"""

from __future__ import annotations

import torch


def play(
    preferred: torch.Tensor,
    base: torch.Tensor,
    iterations: int = 60,
    alpha: float = 2.0,
    lam: float = 2.0,
    eta: float = 10.0,
) -> torch.Tensor:
    """Return `log π_T`, `[rows, vocab]`, from the log-probabilities p and r of the same shape.

    Each step is the closed form of one FTRL step (arXiv 2502.19148, section 3), normalised:

        log π_t ∝ (λ·p + (1/t)·Σ_{i=1..t} α·(log π_{i−1} − r) + (1/(η·t))·log π_{t−1})
                  / (λ + 1/(η·t)),        π_0 = exp p
    """
    policy, total = preferred, torch.zeros_like(preferred)
    for t in range(1, iterations + 1):
        total = total + alpha * (policy - base)
        inertia = 1.0 / (eta * t)
        policy = (lam * preferred + total / t + inertia * policy) / (lam + inertia)
        policy = policy.log_softmax(dim=-1)
    return policy
