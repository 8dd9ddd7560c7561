"""Joins linear layers that share an input, such as q, k and v, to one product in compiled code.

Several small products in turn leave much of a GPU's memory bandwidth unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

_in_use = False
GROUPS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def join_siblings(model: nn.Module) -> None:
    """Make the weights of layers that share an input adjacent, each a view of its part.

    Other code sees the same weights as before. Joined layers are skipped, unless a weight has been
    moved or replaced since.
    """
    for module in model.modules():
        for names in GROUPS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(layer) in (nn.Linear, SiblingLinear) for layer in layers):
                _join(layers)


@contextmanager
def joint_products() -> Iterator[None]:
    """Let code compiled in the block use joint products; other code does not use them."""
    global _in_use
    _in_use = True
    try:
        yield
    finally:
        _in_use = False


class SiblingLinear(nn.Linear):
    """A linear layer whose weight is a part of a joint one.

    Attributes:
        joint: the joint weight of all siblings.
        first: the start of its part in the joint's output.
        is_last: whether its part is the last one.
    """

    joint: Joint
    first: int
    is_last: bool

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's product, as a part of the joint one in code compiled for that."""
        if not (_in_use and torch.compiler.is_compiling()):
            return super().forward(hidden)
        joint = self.joint
        if joint.product is None or joint.of is not hidden:
            joint.of, joint.product = hidden, linear(hidden, joint.weight, joint.bias)
        part = joint.product[..., self.first : self.first + self.out_features]
        if self.is_last:
            joint.of = joint.product = None
        return part

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer, which then becomes a plain one and releases the joint weight."""
        self.__class__ = nn.Linear  # type: ignore[assignment]
        del self.joint
        return nn.Linear._apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    def is_joined(self) -> bool:
        """Tell whether the weight and bias are still parts of the joint ones."""
        pairs = ((self.weight, self.joint.weight), (self.bias, self.joint.bias))
        return all(
            own is None or (whole is not None and own.data_ptr() == whole[self.first].data_ptr())
            for own, whole in pairs
        )


class Joint:
    """The weight of several siblings, `[sum of out_features, in_features]`, and their bias.

    During compilation it holds their product until the last sibling has taken its part.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.of: torch.Tensor | None = None
        self.product: torch.Tensor | None = None


def _join(layers: list[Any]) -> None:
    if all(isinstance(layer, SiblingLinear) and layer.is_joined() for layer in layers):
        return
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    alike = {(weight.shape[1], weight.dtype, weight.device) for weight in weights}
    biased = {bias is not None for bias in biases}
    plain = all(type(weight) is nn.Parameter for weight in weights)  # on one device, as a whole
    if len(alike) > 1 or len(biased) > 1 or not plain:
        return
    with torch.inference_mode(False), torch.no_grad():  # the model may be trained later
        joint = Joint(torch.cat(weights), torch.cat(biases) if True in biased else None)
        first = 0
        for layer in layers:
            part = slice(first, first + layer.out_features)
            layer.weight.data = joint.weight[part]
            if joint.bias is not None:
                layer.bias.data = joint.bias[part]
            layer.__class__ = SiblingLinear
            layer.joint, layer.first, layer.is_last = joint, first, layer is layers[-1]
            first = part.stop
