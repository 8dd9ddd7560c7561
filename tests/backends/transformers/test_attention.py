"""Attention in C gives what the definition gives, whatever is masked or left over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amulet.backends.transformers import attention
from amulet.backends.transformers.attention import FEW, WIDEST, grouped_attention
from amulet.backends.transformers.cpu import native
from tests import bounds
from tests.bounds import check
from tests.marks import needs_code
from tests.search import examples


def states(rows: int, heads: int, columns: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a part of a larger buffer, as the KV cache's, whose rest is no number."""
    buffer = torch.full((rows + 1, heads, columns + 5, dim), float("nan"), dtype=dtype)
    buffer[:rows, :, :columns] = torch.randn(rows, heads, columns, dim)
    return buffer[:rows, :, :columns]


@needs_code
@examples(100)
@given(
    rows=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 9),
    width=st.integers(1, 9),
    cached=st.integers(0, 70),
    dim=st.sampled_from([32, 64, 96, 128, 256]),
    masked=st.sampled_from(["no", "ends", "window", "one for all"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_few_tokens_attend_as_the_definition_says(
    rows: int,
    kv_heads: int,
    groups: int,
    width: int,
    cached: int,
    dim: int,
    masked: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    columns = cached + width
    # As a projection gives it: tokens before heads.
    query = torch.randn(rows, width, kv_heads * groups, dim).to(dtype).transpose(1, 2)
    key, value = (states(rows, kv_heads, columns, dim, dtype) for _ in range(2))
    mask = None
    if masked != "no":
        starts = torch.randint(0, cached + 1, (1 if masked == "one for all" else rows, 1))
        last = (starts + torch.arange(width))[:, None, :, None]
        mask = torch.arange(columns) <= last
        if masked == "window":
            mask &= torch.arange(columns) > last - 5
    assert attention._attends_natively(query, key, value, mask)
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.2)
    check(found, bounds.attention(query, key, value, mask, 0.2))


@needs_code
@examples(60)
@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    width=st.integers(FEW + 1, 200),
    cached=st.one_of(st.just(0), st.integers(1, 600)),
    dim=st.sampled_from([64, 128, 192, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_many_tokens_attend_as_the_definition_says(
    rows: int,
    kv_heads: int,
    groups: int,
    width: int,
    cached: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(rows, width, kv_heads * groups, dim).to(dtype).transpose(1, 2)
    key, value = (states(rows, kv_heads, cached + width, dim, dtype) for _ in range(2))
    found = attention._prefill(query, key, value, 0.2)
    check(found, bounds.attention(query, key, value, None, 0.2))


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_key_heads_that_take_turns_attend_as_the_definition_says(
    rows: int, dtype: torch.dtype
) -> None:
    """Few at once where columns are many, and in place of the queries, as a layer has it."""
    torch.manual_seed(0)
    query = torch.randn(rows, 200, 5, 128).to(dtype).transpose(1, 2)
    key, value = (states(rows, 5, 2500, 128, dtype) for _ in range(2))
    expected = bounds.attention(query, key, value, None, 0.2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check(attention._prefill(query, key, value, 0.2), expected)
        given = attention._given(query, key, value, (0, 0))
        assert not native.library().amulet_prefill(*given, 0.2, query.data_ptr())
        check(query.transpose(1, 2), expected)
    finally:
        torch.set_num_threads(threads)


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(300,), (150, 150), (17, 283), (40, 200, 60)])
def test_passes_of_any_width_give_the_same(dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    """To the last bit, and whatever the other rows are."""
    torch.manual_seed(0)
    query = torch.randn(2, 6, 300, 64).to(dtype)
    key, value = (states(2, 3, 300, 64, dtype) for _ in range(2))
    whole = attention._prefill(query, key, value, 0.2)
    begin = 0
    for width in widths:
        end = begin + width
        new, seen = slice(begin, end), slice(0, end)
        part = attention._prefill(query[:1, :, new], key[:1, :, seen], value[:1, :, seen], 0.2)
        assert torch.equal(part, whole[:1, new])
        begin = end


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_with_scores_of_any_size(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key, value = (states(1, 1, 400, 64, dtype) for _ in range(2))
    for size in (0.0, 1e-3, 30.0, 1e4):
        query = size * torch.randn(1, 2, 80, 64).to(dtype)
        found = attention._prefill(query, key, value, 64**-0.5)
        expected = bounds.attention(query, key, value, None, 64**-0.5)
        check(found, expected)
    # The largest score last, so that all before it is to be made small.
    key[0, 0, :] = (torch.arange(400)[:, None] / 4).to(dtype)
    query = torch.ones(1, 2, 80, 64, dtype=dtype)
    found = attention._prefill(query, key, value, 64**-0.5)
    expected = bounds.attention(query, key, value, None, 64**-0.5)
    check(found, expected)


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_small_scores_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    key, value = (states(1, 1, 40, 64, dtype) for _ in range(2))
    for size in (0.0, 1e-3, 30.0, 1e4):
        query = size * torch.ones(1, 2, 1, 64, dtype=dtype)
        found, _ = grouped_attention(torch.nn.Module(), query, key, value, None)
        expected = bounds.attention(query, key, value, None, 64**-0.5)
        check(found, expected)


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    query = torch.zeros(3, 2, 1, 64, dtype=dtype)
    key, value = (states(3, 1, 40, 64, dtype) for _ in range(2))
    query[0, 0, 0, 3] = float("nan")
    value[1, 0, 5, 7] = float("nan")
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, None)
    assert found[0, 0, 0].isnan().all()
    assert not found[0, 0, 1].isnan().any()
    assert found[1, 0, :, 7].isnan().all()
    assert not found[2].isnan().any()


@needs_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none_among_many_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 2, 100, 64).to(dtype)
    key, value = (states(3, 1, 300, 64, dtype) for _ in range(2))
    query[0, 0, 50, 3] = float("nan")
    value[1, 0, 250, 7] = float("nan")
    found = attention._prefill(query, key, value, 0.1)
    assert found[0, 50, 0].isnan().all()
    assert not found[0, 50, 1].isnan().any()
    assert not found[0, :50].isnan().any()
    assert not found[0, 51:].isnan().any()
    assert found[1, 50:, :, 7].isnan().all()
    assert not found[1, :25].isnan().any()  # those just before it multiply it by 0
    assert not found[2].isnan().any()


@needs_code
def test_states_and_masks_need_not_be_contiguous() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 64) for n in (1, 40, 40))
    mask = torch.rand(2, 1, 40, 1) < 0.5
    mask[:, :, 0] = True
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value)]
    assert key.stride() != turned[1].stride()
    found = attention._attend(*turned, mask.transpose(2, 3), 0.1)
    expected = bounds.attention(query, key, value, mask.mT, 0.1)
    check(found, expected)


