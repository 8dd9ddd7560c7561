"""GGUF files that tests make: a tiny Llama, whose weights a Transformers model has as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMAL, CONTROL, UNUSED = 1, 3, 5  # of gguf.TokenType
NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_llama(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> Path:
    """Write a Llama with a tokenizer of bytes, float32.

    Args:
        path: the file.
        model: a LlamaForCausalLM.
        tokenizer: as `tests.models.byte_tokenizer` makes it.
        chat_template: another than the tokenizer's.
    """
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    known = len(tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(known)]
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values()
    }
    kinds = [CONTROL if token in special else NORMAL for token in tokens]
    padding = config.vocab_size - known
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"<unused{i}>" for i in range(padding))])
    writer.add_token_types([*kinds, *[UNUSED] * padding])
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])  # none would not be written
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(chat_template or str(tokenizer.chat_template))
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        block = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        weight = tensor.to(torch.float32)
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = heads if stem.endswith("q_proj") else config.num_key_value_heads
            weight = _by_pairs(weight, heads)
        writer.add_tensor(f"{block}{NAMES[stem]}.weight", weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _by_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order a head's rows as llama.cpp turns them: neighbours, not halves."""
    rows, columns = weight.shape
    return (
        weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
    ).contiguous()
