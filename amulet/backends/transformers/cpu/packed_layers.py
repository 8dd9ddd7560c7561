"""Linear layers with weights packed in the order of reading: unchanged, in 8 bits or in 4 bits."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import nn

from amulet.backends.transformers.cpu import products
from amulet.errors import ModelError

INT4_GROUP = 32  # weights that share a scale and a minimum

_numbers = itertools.count()
_layers: WeakValueDictionary[int, PackedLayer] = WeakValueDictionary()


class Blocks(NamedTuple):
    """A weight in the form that `products` reads: its kind, its address, and int8's scale."""

    kind: int
    address: int
    scale: torch.Tensor | None = None


class PackedLayer(nn.Module):
    """A linear layer that holds its weight only in packed form.

    Args:
        linear: the layer to replace, on the CPU.

    Attributes:
        blocks: the weight in the form that `products` reads; None if it can't.
        native_rows: the maximum number of rows that `products` multiplies; 0 if it never does.
        embedding_state: state of the embedding that shares this head's weight, when it was packed.
    """

    blocks: Blocks | None = None
    native_rows = 0
    embedding_state: Any = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # A copy, because the bias may be mapped from the file and would keep the whole file.
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self._number = next(_numbers)
        _layers[self._number] = self

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, for outside readers.

        Writing into the copy is an error, because the layer would not notice.
        """
        with torch.inference_mode():  # such a tensor can't be changed outside of it
            return self.dense().clone()

    def dense(self) -> torch.Tensor:
        """Return the weight that is multiplied, `[out_features, in_features]`."""
        raise NotImplementedError

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        raise NotImplementedError

    def _by_blocks(self, blocks: Blocks, hidden: torch.Tensor) -> torch.Tensor:
        shape = self.out_features, self.in_features
        return products.multiply(
            blocks.kind, hidden, blocks.address, *shape, blocks.scale, self.bias
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `product(hidden)`; compiled code calls it by the layer's number."""
        if torch.compiler.is_compiling():
            output: torch.Tensor = torch.ops.amulet.packed_linear(
                hidden, self._number, self.out_features
            )
            return output
        return self.product(hidden)

    def __reduce__(self) -> Any:
        """Refuse copying and pickling: the copy would have the address of this layer's weight."""
        raise ModelError(
            "A packed layer can't be copied or saved: load the model with pack=False for that."
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse another weight or bias: C code has the address of the present one."""
        raise ModelError(
            f"A packed layer can't be given another {name}: load the model with pack=False, "
            "change it there, and give that model to Amulet."
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the weight as the dense layer would."""
        destination[f"{prefix}weight"] = self.dense()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Refuse other weights: C code has the addresses of the present ones."""
        raise ModelError(
            "Weights can't be loaded into a packed model: load the model with pack=False, load "
            "them into that model, and give it to Amulet."
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# The compiler can't look into a packed weight, so compiled code refers to it by number.
_library: Any = torch.library.Library("amulet", "DEF")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor hidden, int layer, int out_features) -> Tensor")
_library.impl("packed_linear", lambda hidden, layer, _: _layers[layer].product(hidden), "CPU")


@torch.library.register_fake("amulet::packed_linear", lib=_library)  # type: ignore[untyped-decorator]
def _packed_linear_shape(hidden: torch.Tensor, layer: int, out_features: int) -> torch.Tensor:
    return hidden.new_empty((*hidden.shape[:-1], out_features))


class PackedLinear(PackedLayer):
    """Unchanged weights, float32 or bfloat16, in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        kind = products.FLOAT32 if self.dtype == torch.float32 else products.BFLOAT16
        address = products.address_of_blocks(self._packed, weight)
        if address is not None:
            self.blocks = Blocks(kind, address)
            self.native_rows = products.most_rows(kind)
        self._most = self.native_rows * self.in_features

    def dense(self) -> torch.Tensor:
        """Return the weight, `[out_features, in_features]`."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        blocks = self.blocks
        if blocks is not None and hidden.numel() <= self._most and hidden.dtype == self.dtype:
            return self._by_blocks(blocks, hidden)
        # Names the overload, because resolving it costs as much as a small layer's product.
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            hidden, self._packed, self.bias, "none", [], ""
        )
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.dtype}"


class _RoundedLinear(PackedLayer):
    """Rounded weights of a bfloat16 layer: own products for few rows, dense for many."""

    _bits: int
    _most_rows: int  # with more rows, the kernel is slower than making dense weights

    def _few_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the product by PyTorch's kernel with the bias, `[..., out_features]`."""
        raise NotImplementedError

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        if hidden.numel() > self._most_rows * self.in_features:  # a prompt, or many users
            return nn.functional.linear(hidden, self.dense(), self.bias)
        if self.blocks is not None:
            return self._by_blocks(self.blocks, hidden)
        return self._few_rows(hidden)

    def _with_bias(self, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            output = output + self.bias
        return output.view(*hidden.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Refuse saving, which would pass rounded weights off as the original ones."""
        raise ModelError(
            f"Weights rounded to {self._bits} bits can't be saved: load the model with pack=False "
            "for that."
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int{self._bits}"


class Int8Linear(_RoundedLinear):
    """8-bit weights with one scale per output, half of bfloat16's memory."""

    _bits = 8

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        rounded = (weight / scale[:, None]).round().to(torch.int8)
        self._scale = scale.to(torch.bfloat16)
        self._rounded = rounded
        if products.serves(products.INT8) and self.in_features % 2 == 0:
            self._rounded = products.int8_blocks(rounded)
            self.blocks = Blocks(products.INT8, self._rounded.data_ptr(), self._scale)
            self.native_rows = products.most_rows(products.INT8)
        self._most_rows = self.native_rows or 48

    def dense(self) -> torch.Tensor:
        """Return the rounded weight, `[out_features, in_features]`, bfloat16."""
        if self.blocks is not None:
            return products.unpack(
                products.INT8, self._rounded, self.out_features, self.in_features, self._scale
            )
        return self._rounded.to(torch.bfloat16) * self._scale[:, None]

    def _few_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        return self._with_bias(torch._weight_int8pack_mm(rows, self._rounded, self._scale), hidden)


class Int4Linear(_RoundedLinear):
    """4-bit weights with a scale and a minimum per `INT4_GROUP`, as in GGUF's Q4_1.

    `out_features` must be a multiple of 16 and `in_features` of the group. The layout of PyTorch's
    kernel can't be read back, so weights are held twice with it, in as much memory as int8.
    """

    _bits = 4

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        groups = weight.view(self.out_features, -1, INT4_GROUP)
        least, most = groups.aminmax(dim=2)
        scale = ((most - least) / 15).clamp_min(1e-12)
        levels = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1)
        levels = levels.to(torch.uint8)
        self._most_rows = 96
        if products.serves(products.INT4):
            self._levels = products.int4_blocks(levels, scale.bfloat16(), least.bfloat16())
            self.blocks = Blocks(products.INT4, self._levels.data_ptr())
            self.native_rows = self._most_rows = products.most_rows(products.INT4)
            return
        self._kernel_levels = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            levels.to(torch.int32), 1
        )
        # The kernel counts levels from the middle: weight = (level - 8) * scale + zero.
        self._scales = torch.stack([scale.T, (least + 8 * scale).T], dim=2).to(torch.bfloat16)
        first, second = levels.view(*scale.shape, 2, INT4_GROUP // 2).unbind(2)
        self._levels = first | second << 4  # `[out, groups, half a group]`

    def dense(self) -> torch.Tensor:
        """Return the rounded weight, `[out_features, in_features]`, bfloat16."""
        if self.blocks is not None:
            return products.unpack(products.INT4, self._levels, self.out_features, self.in_features)
        scale, zero = self._scales.permute(2, 1, 0)[..., None]
        least = zero - 8 * scale
        dense: torch.Tensor = scale.new_empty((*scale.shape[:2], 2, INT4_GROUP // 2))
        for half, levels in enumerate((self._levels & 15, self._levels >> 4)):
            torch.addcmul(least, levels.to(torch.bfloat16), scale, out=dense[:, :, half])
        return dense.flatten(1)

    def _few_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._kernel_levels, INT4_GROUP, self._scales
        )
        return self._with_bias(product, hidden)


def native_rows(model: nn.Module) -> int:
    """Return the maximum number of rows for which all products of a model use C code, or 0."""
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    dense = any(p.dim() > 1 for module in others for p in module.parameters(recurse=False))
    return 0 if dense else min((layer.native_rows for layer in layers), default=0)
