"""Engines over Transformers models, for tests."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from amulet.backends.transformers.backend import TransformersBackend
from amulet.decoding.engine import Engine


def engine_over(
    model: PreTrainedModel,
    prefix_bytes: int = 0,
    drafts: bool = False,
    compile: bool | Literal["auto"] = False,
) -> Engine:
    """Return an engine that decodes with a model."""
    return Engine(TransformersBackend(model, compile), prefix_bytes, drafts)
