"""How far a computation may be from the exact one, by the lengths of its sums and its type.

A sum of n terms is off by at most n roundings of the sum of the terms' sizes, in whatever order it
is made. So these hold for every draw and every processor: what exceeds them is a fault.
"""

from __future__ import annotations

import torch

FLOAT32 = torch.finfo(torch.float32).eps  # twice what one rounding may be off


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention by its definition in float64, and how far off each number may be.

    Scores, weights and sums are float32; the weights may be rounded to the values' type, and the
    result is.

    Args:
        query: `[rows, heads, width, dim]`.
        key, value: `[rows, kv_heads, columns, dim]`.
        mask: `[rows or 1, 1, width, columns]`; None is causal, the new tokens being the last.
        scale: of the scores.

    Returns:
        Both `[rows, width, heads, dim]`.
    """
    groups, width, columns = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    dim, eps = query.shape[3], torch.finfo(value.dtype).eps
    if mask is None:
        mask = torch.ones(width, columns, dtype=torch.bool).tril(columns - width)[None, None]
    left = query.double()
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = (left @ keys.mT * scale).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    whole = weights @ values
    # How far a score may be off, and what is taken from it, the largest; and its exponential, by a
    # polynomial of degree 6.
    most, top = scores.max(-1, keepdim=True)
    sizes = left.abs() @ keys.abs().mT * scale
    off = FLOAT32 * ((dim + 3) * sizes + 2 * (scores - most).abs().nan_to_num(posinf=0) + 8)
    # What all weights are off by alike is divided away; so they are seen beside the largest.
    beside = torch.expm1((off + off.gather(-1, top)).clamp(max=700)).scatter(-1, top, 0.0)
    lost = weights * beside + columns * FLOAT32 * weights + (columns > 0) * 2.0**-125
    if eps > FLOAT32:  # weights as the values' type
        lost = lost + eps / 2 * weights
    sizes = values.abs()
    allowed = lost @ sizes + lost.sum(-1, keepdim=True) * whole.abs()
    # No mean lies outside of what it is of, however much the weights are off.
    allowed = allowed.minimum(2 * sizes.amax(-2, keepdim=True)) + eps * whole.abs() + 1e-30
    return whole.transpose(1, 2), allowed.transpose(1, 2)


def check(found: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor]) -> None:
    """See that each number is as near the exact one as it must be."""
    expected, allowed = exact
    assert found.shape == expected.shape
    share = (found.double() - expected).abs() / allowed
    assert (share <= 1).all(), f"off by {share.max():.3g} times what rounding explains"


def of_logits(dtype: torch.dtype, layers: int = 4, columns: int = 512) -> float:
    """Return how far logits of `random_model` may be off, relative to the largest.

    In float32 each sum of a layer, one behind another, is off by its length: two norms and four
    products of the hidden size 64, one of 128, a score of at most 64 and a mean over the columns.
    In bfloat16 that is nothing beside what is rounded on its way, some 14 times in a layer; those
    roundings go up as often as down, so that they add up as their number's root, twice for both.
    """
    if dtype == torch.float32:
        return FLOAT32 * layers * (6 * 64 + 128 + 64 + columns)
    return 2 * torch.finfo(dtype).eps / 2 * (14.0 * layers) ** 0.5
