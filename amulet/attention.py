"""Attention of a few new tokens over cached ones, without copies of keys and values.

Where query heads share key and value heads, Transformers repeats the latter in every pass of more
than one token, and in compiled code always. Here the query heads of a group are tokens of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED = "amulet_grouped"
WIDEST = 32  # tokens; repeating the mask for more of them costs more than the copies


@contextmanager
def grouped(config: PretrainedConfig) -> Iterator[None]:
    """Let a model whose attention is `sdpa` use `grouped_attention` in the block."""
    text = config.get_text_config()
    if text._attn_implementation != "sdpa":
        yield
        return
    text._attn_implementation_internal = GROUPED
    try:
        yield
    finally:
        text._attn_implementation_internal = "sdpa"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as Transformers' `sdpa` does.

    Args:
        module: the attention layer.
        query: `[rows, heads, width, dim]`.
        key, value: `[rows, kv_heads, columns, dim]`.
        attention_mask: bool or additive `[rows, 1, width, columns]`, or None.
        scaling: of the products; None is `dim ** -0.5`.
        options: as for Transformers' attention functions.

    Returns:
        `[rows, width, heads, dim]`, and None for the weights.
    """
    rows, heads, width, _ = query.shape
    kv_heads = key.shape[1]
    alike = heads == kv_heads or attention_mask is None or width > WIDEST
    if alike or options.get("position_bias") is not None:
        attended, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return attended, None
    groups = heads // kv_heads
    if width > 1 and attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    attended = scaled_dot_product_attention(
        query.reshape(rows, kv_heads, groups * width, -1),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
