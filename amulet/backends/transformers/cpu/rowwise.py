"""Operations between a layer's products: the Python side of `native/rowwise.c`.

All tensors are on the CPU and contiguous, and have one dtype, float32 or bfloat16.
"""

from __future__ import annotations

import torch

from amulet.backends.transformers.cpu import native

LANES = 16  # numbers computed at once; the last dimension must be a multiple


def _check(first: torch.Tensor, others: dict[str, torch.Tensor], fit: bool) -> None:
    """Raise ValueError if C would read or write beyond a tensor or with a wrong type."""
    tensors = (first, *others.values())
    if (
        not fit
        or any(t.dtype != first.dtype or not t.is_contiguous() for t in tensors)
        or first.dtype not in (torch.float32, torch.bfloat16)
        or any(t.device.type != "cpu" for t in tensors)
    ):
        found = ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in others.items())
        raise ValueError(
            f"{found} with {list(first.shape)} {first.dtype}: expected contiguous tensors on the "
            f"CPU whose shapes and types fit together, and sizes that are multiples of {LANES}"
        )


def norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool = False
) -> torch.Tensor:
    """Return the weight times `hidden / sqrt(mean(hidden ** 2) + epsilon)`, `[..., size]`.

    Args:
        hidden: `[..., size]`.
        weight: `[size]`.
        epsilon: added to the mean square.
        plus_one: multiply by the weight plus one, as Gemma does.
    """
    size = hidden.shape[-1]
    _check(hidden, {"weight": weight}, weight.shape == (size,) and size % LANES == 0)
    out = torch.empty_like(hidden)
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
    """Rotate queries or keys by the angles of their positions, in place.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin).

    Args:
        heads: `[rows, width, heads, dim]`.
        cosine, sine: `[rows or 1, width, dim]`.
    """
    rows, width, count, dim = heads.shape
    fit = cosine.shape in ((rows, width, dim), (1, width, dim)) and dim % (2 * LANES) == 0
    _check(heads, {"cosine": cosine, "sine": sine}, fit and sine.shape == cosine.shape)
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
    """Replace `hidden` by `silu(hidden) * up`, or with GELU's tanh approximation; equal shapes."""
    _check(hidden, {"up": up}, up.shape == hidden.shape and hidden.numel() % LANES == 0)
    native.library().amulet_gate(
        hidden.dtype == torch.bfloat16, gelu, hidden.data_ptr(), up.data_ptr(), hidden.numel()
    )
