"""What makes each config tiny: arguments by name, and what single model types need besides."""

from __future__ import annotations

from typing import Any

VOCAB = 320
H, HEADS, KV, DIM, LAYERS = 128, 4, 2, 32, 4
WINDOW = 16

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_dropout": 0.0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "shared_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_experts_intermediate_size": 64,
    "dense_intermediate_size": 192,
    "intermediate_size_mlp": 192,
    "moe_hidden_size": 64,
    # latent attention and indexers
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "qk_head_dim": 32,
    "index_topk": 8,
    "index_head_dim": 32,
    "index_n_heads": 8,
    # windows
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "max_window_layers": 2,
    # linear attention, Mamba
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "mamba_d_ssm": 256,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "mamba_headdim": 32,
    "n_mamba_heads": 2,
    "mamba_ngroups": 1,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "lru_width": H,
    "attention_hidden_size": H,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "block_ff_dim": 192,
    # old names
    "n_embd": H,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 2048,
    "n_ctx": 2048,
    "n_inner": 192,
    "d_model": H,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "ffn_dim": 192,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "decoder_ffn_dim": 192,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "encoder_ffn_dim": 192,
    "num_layers": LAYERS,
    "rotary_dim": 16,
    "word_embed_proj_dim": H,
    "embedding_size": H,
    "max_seq_len": 2048,
    "ffn_hidden_size": 192,
    "num_heads": HEADS,
    "d_ff": 192,
    "d_kv": DIM,
    "kv_channels": DIM,
    "decoder_layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "layerdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "depth": 2,
    "num_heads": 2,
    "embed_dim": 64,
    "mlp_dim": 64,
    "head_dim": 32,
    "image_size": 56,
    "out_hidden_size": H,
    "num_layers": 2,
    "encoder_layers": 2,
    "d_model": 64,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "conf_num_hidden_layers": 2,
    "conf_num_attention_heads": 2,
    "output_dim": H,
    "vocab_size": 256,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
}
TEXT_PARTS = (
    "text_config",
    "decoder",
    "llm_config",
    "language_config",
    "text_encoder",
    "thinker_config",
    "decoder_config",
    "backbone_config_text",
    "generator",
)

# Further arguments, by model type: top level, or of a sub config as "text_config.name".
MIX = ["linear_attention", "full_attention"] * 2
CONV = ["conv", "full_attention"] * 2
G3N = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "laurel_rank": 16,
    "activation_sparsity_pattern": [0.0] * 6,
    "query_pre_attn_scalar": 32,
}
G4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "global_head_dim": 64,
}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "hc_lowrank": 16,
}