@needs_code
def test_a_row_does_not_depend_on_the_others() -> None:
    """To the last bit: neither on their number nor on their lengths."""
    torch.manual_seed(0)
    query = torch.randn(5, 6, 1, 64)
    key, value = (states(5, 2, 90, 64, torch.float32) for _ in range(2))
    lengths = torch.tensor([3, 90, 41, 16, 17])
    mask = (torch.arange(90) < lengths[:, None])[:, None, None]
    together, _ = grouped_attention(torch.nn.Module(), query, key, value, mask)
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        own = key[one, :, :length], value[one, :, :length]
        alone, _ = grouped_attention(torch.nn.Module(), query[one], *own, None)
        assert torch.equal(alone, together[one])


@needs_code
@pytest.mark.parametrize(
    ("flags", "halves", "whole"),
    [("avx512f", False, True), ("avx512_bf16", True, True), ("avx512_bf16 amx_bf16", False, False)],
)
def test_what_the_processor_knows_decides_who_prefills(
    monkeypatch: pytest.MonkeyPatch, flags: str, halves: bool, whole: bool
) -> None:
    monkeypatch.setattr(native, "processor", lambda: f"flags : {flags}")
    attention.prefills_well.cache_clear()
    try:
        assert attention.prefills_well(torch.bfloat16) == halves
        assert attention.prefills_well(torch.float32) == whole
    finally:
        attention.prefills_well.cache_clear()


@needs_code
def test_what_it_can_not_do_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def can(width: int = 1, dim: int = 64, dtype: torch.dtype = torch.float32) -> bool:
        query = torch.zeros(1, 2, width, dim, dtype=dtype)
        key = torch.zeros(1, 1, 100, dim, dtype=dtype)
        return attention._attends_natively(query, key, key, None)

    assert can()
    assert can(width=WIDEST)
    assert can(width=WIDEST + 1) == attention.prefills_well(torch.float32)
    assert can(width=WIDEST + 1, dim=96) == attention.prefills_well(torch.float32)
    assert not can(dim=40)
    assert not can(dim=48, dtype=torch.bfloat16)
    assert not can(dtype=torch.float64)
    assert not can(dtype=torch.float16)
    one = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match="softcap"):
        grouped_attention(torch.nn.Module(), one, one, one, None, softcap=30.0)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not can()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_sees_a_column_too_few_and_one_too_many(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 50, 256).to(dtype)
    key, value = torch.randn(2, 1, 2, 700, 256).to(dtype)
    allowed = bounds.attention(query, key, value, None, 256**-0.5)
    check(allowed[0].to(dtype), allowed)
    seen = torch.ones(50, 700, dtype=torch.bool).tril(650)
    for row, column in ((20, 3), (20, 671)):
        other = seen.clone()
        other[row, column] ^= True
        wrong, _ = bounds.attention(query, key, value, other[None, None], 256**-0.5)
        with pytest.raises(AssertionError, match="what rounding explains"):
            check(wrong.to(dtype), allowed)
