"""A fingerprint of a loaded model: what a cache must tell apart beyond the model's name."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch

from amulet.model import Amulet

SAMPLES = 8  # values read of each parameter; a fine-tune or an adapter changes nearly all of them

_known: WeakKeyDictionary[Amulet, str] = WeakKeyDictionary()


def fingerprint(amulet: Amulet) -> str:
    """Return 16 hex digits that differ between models of one name: weights, dtype, template.

    It reads a few values of every parameter, once per `Amulet`; weights that are trained on
    afterwards keep the old fingerprint.
    """
    if (known := _known.get(amulet)) is not None:
        return known
    digest = hashlib.sha256()
    samples = []
    for name, parameter in amulet.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        if parameter.device.type != "meta":  # offloaded weights stay where they are
            flat = parameter.detach().reshape(-1)
            step = max(1, len(flat) // SAMPLES)
            samples.append(flat[::step][:SAMPLES].to(torch.float32).cpu())
    if samples:
        digest.update(torch.cat(samples).numpy().tobytes())
    digest.update(str(getattr(amulet.tokenizer, "chat_template", "")).encode())
    digest.update(repr(sorted(amulet.end_ids)).encode())
    return _known.setdefault(amulet, digest.hexdigest()[:16])
