"""The models and decode loops that the benchmarks compare: Transformers' and Amulet's.

Every answer has its full number of tokens, because the end-of-turn token is an ordinary token on
both sides. So neither side needs a processor that forbids it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3_5TextConfig,
)
from transformers.utils import logging

from amulet import Amulet
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.models.embedded import embedded_folder, load_embedded

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    # Three of four layers are a gated delta net, as in Qwen 3.5.
    "qwen3.5-0.8b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    },
    # Ten of sixteen layers are short convolutions, as in LFM2.
    "lfm2-350m": {
        "vocab_size": 65536,
        "hidden_size": 1024,
        "intermediate_size": 6656,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "layer_types": ["conv", "conv", "full_attention"] * 4
        + ["conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    # Its rows are passed one by one, because of ALiBi.
    "bloom-560m": {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "mamba-370m": {
        "vocab_size": 50280,
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "state_size": 16,
        "tie_word_embeddings": True,
    },
}
FAMILIES = {
    "bloom": BloomConfig,
    "lfm2": Lfm2Config,
    "mamba": MambaConfig,
    "qwen2": Qwen2Config,
    "qwen3.5": Qwen3_5TextConfig,
}


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return SmolLM2's tokenizer, which models with random weights use, too."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(embedded_folder()))
    return loaded


def load(
    name: str, dtype: torch.dtype, *, pack: Any = False, device: str = "cpu"
) -> PreTrainedModel:
    """Return a model that never ends an answer; random weights have seed 0.

    Args:
        name: "smollm2", or a key of `SHAPES`.
        dtype: of weights and cache.
        pack: False, as Transformers loads it; True, "int8" or "int4", as Amulet packs it on the
            CPU.
        device: the model's device.
    """
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if name == "smollm2":
        model, _ = load_embedded(dtype=dtype, pack=pack, device=device)
    else:
        model = random_model(config_of(name), dtype, device)
        if pack:
            pack_linears(model, pack)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def config_of(name: str) -> PretrainedConfig:
    """Return the configuration of a shape with random weights."""
    kind: Any = FAMILIES.get(name.rpartition("-")[0], LlamaConfig)
    config: PretrainedConfig = kind(
        **SHAPES[name], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None
    )
    return config


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return a model with random weights, seed 0."""
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = from_config(copy.copy(config), dtype=dtype).eval()
    return model


def amulet_over(model: PreTrainedModel, **options: Any) -> Amulet:
    """Return an `Amulet` whose answers have exactly `max_new_tokens` tokens.

    Args:
        options: of `Amulet`; by default, nothing is kept between answers and drafts are off.
    """
    asked = {"prefix_cache_bytes": 0, "drafts": False, **options}
    known = inspect.signature(Amulet.__init__).parameters
    absent = sorted(set(asked) - set(known) - {"drafts"})
    if absent:
        print(f"this version of Amulet has no {', '.join(absent)}: left out")
    amulet = Amulet(model, tokenizer(), **{k: v for k, v in asked.items() if k in known})
    amulet.end_ids = frozenset()
    return amulet


def generate(model: PreTrainedModel, ids: Sequence[int], n: int, **options: Any) -> list[int]:
    """Return n tokens of Transformers' greedy `generate` after a prompt."""
    prompt = torch.tensor([list(ids)], device=model.device)
    out = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        do_sample=False,
        **options,
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    if len(answer) != n:
        raise AssertionError(f"generate gave {len(answer)} tokens of {n}")
    return answer


def chat(amulet: Amulet, messages: Sequence[dict[str, Any]], n: int, **options: Any) -> list[int]:
    """Return n tokens of Amulet's greedy answer to a chat."""
    reply = amulet.chat(messages, max_new_tokens=n, **options)
    if len(reply.token_ids) != n:
        raise AssertionError(f"Amulet gave {len(reply.token_ids)} tokens of {n}")
    return list(reply.token_ids)


def guided(
    model: PreTrainedModel, preferred: Sequence[int], base: Sequence[int], n: int, strength: float
) -> list[int]:
    """Return n tokens of Transformers' classifier-free guidance: the same formula, two passes."""
    negative = torch.tensor([list(base)], device=model.device)
    return generate(model, preferred, n, guidance_scale=1 + strength, negative_prompt_ids=negative)


def weight_bytes(model: PreTrainedModel, itemsize: float | None = None) -> int:
    """Return the bytes of the weights that one decode step reads: all linear layers.

    Args:
        model: a model that is not packed; a step reads only one row of the embedding.
        itemsize: bytes of a weight; None for the model's dtype.
    """
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    size = model.dtype.itemsize if itemsize is None else itemsize
    return int(sum(linear.weight.numel() for linear in linears) * size)


def cache_bytes(config: PretrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of the KV cache of one row of this many tokens."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_layer = 2 * config.num_key_value_heads * width * dtype.itemsize
    return int(config.num_hidden_layers * per_layer * tokens)
