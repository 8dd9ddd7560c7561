"""Small numbers on their way to the device, without a wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def on_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return a tensor of numbers on a device; the host doesn't wait for what the GPU is at."""
    is_pinned = device.type == "cuda"  # from other memory the copy would wait
    made = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=is_pinned)
    return made.to(device, non_blocking=True)
