"""Packs a model's linear layers for the CPU: in oneDNN's blocked layout, int8 or int4.

A decode step multiplies a few rows by every weight. PyTorch's `linear` reads the weights in an
unsuitable layout, or rearranges them on every call; packed weights avoid both.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from amulet.backends.transformers.cpu.layers import use_native_layers
from amulet.backends.transformers.cpu.packed_layers import (
    INT4_GROUP,
    Int4Linear,
    Int8Linear,
    PackedLayer,
    PackedLinear,
)
from amulet.backends.transformers.weights import is_adapter, weights_state
from amulet.errors import ModelError, OutOfMemoryError, is_out_of_memory, one_line

PACKED_DTYPES = (torch.float32, torch.bfloat16)
TRIAL = 2**27, 2**28  # least and most bytes of weights; fewer would fit into a cache


def pack_linears(model: nn.Module, pack: bool | Literal["int8", "int4"] = True) -> int:
    """Replace every plain `nn.Linear` of the model by a packed one; return their number.

    Does nothing and returns 0 for a model that is not wholly on the CPU in float32 or bfloat16 or
    that has adapters, if this build of PyTorch lacks the kernels, in bfloat16 if the processor
    lacks AVX-512, or in float32 if a short trial shows that packing is slower on this processor (it
    is faster on AMD's). The dense
    weights are released, unless the embedding shares them with the head. The model decodes
    as before, up to rounding, but can no longer be trained or copied or load other weights. With
    `pack=True` it can be saved, with the dense weights.

    Args:
        model: a Transformers model.
        pack: "int8" and "int4" also round the weights to that many bits, which is faster for few
            rows and takes less memory; tokens may differ. The head, most sensitive to rounding,
            stays at 8 bits.

    Raises:
        ModelError: `pack` is not one of these, or it is int8 or int4 and the model is not
            in bfloat16 on the CPU.
        OutOfMemoryError: there is no memory to pack the next layer; the model decodes as before,
            but may be packed in part.
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
    try:
        return _pack(model, pack)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "Out of memory while the model's weights were packed: load it with pack=False, or in "
            f"a smaller dtype. {one_line(error)}"
        ) from error


def _pack(model: nn.Module, pack: bool | Literal["int8", "int4"]) -> int:
    if not _can_pack(model) or (pack is True and _slows(model)):
        return 0
    head = getattr(model, "get_output_embeddings", lambda: None)()
    count = 0
    tied: list[tuple[PackedLayer, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed = _packed_layer(child, pack, child is head)
                setattr(parent, name, packed)
                count += 1
                source: Any = cast(Any, model).get_input_embeddings() if child is head else None
                if source is not None and child.weight is getattr(source, "weight", None):
                    tied.append((packed, source))
    # Other tensors may be mapped from the file, too, and would keep the whole file in memory.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for packed, source in tied:  # after its data has its final address
        packed.embedding_state = weights_state(source)
    use_native_layers(model)
    return count


def _slows(model: nn.Module) -> bool:
    """Tell whether two rows take longer with packed layers than with dense ones.

    In float32, with oneDNN's products, that depends on the processor, so a trial of some tenths of
    a second decides; with `products` they never do. In bfloat16 oneDNN refuses processors that
    have no instructions for it, such as those with AVX2 alone.
    """
    if torch.bfloat16 in _dtypes(model) and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return True
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not linears or PackedLinear(linears[0]).native_rows:
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
    while len(times) < 4 and sum(times) < 0.5:  # limits the time on a busy machine
        begun = time.perf_counter()
        for layer in layers:
            layer(hidden[layer.in_features])
        times.append(time.perf_counter() - begun)
    return min(times)


def _packed_layer(
    linear: nn.Linear, pack: bool | Literal["int8", "int4"], is_head: bool
) -> PackedLayer:
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
        and not any(map(is_adapter, model.modules()))
        # torchao's weights are tensors of their own kinds
        and all(type(parameter.data) is torch.Tensor for parameter in model.parameters())
    )
