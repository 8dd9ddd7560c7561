"""Tiny models with random weights, saved as vLLM loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from tests.models import END_OF_TEXT, IM_END, VOCAB_SIZE, byte_tokenizer

Kind = Literal["qwen2", "llama"]


SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
}
"""Heads of 32 are vLLM's smallest on a CPU."""


def save_model(folder: Path, kind: Kind, window: int = 512, *, is_readable: bool = False) -> Path:
    """Save three layers and the byte tokenizer.

    Weights are drawn wide, so that logits differ clearly and greedy text varies.

    Args:
        folder: where to.
        kind: the architecture.
        window: the context window in tokens.
        is_readable: answers are ASCII, so that equal texts are equal tokens; else they are any
            bytes, of which most are no characters.
    """
    config_class = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind]
    config = config_class(**SIZES, num_hidden_layers=3, max_position_embeddings=window)
    model = _drawn(config, torch.float32)
    if is_readable:
        # Half of a printable letter's logit: it is never the largest one.
        head = model.lm_head.weight.data
        for token in [*range(32), *range(127, IM_END), *range(IM_END + 1, VOCAB_SIZE)]:
            head[token] = head[32 + token % 95] / 2
    return _saved(model, folder)


def save_hybrid(folder: Path) -> Path:
    """Save a tiny Qwen3-Next: three layers of a gated delta net, one of attention, and experts."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    heads |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # vLLM's only ones on a CPU
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = Qwen3NextConfig(
        **SIZES,
        **heads,
        **experts,
        num_hidden_layers=4,
        shared_expert_intermediate_size=64,
        max_position_embeddings=512,
    )
    return _saved(_drawn(config, torch.bfloat16), folder)


def _drawn(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