def sub(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as those of a part of the config."""
    return {f"{name}.{key}": value for key, value in given.items()}


MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    }
}

OVER: dict[str, dict[str, Any]] = {
    "bamba": {"layers_block_type": "DROP", "layer_types": "DROP", "attn_layer_indices": [1, 3]},
    "falcon_h1": {"layers_block_type": "DROP", "layer_types": "DROP"},
    "recurrent_gemma": {
        "layers_block_type": "DROP",
        "layer_types": "DROP",
        "block_types": ["recurrent", "attention"],
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": 32},
    "dots3_note": {
        **sub("text_config", {"num_key_value_heads": HEADS, "head_dim": 32}),
        **sub(
            "vision_config",
            {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 64, "adapter_out_dim": H},
        ),
        **sub("audio_config", {"adapter_input_size": 64, "adapter_out_dim": H}),
    },
    "gemma3n": sub("text_config", G3N),
    "gemma3n_text": G3N,
    "gemma4_text": G4,
    "gemma4": sub("text_config", G4),
    "gemma4_assistant": {
        **sub(
            "text_config",
            {
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_kv_shared_layers": 4,
            },
        ),
        "backbone_hidden_size": H,
        "num_centroids": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": "DROP"},
    "lfm2_moe": {"layer_types": CONV},
    "lfm2": {"layer_types": CONV},
    "lfm2_vl": sub("text_config", {"layer_types": CONV}),
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1},
    "musicgen": {"decoder.vocab_size": 2048},
    "qwen4_exp_text": QSA,
    "qwen4_exp": sub("text_config", QSA),
    # The default of their class is for heads of 128.
    "glm4v": sub("text_config", MROPE),
    "glm46v": sub("text_config", MROPE),
    "glm4v_moe": sub(
        "text_config",
        {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [2, 3, 3]}},
    ),
    "glmga": sub("text_config", MROPE),
    "glm_ocr": sub("text_config", MROPE),
    "prophetnet": {"max_position_embeddings": 128},
    "qwen2_vl": sub("text_config", MROPE),
    "qwen2_5_vl": sub("text_config", MROPE),
    "reformer": {
        "axial_pos_embds_dim": (32, 96),
        "axial_pos_shape": (32, 64),
        "attn_layers": ["local", "lsh"] * 2,
        "num_attention_heads": 4,
        "attention_head_size": 32,
        "feed_forward_size": 192,
        # Its forward else draws the hashes anew, and sets the buckets by the first prompt's length.
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "granitemoehybrid": {"layer_types": MIX},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": "DROP",
        "layer_types": "DROP",
    },
    "longcat_flash": {"head_dim": 16, "zero_expert_num": 2},
    "zamba": {"attention_hidden_size": 2 * H, "head_dim": 64},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "glm5_next": {
        **sub(
            "text_config",
            {
                "num_key_value_heads": HEADS,
                "qk_rope_head_dim": 0,
                "qk_nope_head_dim": 32,
                "v_head_dim": 32,
                "index_kpool": 4,
                "head_dim": 0,
            },
        ),
    },
    "ernie4_5_vl_moe": sub(
        "text_config",
        {
            "moe_intermediate_size": [64, 32],
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 6, 4],
            },
        },
    ),
    "inkling2": sub("vision_config", {"text_hidden_size": H}),
    "molmo2": {
        **sub("vision_config", {"image_size": [56, 56]}),
        **sub(
            "adapter_config",
            {"vision_feature_layer": [-1, -2], "text_hidden_size": H, "hidden_size": 64},
        ),
    },
    "nemotron_h_omni": {
        **sub("vision_config", {"video_temporal_patch_size": 2}),
        "vision_hidden_size": 64,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "chameleon": {"vocabulary_map": {"<image>": 5}, "image_token_id": 5},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
        "text_config.rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        "vision_config.deepstack_visual_indexes": [0],
    },
    "muse_spark": {
        "vision_config.num_hidden_layers": 4,
        **sub("audio_config", {"num_hidden_layers": 4, "out_hidden_size": H}),
    },
    "paddleocr_vl": sub("text_config", MROPE),
    "hunyuan_vl": sub(
        "text_config",
        {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [4, 4, 4, 4]}},
    ),
    "florence2": sub(
        "vision_config",
        {
            "embed_dim": [32] * 4,
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "depths": [1] * 4,
            "projection_dim": H,
        },
    ),
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, **sub("text_config", MROPE)},
    "deepseek_ocr2": sub("text_config", {"mlp_layer_types": ["dense", "sparse"] * 2}),
    "step3p7": sub("text_config", {"sliding_window": WINDOW}),
    "opt": {"word_embed_proj_dim": H},
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 64},
    "cpmant": {"dim_model": H, "num_attention_heads": HEADS, "dim_head": 32, "dim_ff": 192},
}
ROPE = {"rope_theta": 10000.0}
# Label, model type, "causal" or "image", and what checkpoints of people set otherwise.
VARIANTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama:eager", "llama", "causal", {"_attn": "eager"}),
    (
        "llama:rope-llama3",
        "llama",
        "causal",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            }
        },
    ),
    (
        "llama:rope-linear",
        "llama",
        "causal",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}},
    ),
    (
        "llama:rope-yarn",
        "llama",
        "causal",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            }
        },
    ),
    (
        "llama:rope-dynamic",
        "llama",
        "causal",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE},
            "max_position_embeddings": 64,
            "_window": 2048,
        },
    ),
    (
        "phi3:longrope",
        "phi3",
        "causal",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.01 * i for i in range(16)],
                "long_factor": [2.0 + 0.5 * i for i in range(16)],
                **ROPE,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    ("phi3:window", "phi3", "causal", {"sliding_window": WINDOW}),
    ("mistral:no-window", "mistral", "causal", {"sliding_window": None}),
    (
        "qwen2:window",
        "qwen2",
        "causal",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    (
        "qwen3:window",
        "qwen3",
        "causal",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    (
        "granitemoehybrid:attention-only",
        "granitemoehybrid",
        "causal",
        {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"},
    ),
    (
        "falcon:alibi",
        "falcon",
        "causal",
        {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    (
        "falcon:new-decoder",
        "falcon",
        "causal",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    (
        "gemma4_text:moe",
        "gemma4_text",
        "causal",
        {
            **G4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    (
        "gemma4_text:k-is-v",
        "gemma4_text",
        "causal",
        {
            **G4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ),
    (
        "zaya:sliding",
        "zaya",
        "causal",
        {
            "num_experts_per_tok": 1,
            "router_hidden_size": 32,
            "sliding_window": WINDOW,
            "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        },
    ),
    ("starcoder2:window", "starcoder2", "causal", {"sliding_window": WINDOW}),
    ("mixtral:window", "mixtral", "causal", {"sliding_window": WINDOW}),
    (
        "nemotron_h:no-mamba",
        "nemotron_h",
        "causal",
        {"layers_block_type": ["full_attention", "mlp"] * 2},
    ),
    (
        "gpt2:reorder-upcast",
        "gpt2",
        "causal",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    (
        "minimax_m3_vl_text:sparse",
        "minimax_m3_vl_text",
        "causal",
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_n_heads": KV,
            "index_block_size": 8,
            "index_topk_blocks": 2,
        },
    ),
    ("modernbert-decoder:window16", "modernbert-decoder", "causal", {"local_attention": WINDOW}),
]
# Only models of these classes are decoders if told so.
DECODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "reformer",
)
