"""Products of few rows: near the exact ones, whoever else is in the batch, and never required."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from amulet.backends.transformers.cpu import products
from amulet.backends.transformers.cpu.packed_layers import PackedLinear
from tests.marks import needs_bfloat16_code, needs_code
from tests.search import examples

DTYPES = [torch.float32, torch.bfloat16]


def layer(n: int, k: int, dtype: torch.dtype, bias: bool = False, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)


def packed_product(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    weight = linear.weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    address = products.address_of_blocks(packed, weight)
    assert address is not None, "oneDNN's layout is not the expected one"
    kind = products.FLOAT32 if weight.dtype == torch.float32 else products.BFLOAT16
    return products.multiply(kind, hidden, address, *weight.shape, bias=linear.bias)


def assert_near_exact(
    output: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: torch.Tensor | None = None,
) -> None:
    """No further from the float64 product than rounding explains.

    Args:
        sizes: of the terms that make up each weight, where they are summed apart.
    """
    sizes = weight.abs() if sizes is None else sizes
    exact, terms = hidden.double() @ weight.T, hidden.double().abs() @ sizes.T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    summing = weight.shape[1] * torch.finfo(torch.float32).eps * terms
    allowed = torch.finfo(hidden.dtype).eps * exact.abs() + summing + 1e-30
    assert ((output.double() - exact).abs() <= allowed).all()


ROWS = st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 49, 97, 130]))  # 48: a task's


@needs_code
@examples(60)
@given(
    rows=ROWS,
    n=st.integers(2, 200),  # a single output is no matrix to oneDNN, and is left to it
    k=st.integers(1, 12).map(lambda i: 32 * i),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_product_is_as_near_as_rounding_allows(
    rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    linear = layer(n, k, dtype, bias, seed)
    hidden = torch.randn(rows, k, dtype=dtype)
    output = packed_product(linear, hidden)
    assert_near_exact(output, hidden, linear.weight.double(), linear.bias)


@needs_bfloat16_code
@examples(60)
@given(
    rows=ROWS,
    n=st.integers(1, 200),
    pairs=st.integers(1, 100),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_an_int8_product_is_as_near_as_rounding_allows(
    rows: int, n: int, pairs: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    rounded = torch.randint(-128, 128, (n, 2 * pairs), dtype=torch.int8)
    scale, added = torch.rand(2, n).bfloat16()
    hidden = torch.randn(rows, 2 * pairs).bfloat16()
    blocks = products.int8_blocks(rounded)
    output = products.multiply(
        products.INT8, hidden, blocks.data_ptr(), n, 2 * pairs, scale, added if bias else None
    )
    weight = rounded.double() * scale.double()[:, None]
    assert_near_exact(output, hidden, weight, added if bias else None)
    unpacked = products.unpack(products.INT8, blocks, n, 2 * pairs, scale)
    assert torch.equal(unpacked, weight.bfloat16())


@needs_bfloat16_code
@examples(60)
@given(
    rows=ROWS,
    parts=st.integers(1, 12),
    groups=st.integers(1, 8),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_an_int4_product_is_as_near_as_rounding_allows(
    rows: int, parts: int, groups: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n = 16 * parts
    levels = torch.randint(0, 16, (n, 32 * groups), dtype=torch.uint8)
    scale, least = torch.randn(2, n, groups).bfloat16()
    added = torch.randn(n).bfloat16() if bias else None
    hidden = torch.randn(rows, 32 * groups).bfloat16()
    blocks = products.int4_blocks(levels, scale, least)
    output = products.multiply(
        products.INT4, hidden, blocks.data_ptr(), n, 32 * groups, None, added
    )
    spread = levels.view(n, groups, 32).double() * scale.double()[..., None]
    weight = (spread + least.double()[..., None]).flatten(1)
    # Summed apart, `scale * level` and `least` round by their own sizes.
    sizes = (spread.abs() + least.double().abs()[..., None]).flatten(1)
    assert_near_exact(output, hidden, weight, added, sizes)
    unpacked = products.unpack(products.INT4, blocks, n, 32 * groups)
    assert torch.equal(unpacked, weight.float().bfloat16())


@needs_code
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_s_product_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """To the last bit, on any number of threads."""
    linear = layer(200, 96, dtype)
    hidden = torch.randn(23, 96, dtype=dtype)
    together = packed_product(linear, hidden)
    alone = torch.cat([packed_product(linear, row[None]) for row in hidden])
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, packed_product(linear, hidden))
    finally:
        torch.set_num_threads(threads)


@needs_code
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    linear = layer(64, 32, dtype)
    hidden = torch.zeros(3, 32, dtype=dtype)
    hidden[0, 3], hidden[1, 3] = float("nan"), float("inf")
    output = packed_product(linear, hidden)
    assert output[0].isnan().all()
    assert output[1].isinf().all()
    assert not output[2].any()


@needs_code
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_layout_is_noticed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = layer(64, 64, dtype).weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    for expected in (weight, weight.flip(1)):
        monkeypatch.setattr(products, "_in_blocks", {})
        address = products.address_of_blocks(packed, expected)
        assert (address is not None) == (expected is weight)
    assert products.address_of_blocks(packed, weight[:, :32]) is None


@needs_code
@pytest.mark.parametrize("rows", [2, max(products.MOST_ROWS) + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_layer_takes_any_hidden_states(dtype: torch.dtype, rows: int) -> None:
    dense = layer(48, 64, dtype, bias=True)
    packed = PackedLinear(dense)
    assert packed.native_rows
    strided = torch.randn(64, rows, dtype=dtype).T
    torch.testing.assert_close(packed(strided), dense(strided))
    assert packed(strided[:0]).shape == (0, 48)
