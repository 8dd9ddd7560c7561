"""Norms, rotary positions and gated activations in C give what Transformers' own give."""

from __future__ import annotations

from math import pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import silu
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from amulet.backends.transformers.cpu import rowwise
from tests.bounds import FLOAT32
from tests.marks import needs_code

pytestmark = needs_code

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
ROWS = st.sampled_from([1, 2, 3, 17, 300])  # the last is shared out between threads
SEEDS = st.integers(0, 99)
HIDDEN: dict[str, Any] = {
    "rows": ROWS,
    "size": st.integers(1, 40),
    "scale": st.sampled_from([1e-3, 1.0, 50.0]),
    "dtype": DTYPES,
    "seed": SEEDS,
}


def assert_few_differ(made: torch.Tensor, expected: torch.Tensor) -> None:
    """In bfloat16 the very same but for a rounding here and there: one in 2**12 of float32's."""
    assert (made != expected).sum() <= 3 + 0.01 * made.numel()


@given(
    kind=st.sampled_from([LlamaRMSNorm, Gemma3RMSNorm]),
    **HIDDEN,
)
def test_a_norm(
    kind: type[torch.nn.Module],
    rows: int,
    size: int,
    scale: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    theirs = kind(16 * size, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(16 * size))
        hidden = (scale * torch.randn(rows, 2, 16 * size)).to(dtype)
        before = hidden.clone()
        made = rowwise.norm(hidden, theirs.weight, 1e-5, plus_one=kind is Gemma3RMSNorm)
        expected = theirs(hidden)
    # Half of what each of the two sums is off, by the root; and three roundings more of each.
    near = FLOAT32 * (16 * size + 6) + (2 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    torch.testing.assert_close(made, expected, rtol=near, atol=1e-30)
    if dtype == torch.bfloat16:
        assert_few_differ(made, expected)
    assert torch.equal(hidden, before)


@given(
    rows=ROWS,
    width=st.integers(1, 4),
    heads=st.integers(1, 9),
    dim=st.sampled_from([32, 64, 96, 128]),
    alike=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_rotary_positions(
    rows: int, width: int, heads: int, dim: int, alike: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    made = torch.randn(rows, width, heads, dim).to(dtype)
    angles = torch.randn(2, 1 if alike else rows, width, dim).to(dtype)
    expected, _ = apply_rotary_pos_emb(made.transpose(1, 2), made.transpose(1, 2), *angles)
    rowwise.rotate_(made, angles[0], angles[1])
    assert torch.equal(made, expected.transpose(1, 2))


@given(
    by_tanh=st.booleans(),
    **HIDDEN,
)
def test_a_gated_activation(
    by_tanh: bool, rows: int, size: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    gate, up = (scale * torch.randn(2, rows, 16 * size)).to(dtype)
    made = gate.clone()
    rowwise.gate_(made, up, gelu=by_tanh)
    # PyTorch's GELU is a sum with tanh, which leaves no digits of a small one; its other form does.
    wide = gate.double()
    power = (8 / pi) ** 0.5 * (wide + 0.044715 * wide**3) if by_tanh else wide
    expected = (wide * power.sigmoid()).to(dtype).double() * up.double()
    # What goes into the exponential has five roundings; all the rest 16, and what is below e^-87
    # is 0. In bfloat16 two numbers are stored.
    near = FLOAT32 * (16 + 5 * power.abs().clamp(max=88)) + (dtype != torch.float32) * 2**-7
    allowed = near * expected.abs() + 2e-38 * (wide * up.double()).abs() + 1e-30
    assert ((made.double() - expected).abs() <= allowed).all()
    if dtype == torch.bfloat16 and not by_tanh:
        assert_few_differ(made, silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    hidden = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")] * 4, dtype=dtype)
    gated = hidden.clone()
    rowwise.gate_(gated, torch.ones_like(hidden))
    torch.testing.assert_close(gated, silu(hidden), equal_nan=True)
    assert rowwise.norm(hidden, torch.ones_like(hidden), 1e-5).isnan().all()
