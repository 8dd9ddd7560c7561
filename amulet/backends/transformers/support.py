"""Which models can be decoded in rows, and what their forward takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from amulet.backends.transformers.masks import (
    ATTENTION_KINDS,
    INDEXED,
    OTHER_KINDS,
    STATE_KINDS,
    attention_kind,
    has_states,
    layer_kinds,
)
from amulet.errors import ModelError

# Model types that carry a recurrent state through a pass of several ids.
# Before Transformers' caches had `get_conv_state`, between 5.19 and 5.23, not all of these did.
CARRYING = {
    "bailing_hybrid",
    "bamba",
    "deepseek_v4",
    "falcon_h1",
    "granitemoehybrid",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "qwen4_exp_text",
    "zamba2",
}
RESTARTING = {"falcon_mamba", "jamba", "mamba", "zamba"}  # and those that begin it anew in each
if not hasattr(Cache, "get_conv_state"):
    CARRYING = RESTARTING = set()
KNOWN = ATTENTION_KINDS | STATE_KINDS | OTHER_KINDS  # kinds of layers
if hasattr(Cache, "update_indexer"):
    KNOWN |= {INDEXED}
WITH_IMAGES = {"idefics", "kosmos-2"}  # model types that fail without one
# Model types whose forward does what its signature and config don't tell.
OF_ITS_OWN = {
    "inkling2_text": "it counts distances from one row's position for the whole pass",
    "inkling_text": "it counts distances from one row's position for the whole pass",
    "moshi": "its window begins behind the prompt",
    "qwen4_exp_text": "its indexer reads the layers of Transformers' own cache",
    "xlm": "it predicts what is at a mask token behind the prompt",
}


def check_decoder(model: PreTrainedModel) -> None:
    """Raise ModelError where a model does not write text token by token."""
    name = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model; Amulet decodes decoder-only (causal) models."
        )
    if not isinstance(model, GenerationMixin):
        raise ModelError(
            f"{type(model).__name__} is no model that Transformers' generate decodes token by "
            "token; Amulet decodes only such (causal) models."
        )
    image = inspect.signature(model.forward).parameters.get("pixel_values")
    if name in WITH_IMAGES or (image is not None and image.default is image.empty):
        raise ModelError(f"{name} reads an image with every text; Amulet decodes text alone.")


def why_not_in_rows(model: PreTrainedModel) -> str | None:
    """Return why this cache can't serve a model that is one of `check_decoder`, or None."""
    config = model.config
    text = config.get_text_config()
    unknown = set(layer_kinds(text)) - KNOWN
    if unknown:
        return f"it has layers of the kind {', '.join(sorted(unknown))}"
    if has_states(text) and text.model_type not in CARRYING | RESTARTING:
        return "it does not carry its recurrent state through a pass of several ids"
    attention = attention_kind(config)
    if attention not in ("sdpa", "eager"):
        return (
            f"its attention {attention!r} takes no mask per row (load it with "
            "attn_implementation='sdpa')"
        )
    if cache_argument(model) not in forward_parameters(model):
        return "its forward takes no cache of keys and values"
    return _not_by_row(model)


def check_supported(model: PreTrainedModel) -> None:
    """Raise ModelError where this cache can't serve the model, and say why."""
    check_decoder(model)
    if reason := why_not_in_rows(model):
        name = model.config.model_type
        raise ModelError(f"{name} can't be decoded in rows of unlike length: {reason}.")


def _not_by_row(model: PreTrainedModel) -> str | None:
    """Return why rows that are at different positions can't share a pass, if they can't."""
    text: Any = model.config.get_text_config()
    if set(layer_kinds(text)) == {"linear_attention"}:  # it counts no positions
        return None
    if "position_ids" not in forward_parameters(model):
        return "its forward takes no position_ids"
    if getattr(text, "alibi", False):
        return "ALiBi counts positions in a mask of its own"
    if "local" in getattr(text, "attention_layers", ()):
        return "its local layers count their window from the longest row's end"
    if hasattr(text, "keep_window_size"):
        return "its attention makes masks of its own"
    if attends_to_all(text):
        return "its prompt attends to all of itself"
    if text.model_type in OF_ITS_OWN:
        return OF_ITS_OWN[text.model_type]
    return None


def restarts(model: PreTrainedModel) -> bool:
    """Whether rows of a model must sometimes be computed from their first id."""
    return model.config.get_text_config().model_type in RESTARTING or bool(switches_rope(model))


def attends_to_all(text: Any) -> bool:
    """Whether the ids of a prompt attend to later ones, by a text model's config (PaliGemma)."""
    return getattr(text, "use_bidirectional_attention", None) is True


def switches_rope(model: PreTrainedModel) -> int | None:
    """Return beyond how many positions a model's rotary embedding is another one, if it is."""
    text: Any = model.config.get_text_config()
    window = getattr(text, "max_position_embeddings", None) or 0
    kinds = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    if any("longrope" in kind for kind in kinds):
        most = _least_original_length(getattr(text, "rope_parameters", None) or {})
        return most if most is not None and most < window else None
    return None


def _least_original_length(rope: dict[str, Any]) -> int | None:
    """Return from which length on the least of a text model's rotary embeddings changes."""
    name = "original_max_position_embeddings"
    kinds = (rope, *(part for part in rope.values() if isinstance(part, dict)))
    return min((part[name] for part in kinds if part.get(name)), default=None)


def cache_argument(model: nn.Module) -> str:
    """Return the name under which a model or layer takes its cache (renamed in 5.24)."""
    taken = forward_parameters(model)
    return next((name for name in ("past_key_values", "cache_params") if name in taken), "cache")


def forward_parameters(model: nn.Module) -> set[str]:
    """Return what a model's or layer's forward takes, also by what a subclass's hands on."""
    names: set[str] = set()
    inherited = (vars(kind).get("forward") for kind in type(model).__mro__)
    for forward in (model.forward, *inherited):
        if forward is not None:
            parameters = inspect.signature(forward).parameters
            names.update(parameters)
            if all(
                parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()
            ):
                break
    return names
