"""Attention masks of rows whose columns are positions, per kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from typing import Any, TypeAlias

import torch
from transformers import PretrainedConfig

Masks: TypeAlias = torch.Tensor | dict[str, torch.Tensor | None] | None


def by_kind(config: PretrainedConfig, mask: Callable[[str], torch.Tensor | None]) -> Masks:
    """Return the masks of a text model's kinds of layers, in the form that its forward expects."""
    kinds = set(layer_kinds(config))
    if kinds == {"linear_attention"}:
        return None
    made = {kind: mask(kind) if kind in ATTENTION_KINDS | {INDEXED} else None for kind in kinds}
    if has_states(config):  # its forward looks these up, whatever its layers are called
        made = {"full_attention": mask("full_attention"), "linear_attention": None} | made
    if getattr(config, "layer_types", None):
        return made
    return next(iter(made.values()))


def column_mask(
    kind: str,
    config: PretrainedConfig,
    positions: torch.Tensor,
    columns: int,
    additive: torch.dtype | None,
    also: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which columns each token attends to, `[rows, 1, width, columns]`.

    Args:
        kind: of the layers; see `layer_kinds`.
        config: of the text model.
        positions: of the tokens, `[rows, width]`.
        columns: how many there are.
        additive: of what dtype, 0 where it attends and the least number elsewhere; None is bool.
        also: later columns that tokens attend to, in the form of what is returned, as bool.
    """
    query = positions[:, None, :, None]
    column = torch.arange(columns, device=positions.device)
    seen = column <= query if also is None else (column <= query) | also
    limit = reach(kind, config)
    if limit is not None and kind == "sliding_attention":
        seen &= column > query - limit
    elif limit is not None:
        seen &= column // limit == query // limit
    if additive is None:
        return seen
    zero = torch.zeros((), dtype=additive, device=positions.device)
    return torch.where(seen, zero, torch.finfo(additive).min)


def reach(kind: str, config: PretrainedConfig) -> int | None:
    """Return how many columns such a layer sees at most, None for all."""
    if kind == "sliding_attention":
        window: int | None = getattr(config, "sliding_window", None)
        return window
    return int(config.attention_chunk_size) if kind == "chunked_attention" else None


def attention_kind(config: PretrainedConfig) -> str:
    """Return Transformers' name of the attention that a model was loaded with, such as "sdpa"."""
    # It is set by public names, and has none itself.
    kind: str = config._attn_implementation
    return kind


def additive_dtype(config: PretrainedConfig, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of a model's masks where its attention adds them; None where it takes bool.

    Args:
        config: of the model.
        dtype: of its numbers.
    """
    return dtype if attention_kind(config) == "eager" else None


ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
INDEXED = "indexed_attention"  # an indexer, with keys of its own, chooses what tokens attend to
STATE_KINDS = {"linear_attention", "conv", "hybrid"}  # a hybrid layer attends as well
OTHER_KINDS = {"moe", "mlp"}  # which need no mask and keep nothing


def has_indexer(config: PretrainedConfig) -> bool:
    """Whether a text model has layers with an indexer, which keeps keys of its own."""
    return INDEXED in layer_kinds(config)


def has_states(config: PretrainedConfig) -> bool:
    """Whether a text model has layers with a recurrent state."""
    return bool(STATE_KINDS & set(layer_kinds(config)))


def kind_of_layer(config: PretrainedConfig, layer: int) -> str:
    """Return the kind of a text model's layer, one of `layer_kinds`."""
    kinds = getattr(config, "layer_types", None)
    return str(kinds[layer] if kinds else layer_kinds(config)[0])


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """Return the kinds of attention that a text model's layers have, each once."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return sorted(set(kinds))
    kind: Any = type(config)
    slides = getattr(config, "sliding_window", None) and _declares(kind, "sliding_window")
    return ["sliding_attention" if slides else "full_attention"]


@cache
def _declares(kind: Any, name: str) -> bool:
    """Whether a config class declares a field; models ignore the rest of their config file."""
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    taken = (signature(cls.__init__).parameters for cls in kind.__mro__)
    return any(name in names for names in (known, *taken, kind.attribute_map))
