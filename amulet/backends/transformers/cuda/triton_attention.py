"""Attention of a few new tokens over many cached ones on a GPU, in Triton.

The columns of every row are split between the GPU's processors in blocks whose size depends only on
the shapes, so that a row's result does not depend on the rest of the batch. A second kernel joins
the blocks' results by their log-sum-exps (as Flash-Decoding does, arXiv 2311.01282, section 2).
Blocks without a visible column end at once: a CUDA graph covers all columns of the buffer, and
those after a row's end cost almost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_BYTES = 2**15  # of the keys that one block reads, and of the values
JOINED = 16  # blocks that the second kernel joins at once


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return the attended values, `[rows, width, heads, dim]`.

    Args:
        query: `[rows, heads, width, dim]`.
        key, value: `[rows, kv_heads, columns, dim]`, of the same dtype.
        mask: bool `[rows, 1, width, columns]`, true where a token sees a column; each token must
            see at least one.
        scale: of the products.
    """
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    rows, heads, width, dim = query.shape
    kv_heads, columns = key.shape[1:3]
    groups = heads // kv_heads
    tokens = max(triton.next_power_of_2(groups * width), 16)  # the minimum for a product
    padded = max(triton.next_power_of_2(dim), 16)
    block = min(max(BLOCK_BYTES // (padded * key.dtype.itemsize), 16), 128)
    blocks = triton.cdiv(columns, block)
    output = query.new_empty((rows, width, heads, dim))
    sizes = (rows * kv_heads, blocks, tokens)
    parts = query.new_empty((*sizes, padded), dtype=torch.float32)
    weights = query.new_empty(sizes, dtype=torch.float32)
    mask = mask.expand(rows, 1, width, columns)
    _attend_block[(blocks, rows * kv_heads)](
        query,
        key,
        value,
        mask,
        parts,
        weights,
        scale,
        kv_heads,
        columns,
        dim,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        mask.stride(0),
        mask.stride(2),
        mask.stride(3),
        WIDTH=width,
        GROUPS=groups,
        TOKENS=tokens,
        DIM=padded,
        BLOCK=block,
    )
    _join[(rows * kv_heads, groups * width)](
        parts,
        weights,
        output,
        blocks,
        kv_heads,
        dim,
        *output.stride()[:3],
        WIDTH=width,
        GROUPS=groups,
        TOKENS=tokens,
        DIM=padded,
        JOINED=JOINED,
    )
    return output


@triton.jit
def _attend_block(
    query,
    key,
    value,
    mask,
    parts,
    weights,
    scale,
    kv_heads,
    columns,
    dim,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_column,
    value_row,
    value_head,
    value_column,
    mask_row,
    mask_token,
    mask_column,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Attend of one row's tokens, in one group of heads, over one block of columns."""
    block, pair = tl.program_id(0), tl.program_id(1)
    row, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    token = tl.arange(0, TOKENS)  # of a head of the group: token = head * WIDTH + place
    head, place = kv_head * GROUPS + token // WIDTH, token % WIDTH
    column = block * BLOCK + tl.arange(0, BLOCK)
    real, there = token < GROUPS * WIDTH, column < columns
    seen = tl.load(
        mask + row * mask_row + place[:, None] * mask_token + column[None, :] * mask_column,
        mask=real[:, None] & there[None, :],
        other=0,
    ).to(tl.int1)
    at = (pair * tl.num_programs(0) + block).to(tl.int64) * TOKENS + token
    if tl.max(seen.to(tl.int32)) == 0:
        tl.store(weights + at, float("-inf"))
        return
    d = tl.arange(0, DIM)
    inside = there[:, None] & (d < dim)[None, :]
    q = tl.load(
        query
        + row * query_row
        + head[:, None] * query_head
        + place[:, None] * query_token
        + d[None, :],
        mask=real[:, None] & (d < dim)[None, :],
        other=0.0,
    )
    key += row * key_row + kv_head * key_head
    value += row * value_row + kv_head * value_head
    k = tl.load(key + column[:, None] * key_column + d[None, :], mask=inside, other=0.0)
    v = tl.load(value + column[:, None] * value_column + d[None, :], mask=inside, other=0.0)
    # "ieee": float32 must not be rounded to tf32.
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    score = tl.where(seen, score, float("-inf"))
    best = tl.max(score, 1)
    best = tl.where(best == float("-inf"), 0.0, best)  # a token that sees nothing in this block
    share = tl.exp(score - best[:, None])
    total = tl.sum(share, 1)
    part = tl.dot(share.to(v.dtype), v, input_precision="ieee")
    part = part / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(parts + at[:, None] * DIM + d[None, :], part)
    tl.store(weights + at, best + tl.log(total))


@triton.jit
def _join(
    parts,
    weights,
    output,
    blocks,
    kv_heads,
    dim,
    output_row,
    output_place,
    output_head,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
) -> None:
    """Join one token's blocks by their weights."""
    pair, token = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DIM)
    best, total = float("-inf"), 0.0
    whole = tl.zeros([DIM], dtype=tl.float32)
    for first in range(0, blocks, JOINED):
        block = first + tl.arange(0, JOINED)
        at = (pair * blocks + block).to(tl.int64) * TOKENS + token
        weight = tl.load(weights + at, mask=block < blocks, other=float("-inf"))
        higher = tl.maximum(best, tl.max(weight, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp(weight - level)
        # A block without a visible column wrote no part.
        part = tl.load(parts + at[:, None] * DIM + d[None, :], mask=(share > 0)[:, None], other=0.0)
        before = tl.exp(best - level)
        whole = whole * before + tl.sum(share[:, None] * part, 0)
        total = total * before + tl.sum(share, 0)
        best = higher
    row, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    head, place = kv_head * GROUPS + token // WIDTH, token % WIDTH
    output += row * output_row + place * output_place + head * output_head
    whole = whole / total
    tl.store(output + d, whole.to(output.dtype.element_ty), mask=d < dim)
