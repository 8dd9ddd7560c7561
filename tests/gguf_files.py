"""GGUF files that tests make: tiny, with the weights of a Transformers model."""

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
    # LFM2's
    "model.embedding_norm": "token_embd_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "conv.conv": "shortconv.conv",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
) -> Path:
    """Write a model with a tokenizer of bytes, float32.

    Args:
        path: the file.
        model: a LlamaForCausalLM, or an Lfm2ForCausalLM, which has convolutions, too.
        tokenizer: as `tests.models.byte_tokenizer` makes it.
        chat_template: another than the tokenizer's.
    """
    config = model.config
    kind = config.model_type
    weights = {name.removesuffix(".weight"): each for name, each in model.state_dict().items()}
    writer = GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "lfm2":
        heads = {"conv": 0, "full_attention": config.num_key_value_heads}
        writer.add_head_count_kv([heads[layer] for layer in config.layer_types])
        writer.add_feed_forward_length(len(weights["model.layers.0.feed_forward.w1"]))
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_feed_forward_length(config.intermediate_size)
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
    for stem, tensor in weights.items():
        block = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        weight = tensor.to(torch.float32)
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = heads if stem.endswith("q_proj") else config.num_key_value_heads
            weight = _by_pairs(weight, heads)
        if stem == "conv.conv":  # [channels, 1, length]
            weight = weight[:, 0]
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
