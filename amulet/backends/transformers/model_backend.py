"""`ModelBackend`: what both ways of decoding a Transformers model share: device, weights, sizes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from amulet.backends.transformers.cpu.layers import are_native, renew_packed
from amulet.backends.transformers.cpu.openmp import release
from amulet.backends.transformers.weights import execution_device, weights_state

CHUNK = 512  # tokens in one pass of a prefill: it takes memory, and running answers wait for it
GPU_CHUNK = 2048  # the same on a GPU, whose passes of fewer tokens hardly take less time
WHOLE = 2**40  # ids in one pass where a prompt must be one
PASS_COST = 64  # the time that a pass takes besides that for its tokens, in tokens
NATIVE_PASS_COST = 16  # the same where whole layers are C code
WORTH_SHARING = 64  # tokens spared, from which a shared beginning is worth a pass of its own
GPU_WORTH_SHARING = 512  # the same on a GPU; a pass's cost, too


class ModelBackend:
    """The part of `Backend` that does not depend on how rows are kept.

    Args:
        model: a model with weights.
    """

    images_at_once = False

    def __init__(self, model: PreTrainedModel) -> None:
        execution_device(model)
        self.model = model
        on_gpu = model.device.type == "cuda"
        self.chunk = GPU_CHUNK if on_gpu else CHUNK
        self.worth_sharing = GPU_WORTH_SHARING if on_gpu else WORTH_SHARING
        cost = NATIVE_PASS_COST if are_native(model) else PASS_COST
        self.pass_cost = GPU_WORTH_SHARING if on_gpu else cost
        self._weights = weights_state(model)

    @property
    def device(self) -> torch.device:
        """Where token ids are expected, and logits are."""
        return execution_device(self.model)

    def queued(self) -> None:
        """Let go of the caller's OpenMP helpers, which would make the decode thread slow."""
        release()

    def state(self) -> object:
        """Return the weights' state, as `weights_state` tells it."""
        now = weights_state(self.model)
        if now != self._weights:
            renew_packed(self.model)
            self._weights = weights_state(self.model)
        return self._weights
