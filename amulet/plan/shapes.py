"""The shape of a model: the sizes of its weights and of a token's KV cache.

Parameters are counted on the model itself, built from its config without memory (on the "meta"
device), so that no formula of Amulet's can disagree with an architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amulet.errors import ModelError, RequestError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "llama",
        {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "llama-3.1-70b": (
        "llama",
        {
            **_LLAMA_3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
        },
    ),
}


@dataclass(frozen=True)
class Shape:
    """The sizes that determine a model's memory and time.

    Attributes:
        name: the name that was given.
        parameters: number of parameters.
        read: number of parameters that a decode step reads: all except an input embedding that is
            not also the output head.
        layers: number of layers with their own keys and values.
        kv_heads, head_dim: of one layer's keys, and of its values.
        window: the context window in tokens; None if unknown.
        dtype: the dtype of the saved model.
    """

    name: str
    parameters: int
    read: int
    layers: int
    kv_heads: int
    head_dim: int
    window: int | None
    dtype: str

    def weights(self, dtype: str) -> int:
        """Bytes of all weights."""
        return self.parameters * BYTES[dtype]

    def token(self, dtype: str, parts: int = 1) -> int:
        """Bytes of one token's keys and values, on each of `parts` GPUs that share the heads."""
        heads = -(-self.kv_heads // parts)
        return 2 * self.layers * heads * self.head_dim * BYTES[dtype]


def find_shape(given: str) -> Shape:
    """Return the shape of a model.

    Args:
        given: a known name, a config.json or a model's folder, or a hub id.

    Raises:
        RequestError: there is no model of that name.
        ModelError: its architecture is unknown, or its cache is not keys and values per token.
    """
    from transformers import AutoConfig

    if given.lower() in KNOWN:
        kind, options = KNOWN[given.lower()]
        # Llama's and Qwen's own dtype; a config built here does not state it.
        return shape_of(AutoConfig.for_model(kind, **options, dtype="bfloat16"), given.lower())
    path = Path(given)
    if not path.exists() and "/" not in given:
        raise RequestError(
            f"model-config={given!r}: no such file or folder; known names are {', '.join(KNOWN)}. "
            "A model on the hub is named with its owner, such as Qwen/Qwen3-0.6B."
        )
    try:
        config = AutoConfig.from_pretrained(given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model-config={given!r}: {reason} Expected a config.json as Transformers writes it, "
            "or a model's folder."
        ) from None
    return shape_of(config, given)


def shape_of(config: Any, name: str) -> Shape:
    """Return the shape of a Transformers config.

    Raises:
        ModelError: as for `find_shape`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from amulet.backends.transformers.masks import ATTENTION_KINDS, layer_kinds

    text = config.get_text_config()
    unknown = set(layer_kinds(text)) - ATTENTION_KINDS
    if unknown or getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{name}: layers of the kind {', '.join(sorted(unknown)) or 'latent attention'} don't "
            "store keys and values per token; plan can't estimate their memory."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name}: this config is not of a causal language model: {reason}"
        ) from None
    head = model.get_output_embeddings()
    entry = model.get_input_embeddings().weight
    tied = head is not None and head.weight is entry
    parameters = int(model.num_parameters())
    heads = text.num_attention_heads
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    return Shape(
        name=name,
        parameters=parameters,
        read=parameters - (0 if tied else entry.numel()),
        layers=text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0),
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        window=getattr(text, "max_position_embeddings", None),
        dtype=dtype if dtype in BYTES else "bfloat16",
    )
