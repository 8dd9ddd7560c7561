"""Linear layers with weights packed for the CPU: oneDNN's blocked layout, or int8; made once.

A decode step multiplies a few rows by every weight. PyTorch's `linear` then reads the weights in
a layout made for something else, or lays them out anew on every call; a packed copy does not.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Literal

import torch
from torch import nn

from amulet.errors import ModelError

PACKED_DTYPES = (torch.float32, torch.bfloat16)
INT8_ROWS = 16  # beyond these many rows the int8 kernel is slower than dense weights made anew

_numbers = itertools.count()
_packed: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # weight and bias by number


def _multiply(hidden: torch.Tensor, layer: int, _: int) -> torch.Tensor:
    weight, bias = _packed[layer]
    # The overload by name: to let PyTorch find it costs as much as a small layer's product.
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
        hidden, weight, bias, "none", [], ""
    )
    return output


# The compiler can't look into a packed tensor, so that compiled code asks for it by number.
_library: Any = torch.library.Library("amulet", "DEF")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor hidden, int layer, int out_features) -> Tensor")
_library.impl("packed_linear", _multiply, "CPU")


@torch.library.register_fake("amulet::packed_linear", lib=_library)  # type: ignore[untyped-decorator]
def _packed_linear_shape(hidden: torch.Tensor, layer: int, out_features: int) -> torch.Tensor:
    return hidden.new_empty((*hidden.shape[:-1], out_features))


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed, and only so.

    Args:
        linear: the layer to replace; on the CPU, in float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self._number = next(_numbers)
        _packed[self._number] = packed, None if linear.bias is None else linear.bias.detach()
        weakref.finalize(self, _packed.pop, self._number)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, for whoever asks."""
        dense: torch.Tensor = _packed[self._number][0].to_dense()
        return dense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        if torch.compiler.is_compiling():
            output: torch.Tensor = torch.ops.amulet.packed_linear(
                hidden, self._number, self.out_features
            )
            return output
        return _multiply(hidden, self._number, self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.dtype}"


class Int8Linear(nn.Module):
    """A linear layer with its weight rounded to 8 bits, one scale per output; half of bfloat16.

    Args:
        linear: the layer to replace; on the CPU, in bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        self._rounded = (weight / scale[:, None]).round().to(torch.int8)
        self._scale = scale.to(torch.bfloat16)
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, bfloat16."""
        return self._rounded.to(torch.bfloat16) * self._scale[:, None]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        rows = hidden.reshape(-1, self.in_features)
        if rows.shape[0] > INT8_ROWS:  # a prompt, or many users
            return nn.functional.linear(hidden, self.weight, self._bias)
        output: torch.Tensor = torch._weight_int8pack_mm(rows, self._rounded, self._scale)
        if self._bias is not None:
            output = output + self._bias
        return output.view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def pack_linears(model: nn.Module, pack: bool | Literal["int8"] = True) -> int:
    """Replace every plain `nn.Linear` of the model by a packed one; return how many.

    Nothing is done, and 0 returned, for a model that is not wholly on the CPU in float32 or
    bfloat16, that holds adapters, or where this build of PyTorch lacks the kernels. The dense
    weights are released, except where the embedding shares them with the head. The model decodes
    as before, to rounding; it can no longer be saved or trained.

    Args:
        model: a Transformers model.
        pack: "int8" also rounds the weights to 8 bits: faster for a user or two, and less memory;
            tokens may differ.

    Raises:
        ModelError: int8 was asked for and the model is not in bfloat16 on the CPU.
    """
    kind: Any = Int8Linear if pack == "int8" else PackedLinear
    if pack == "int8" and not (_can_pack(model) and _dtypes(model) == {torch.bfloat16}):
        raise ModelError(
            'pack="int8" is for models in bfloat16 on the CPU, without adapters: load with '
            'dtype="bfloat16" and device="cpu", or leave pack out.'
        )
    if not _can_pack(model):
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child))
                count += 1
    return count


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def _can_pack(model: nn.Module) -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and all(parameter.device.type == "cpu" for parameter in model.parameters())
        and bool(_dtypes(model))
        and _dtypes(model) <= set(PACKED_DTYPES)
        and not getattr(model, "_hf_peft_config_loaded", False)
    )
