"""The shape of a model: what its weights weigh and what a token costs in cache.

Parameters are counted on the model itself, built without memory ("meta" device) from its config:
no formula of ours can be out of step with an architecture.
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
    """What memory and time of a model follow from.

    Attributes:
        name: how it was asked for.
        parameters: how many the model has.
        read: how many of them a decoding step reads: all but an input embedding that is not the
            output head too.
        layers: those with keys and values of their own.
        kv_heads, head_dim: of one layer's keys, and of its values.
        window: the context window in tokens; None where none is known.
        dtype: in which the model is saved.
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
        RequestError: there is nothing of that name.
        ModelError: its architecture is not known, or its cache is not one of keys and values per
            token.
    """
    from transformers import AutoConfig

    if given.lower() in KNOWN:
        kind, options = KNOWN[given.lower()]
        # Llama's and Qwen's own dtype; a config made here says nothing of it.
        return shape_of(AutoConfig.for_model(kind, **options, dtype="bfloat16"), given.lower())
    path = Path(given)
    if not path.exists() and "/" not in given:
        raise RequestError(
            f"model-config={given!r}: no such file or folder; known names are {', '.join(KNOWN)}. "
            "A model of the hub is named with its owner, such as Qwen/Qwen3-0.6B."
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

    from amulet.backends.transformers.masks import SUPPORTED_KINDS, layer_kinds

    text = config.get_text_config()
    unknown = set(layer_kinds(text)) - SUPPORTED_KINDS
    if unknown or getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{name}: layers of the kind {', '.join(sorted(unknown)) or 'latent attention'} keep "
            "something else than keys and values of every token; plan can't tell how much."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: no causal language model of this config: {reason}") from None
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
