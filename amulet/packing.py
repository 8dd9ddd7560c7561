"""Linear layers with weights packed for the CPU: oneDNN's blocked layout, int8 or int4.

A decode step multiplies a few rows by every weight. PyTorch's `linear` then reads the weights in
a layout made for something else, or lays them out anew on every call; a packed copy does not.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from amulet import products
from amulet.errors import ModelError

PACKED_DTYPES = (torch.float32, torch.bfloat16)
TRIAL = 2**27, 2**28  # bytes of weights: what fits into a cache tells nothing, more is not needed
INT4_GROUP = 32  # weights that share a scale and a least value


class _Packed(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    blocks: int | None  # where the weight lies, if `products` can read it
    most: int  # numbers in what is multiplied, up to which `products` is the faster one


_numbers = itertools.count()
_packed: dict[int, _Packed] = {}


def _multiply(hidden: torch.Tensor, layer: int, out_features: int) -> torch.Tensor:
    weight, bias, blocks, most = _packed[layer]
    if blocks is not None and hidden.numel() <= most and hidden.dtype == weight.dtype:
        return products.multiply(hidden.contiguous(), blocks, bias, out_features)
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


def _own_bias(linear: nn.Linear) -> torch.Tensor | None:
    """Return a copy: the bias itself may lie in the mapped file, and would keep it in memory."""
    return None if linear.bias is None else linear.bias.detach().clone()


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed, and only so.

    Args:
        linear: the layer to replace; on the CPU, in float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        weight = linear.weight.detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        most = products.most_rows(self.dtype) * self.in_features
        self._number = next(_numbers)
        blocks = products.address_of_blocks(packed, weight)
        self.reads_blocks = blocks is not None
        _packed[self._number] = _Packed(packed, _own_bias(linear), blocks, most)
        weakref.finalize(self, _packed.pop, self._number)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, for whoever asks."""
        dense: torch.Tensor = _packed[self._number].weight.to_dense()
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


