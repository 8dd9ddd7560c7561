"""The paper's online game played literally, T steps over the vocabulary, in NumPy float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(scores: Array) -> Array:
    """Return log-probabilities over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def literal_game(
    preferred: Array, base: Array, *, iterations: int, alpha: float, lam: float, eta: float
) -> Array:
    """Return `log π_T`, shape `[rows, vocab]`, from the log-probabilities p and r.

    Each step is the closed form of one FTRL step (arXiv 2502.19148, section 3), normalised:

        log π_t ∝ (λ·p + (1/t)·Σ_{i=1..t} α·(log π_{i−1} − r) + (1/(η·t))·log π_{t−1})
                  / (λ + 1/(η·t)),        π_0 = exp p
    """
    policy = preferred
    utility = np.zeros_like(preferred)
    for t in range(1, iterations + 1):
        utility = utility + alpha * (policy - base)
        step = 1.0 / (eta * t)
        policy = log_softmax((lam * preferred + utility / t + step * policy) / (lam + step))
    return policy
