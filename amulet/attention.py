"""Attention of new tokens over cached ones, without copies of keys and values, and without a mask.

Where query heads share key and value heads, Transformers repeats the latter in a pass of more than
one token and in compiled code, or has PyTorch read them once for each query head. Here the query
heads of a group are tokens of one head. On the CPU, where a mask makes a pass slow, a long pass
attends to the cached and to the new columns apart, neither of which needs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
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
    rows, heads, width, dim = query.shape
    kv_heads, columns = key.shape[1:3]
    biased = options.get("position_bias") is not None
    if attention_mask is None and 1 < width < columns:
        if value.shape[-1] == dim and not biased and query.device.type == "cpu":
            return _behind_cached(query, key, value, scaling).transpose(1, 2).contiguous(), None
        # What the CPU's kernel doesn't do, or a layer that lies on another device than the first.
        allowed = torch.ones(width, columns, dtype=torch.bool, device=query.device)
        attention_mask = allowed.tril(columns - width)[None, None]
    # Without a mask several tokens are causal, which can't be said of grouped ones.
    alike = heads == kv_heads or width > (1 if attention_mask is None else WIDEST)
    if alike or biased:
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


def causal_behind_cached(model: PreTrainedModel) -> bool:
    """Whether new tokens behind cached ones need no mask to be causal, in the `grouped` block.

    Only on the CPU: a GPU's attention reads a mask at no cost. Code that doesn't call its attention
    through Transformers' interface would attend without any mask.
    """
    config = model.config.get_text_config()
    asked = config._attn_implementation == "sdpa" and model._supports_attention_backend
    return bool(asked and model.device.type == "cpu")


def _behind_cached(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attend causally where the new tokens are the last columns; `[rows, heads, width, dim]`.

    Once over the cached columns, all of which every new token sees, and once over the new ones; the
    two are joined by their log-sum-exps. Neither needs a mask, which is what makes a pass slow.
    """
    rows, heads, width, dim = query.shape
    kv_heads, start = key.shape[1], key.shape[2] - width
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    new, weight_new = attend(
        query, key[:, :, start:], value[:, :, start:], 0.0, True, scale=scaling
    )
    groups = query.reshape(rows, kv_heads, heads // kv_heads * width, dim)
    old, weight_old = attend(groups, key[:, :, :start], value[:, :, :start], scale=scaling)
    old, weight_old = old.reshape(query.shape), weight_old.reshape(rows, heads, width)
    share = torch.sigmoid(weight_old - weight_new)[..., None]  # of the cached columns
    return torch.lerp(new.to(share.dtype), old.to(share.dtype), share).to(query.dtype)


AttentionInterface.register(GROUPED, grouped_attention)
