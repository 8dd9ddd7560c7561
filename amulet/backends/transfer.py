"""Copies small numbers to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def on_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a tensor of numbers on a device, without waiting for the GPU's current work."""
    is_pinned = device.type == "cuda"  # a copy from unpinned memory would wait
    made = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=is_pinned)
    return made.to(device, non_blocking=True)
