"""Makes a tiny random model of any type that Transformers lists, from its own config class."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from tests.coverage.tables import (
    DECODERS,
    DIM,
    LAYERS,
    OVER,
    TEXT,
    TEXT_PARTS,
    VARIANTS,
    VISION,
)

END = 2  # the id that ends an answer
PATTERNS = ("layer_types", "layers_block_type", "mlp_layer_types")
MORE_PATTERNS = (*PATTERNS, "block_types", "indexer_types")
KEPT = ("a_log", "dt_bias", "dt_proj", "time_decay", "time_first", "decay")  # as they are made


class Entry(NamedTuple):
    """A model type, or a variant of one.

    Attributes:
        label: its name in the table.
        model_type: as configs name it.
        image: whether it is the image-text class rather than the causal one.
        extra: further arguments of the config.
    """

    label: str
    model_type: str
    image: bool = False
    extra: dict[str, Any] = {}  # noqa: RUF012 - never written to


def entries() -> list[Entry]:
    """Return all causal models, the image-text ones that are others, and the variants."""
    causal = {config.model_type: model for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items()}
    image = {
        config.model_type: model for config, model in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items()
    }
    return [
        *(Entry(name, name) for name in sorted(causal)),
        *(
            Entry(f"{name} (image-text)", name, True)
            for name in sorted(image)
            if causal.get(name) is not image[name]
        ),
        *(Entry(label, name, auto == "image", extra) for label, name, auto, extra in VARIANTS),
    ]


def build(entry: Entry, seed: int = 0, gain: float = 1.6) -> PreTrainedModel:
    """Return a tiny random model in float32, in eval mode.

    Args:
        entry: which.
        seed: of its weights.
        gain: how widely they are drawn.
    """
    extra = dict(entry.extra)
    options = {"attn_implementation": extra.pop("_attn")} if "_attn" in extra else {}
    window = extra.pop("_window", None)
    over = OVER.get(entry.model_type, {}) | extra
    if entry.model_type in DECODERS:
        over = {"is_decoder": True} | over
    config = shrink(CONFIG_MAPPING[entry.model_type], TEXT, over)
    auto: Any = AutoModelForImageTextToText if entry.image else AutoModelForCausalLM
    torch.manual_seed(seed)
    model: Any = auto.from_config(config, dtype=torch.float32, **options)
    randomise(model, seed, gain)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            eos_token_id=END, pad_token_id=END, bos_token_id=1
        )
    if window:
        model.config.get_text_config().max_position_embeddings = window
    made: PreTrainedModel = model.eval()
    return made


def shrink(cls: type, table: dict[str, Any], over: dict[str, Any]) -> PretrainedConfig:
    """Return a config with small numbers, and few layers of each kind that it has by default."""
    known, aliases = _fields(cls), getattr(cls, "attribute_map", {})
    own = {name: value for name, value in over.items() if "." not in name}
    given = {name: value for name, value in table.items() if name in known}
    for name, alias in aliases.items():  # never both names of one thing
        if name in given and alias in given:
            del given[name]
    try:
        default: Any = cls()
    except Exception:  # it has no defaults
        default = None
    if default is not None:
        _follow_default(given, default, known, table)
    parts = {
        **(getattr(cls, "sub_configs", None) or {}),
        **(getattr(cls, "sub_configs_defaults", None) or {}),
    }
    for name in parts:
        part = getattr(default, name, None)
        if hasattr(type(part), "model_type"):
            inner = {
                key.split(".", 1)[1]: value
                for key, value in over.items()
                if key.startswith(f"{name}.")
            }
            given[name] = shrink(type(part), TEXT if name in TEXT_PARTS else VISION, inner)
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # latent: as many as heads
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= own
    for name, alias in aliases.items():
        if name in given and alias in given:
            del given[alias if name in own and alias not in own else name]
    made: PretrainedConfig = cls(**{k: v for k, v in given.items() if v != "DROP"})
    return made


def _fields(cls: type) -> set[str]:
    names = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    taken = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return names | set(taken) | set(getattr(cls, "attribute_map", {}))


def _follow_default(
    given: dict[str, Any], default: Any, known: set[str], table: dict[str, Any]
) -> None:
    """Leave windows off that are off by default; cut patterns of layers to their kinds."""
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(default, name, None) is None:
            given.pop(name, None)
    if table is not TEXT:
        return
    for name in MORE_PATTERNS:
        had = getattr(default, name, None)
        if name in known and isinstance(had, list | tuple) and had:
            kinds = list(dict.fromkeys(had))
            given[name] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    longest = max((len(given[name]) for name in PATTERNS if name in given), default=0)
    if longest > LAYERS:
        for name in PATTERNS:
            if name in given:
                given[name] = (given[name] * 2)[:longest]
        given["num_hidden_layers"] = longest
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        half = int(DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        sizes = [half - 2 * (half // 3), half // 3, half // 3]
        if half >= 8:
            rest = half - half // 4
            sizes = [half // 4, rest // 2, rest - rest // 2]
        given["rope_parameters"] = {**rope, "mrope_section": sizes}


def randomise(model: torch.nn.Module, seed: int, gain: float) -> None:
    """Draw matrices wide enough that logits differ clearly; stir norms and biases a little."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    scaled = any(name in type(model).__name__.lower() for name in ("gemma", "helium"))
    if getattr(config.get_text_config(), "embedding_multiplier", None) not in (None, 1.0):
        scaled = True

    def normal(weight: torch.Tensor, width: float) -> torch.Tensor:
        return torch.empty_like(weight).normal_(0, width, generator=generator)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if not weight.is_floating_point():
                continue
            if id(weight) in embeddings:
                weight.copy_(normal(weight, 0.3 if scaled else 1.0))
            elif last in ("A", "D") or any(kept in last.lower() for kept in KEPT):
                continue
            elif weight.ndim == 2 or (weight.ndim == 3 and min(weight.shape[1:]) > 8):
                inputs = weight.shape[-1] if weight.ndim == 2 else min(weight.shape[1:])
                weight.copy_(normal(weight, gain / math.sqrt(inputs)))
            elif weight.ndim == 1:
                weight.copy_(torch.nan_to_num(weight, 0.0, 0.0, 0.0) + normal(weight, 0.1))
            elif not weight.isfinite().all():
                weight.copy_(normal(weight, 0.1))
