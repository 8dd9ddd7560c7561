"""What lies between a layer's products, by `native/rowwise.c`: the Python side of it.

All tensors are on the CPU, contiguous, and of one dtype, float32 or bfloat16.
"""

from __future__ import annotations

import torch

from amulet import native

LANES = 16  # numbers computed at once: a last dimension is to be a multiple


def norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool = False
) -> torch.Tensor:
    """Return the weight times `hidden / sqrt(mean(hidden ** 2) + epsilon)`, `[..., size]`.

    Args:
        hidden: `[..., size]`.
        weight: `[size]`.
        epsilon: is added to the mean square.
        plus_one: multiply by one more than the weight, as Gemma does.
    """
    out = torch.empty_like(hidden)
    size = hidden.shape[-1]
    native.library().amulet_norm(
        hidden.dtype == torch.bfloat16,
        plus_one,
        hidden.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        hidden.numel() // size,
        size,
        epsilon,
    )
    return out


def rotate_(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Turn queries or keys by the angles of their positions, in place.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin).

    Args:
        heads: `[rows, width, heads, dim]`.
        cosine, sine: `[rows or 1, width, dim]`.
    """
    rows, width, count, dim = heads.shape
    native.library().amulet_rotate(
        heads.dtype == torch.bfloat16,
        heads.data_ptr(),
        cosine.data_ptr(),
        sine.data_ptr(),
        0,
        rows * width,
        count,
        dim,
        cosine.numel() // dim,
    )


def gate_(hidden: torch.Tensor, up: torch.Tensor, gelu: bool = False) -> None:
    """Make `hidden` be `silu(hidden) * up`, or GELU's approximation by tanh; both of one shape."""
    native.library().amulet_gate(
        hidden.dtype == torch.bfloat16, gelu, hidden.data_ptr(), up.data_ptr(), hidden.numel()
    )
