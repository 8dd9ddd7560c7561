"""A fingerprint of a loaded model, by which caches distinguish models of the same name."""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from amulet.backends.llamacpp.model import GGUFModel
from amulet.backends.transformers.weights import weights_digest, weights_state
from amulet.model import Amulet

_known: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()  # by model: state and digest


def fingerprint(amulet: Amulet) -> str:
    """Return 16 hex digits that depend on the model's weights, dtype and chat template.

    Packed and offloaded weights and active adapters count, too. The weights are read once, and
    again when `weights_state` detects a change.
    """
    model: Any = amulet.model
    if isinstance(model, GGUFModel):
        return _hashed(amulet, model.digest)
    state = weights_state(model) if isinstance(model, nn.Module) else None
    known = _known.get(model)
    if known is None or known[0] != state:
        known = _known[model] = state, weights_digest(model)
    return _hashed(amulet, known[1])


def _hashed(amulet: Amulet, weights: str) -> str:
    template = getattr(amulet.tokenizer, "chat_template", "")
    facts = f"{weights} {template} {sorted(amulet.end_ids)}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
