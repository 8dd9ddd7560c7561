"""Linear layers with weights packed for the CPU: oneDNN's blocked layout, made once.

A decode step multiplies a few rows by every weight. PyTorch's `linear` then reads the weights in
a layout made for something else, or lays them out anew on every call; a packed copy does not.
"""

from __future__ import annotations

import torch
from torch import nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed, and only so.

    Args:
        linear: the layer to replace; on the CPU, in float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, for whoever asks."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._packed, self._bias, "none", [], ""
        )
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.dtype}"


def pack_linears(model: nn.Module) -> int:
    """Replace every plain `nn.Linear` of the model by a packed one; return how many.

    Nothing is done, and 0 returned, for a model that is not wholly on the CPU in float32 or
    bfloat16, that holds adapters, or where this build of PyTorch lacks the kernels. The dense
    weights are released, except where the embedding shares them with the head. The model decodes
    as before, to rounding; it can no longer be saved or trained.
    """
    if not _can_pack(model):
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count


def _can_pack(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(parameters)
        and all(p.device.type == "cpu" and p.dtype in PACKED_DTYPES for p in parameters)
        and not getattr(model, "_hf_peft_config_loaded", False)
    )