class _RoundedLinear(nn.Module):
    """A linear layer with rounded weights: its own kernel for a few rows, dense for many.

    Args:
        linear: the layer to replace; on the CPU, in bfloat16.
    """

    _bits: int
    _most_rows: int  # beyond these many the kernel is slower than dense weights made anew

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._bias = _own_bias(linear)
        self._round(linear.weight.detach().float())

    def _round(self, weight: torch.Tensor) -> None:
        raise NotImplementedError

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, bfloat16."""
        raise NotImplementedError

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `hidden @ weight.T + bias`, `[..., out_features]`."""
        rows = hidden.reshape(-1, self.in_features)
        if rows.shape[0] > self._most_rows:  # a prompt, or many users
            return nn.functional.linear(hidden, self.weight, self._bias)
        output = self._multiply(rows)
        if self._bias is not None:
            output = output + self._bias
        return output.view(*hidden.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int{self._bits}"


class Int8Linear(_RoundedLinear):
    """Weights in 8 bits with one scale per output: half of bfloat16's memory."""

    _bits = 8
    _most_rows = 48

    def _round(self, weight: torch.Tensor) -> None:
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        self._rounded = (weight / scale[:, None]).round().to(torch.int8)
        self._scale = scale.to(torch.bfloat16)

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, bfloat16."""
        return self._rounded.to(torch.bfloat16) * self._scale[:, None]

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch._weight_int8pack_mm(rows, self._rounded, self._scale)
        return product


class Int4Linear(_RoundedLinear):
    """Weights in 4 bits, each `INT4_GROUP` with a scale and a least value, as GGUF's Q4_1 has.

    `out_features` must be a multiple of 16 and `in_features` one of the group. They are held twice
    (the kernel's layout can't be read back): together as much as int8.
    """

    _bits = 4
    _most_rows = 96

    def _round(self, weight: torch.Tensor) -> None:
        groups = weight.view(self.out_features, -1, INT4_GROUP)
        least, most = groups.aminmax(dim=2)
        scale = ((most - least) / 15).clamp_min(1e-12)
        levels = ((groups - least[..., None]) / scale[..., None]).round().clamp(0, 15).flatten(1)
        self._kernel_levels = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            levels.to(torch.int32), 1
        )
        # The kernel counts levels from the middle: weight = (level - 8) * scale + zero.
        self._scales = torch.stack([scale.T, (least + 8 * scale).T], dim=2).to(torch.bfloat16)
        halves = levels.to(torch.uint8).view(*scale.shape, 2, INT4_GROUP // 2)
        first, second = halves.unbind(2)
        self._levels = first | second << 4  # `[out, groups, half a group]`

    @property
    def weight(self) -> torch.Tensor:
        """A dense copy of the weight, `[out_features, in_features]`, bfloat16."""
        scale, zero = self._scales.permute(2, 1, 0)[..., None]
        least = zero - 8 * scale
        dense: torch.Tensor = scale.new_empty((*scale.shape[:2], 2, INT4_GROUP // 2))
        for half, levels in enumerate((self._levels & 15, self._levels >> 4)):
            torch.addcmul(least, levels.to(torch.bfloat16), scale, out=dense[:, :, half])
        return dense.flatten(1)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._kernel_levels, INT4_GROUP, self._scales
        )
        return product


def pack_linears(model: nn.Module, pack: bool | Literal["int8", "int4"] = True) -> int:
    """Replace every plain `nn.Linear` of the model by a packed one; return how many.

    Nothing is done, and 0 returned, for a model that is not wholly on the CPU in float32 or
    bfloat16, that holds adapters, where this build of PyTorch lacks the kernels, or in float32
    where a short trial shows that this processor is slower so (AMD's are faster). The dense
    weights are released, except where the embedding shares them with the head. The model decodes
    as before, to rounding; it can no longer be saved or trained.

    Args:
        model: a Transformers model.
        pack: "int8" and "int4" also round the weights to so many bits: faster for a few rows, and
            less memory; tokens may differ. The head stays at 8 bits, where rounding shows most.

    Raises:
        ModelError: `pack` is not one of these, or int8 or int4 was asked for and the model is not
            in bfloat16 on the CPU.
    """
    if pack not in (True, False, "int8", "int4"):
        raise ModelError(f'pack={pack!r}: expected True, False, "int8" or "int4".')
    if not pack:
        return 0
    if pack in ("int8", "int4") and not (_can_pack(model) and _dtypes(model) == {torch.bfloat16}):
        raise ModelError(
            f'pack="{pack}" is for models in bfloat16 on the CPU, without adapters: load with '
            'dtype="bfloat16" and device="cpu", or leave pack out.'
        )
    if not _can_pack(model) or _slows(model):
        return 0
    head = getattr(model, "get_output_embeddings", lambda: None)()
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _packed_layer(child, pack, child is head))
                count += 1
    # What is left may lie in the mapped file, too, and would keep the whole of it in memory.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return count


def _slows(model: nn.Module) -> bool:
    """Tell whether two rows take longer through packed float32 layers than through dense ones.

    Through oneDNN's own products that depends on the processor, and a trial of some tenths of a
    second decides; through `products` they never do.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not linears or PackedLinear(linears[0]).reads_blocks:
        return False
    sizes = itertools.accumulate(linear.weight.nbytes for linear in linears)
    sample = [linear for linear, size in zip(linears, sizes, strict=True) if size <= TRIAL[1]]
    if sum(linear.weight.nbytes for linear in sample) < TRIAL[0] or _dtypes(model) != {
        torch.float32
    }:
        return False
    with torch.inference_mode():
        return _seconds([PackedLinear(linear) for linear in sample]) > _seconds(sample)


def _seconds(layers: Sequence[nn.Linear | PackedLinear]) -> float:
    hidden = {layer.in_features: torch.ones(2, layer.in_features) for layer in layers}
    times: list[float] = []
    while len(times) < 4 and sum(times) < 0.5:  # a busy machine is not kept busy for long
        begun = time.perf_counter()
        for layer in layers:
            layer(hidden[layer.in_features])
        times.append(time.perf_counter() - begun)
    return min(times)


def _packed_layer(
    linear: nn.Linear, pack: bool | Literal["int8", "int4"], is_head: bool
) -> nn.Module:
    fits = linear.out_features % 16 == 0 and linear.in_features % INT4_GROUP == 0
    if pack == "int4" and fits and not is_head:
        return Int4Linear(linear)
    return Int8Linear(linear) if pack in ("int8", "int4") else PackedLinear(linear)


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
