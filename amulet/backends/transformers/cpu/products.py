"""Products of a few rows with packed weights: the Python side of `native/products.c`.

In a step of few rows, PyTorch's kernels read the weights at half of the memory bandwidth.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.nn.functional import pad

from amulet.backends.transformers.cpu import native
from amulet.errors import ModelError

FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # kinds of weights, numbered as in `products.c`
BLOCK = 64  # outputs per block
# By kind, the maximum number of rows for which these products are faster; then the same with AMX.
MOST_ROWS = (128, 128, 256, 512)
MOST_ROWS_AMX = (128, 16, 48, 192)
MOST_ROWS_WITHOUT_BFLOAT16 = 8  # bfloat16 on processors without AVX-512's bfloat16

_in_blocks: dict[tuple[torch.Size, torch.dtype], bool] = {}  # by shape: is it packed as expected?


def serves(kind: int) -> bool:
    """Tell whether products of this kind are available."""
    return native.library() is not None and bool(native.library().amulet_serves(kind))


@cache
def most_rows(kind: int) -> int:
    """Return the maximum number of rows for which these products are faster."""
    if kind == BFLOAT16 and not serves(INT8):
        return MOST_ROWS_WITHOUT_BFLOAT16
    return (MOST_ROWS_AMX if "amx_bf16" in native.processor() else MOST_ROWS)[kind]


def address_of_blocks(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return the address of oneDNN's packed weight, or None if `multiply` can't read it.

    Args:
        packed: oneDNN's opaque tensor of the weight.
        weight: `[out_features, in_features]`, float32 or bfloat16.
    """
    asked = hasattr(torch.ops.mkldnn, "data_ptr") and hasattr(torch.ops.mkldnn, "_nbytes")
    if not asked or not serves(FLOAT32):
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    rows = -(-weight.shape[0] // BLOCK) * BLOCK
    if weight.shape[1] % pair:
        return None
    size = rows * weight.shape[1] * weight.itemsize
    if torch.ops.mkldnn._nbytes(packed) != size or address % weight.itemsize:
        return None
    # oneDNN does not document the layout, so it is checked bit for bit; once per shape and type,
    # because it depends on nothing else.
    kind = (weight.shape, weight.dtype)
    if kind not in _in_blocks:
        whole = torch.int16 if pair == 2 else torch.int32
        found = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=whole)
        padded = pad(weight.contiguous().view(whole), (0, 0, 0, rows - weight.shape[0]))
        expected = padded.view(rows // BLOCK, BLOCK, -1, pair).transpose(1, 2)
        equal = torch.equal(found.view(expected.shape), expected)
        if equal and bool((weight == weight[0, 0]).all()):
            return address  # equal numbers fit any layout, so this says nothing about other weights
        _in_blocks[kind] = equal
    return address if _in_blocks[kind] else None


def multiply(
    kind: int,
    hidden: torch.Tensor,
    weight: int,
    out_features: int,
    in_features: int,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `hidden @ weight.T + bias`, `[..., out_features]`.

    Args:
        kind: the weight's kind.
        hidden: `[..., in_features]` on the CPU, float32 for float32 weights, else bfloat16.
        weight: the address of the result of `address_of_blocks`, `int8_blocks` or `int4_blocks`.
        out_features, in_features: the weight's shape.
        scale: int8's, `[out_features]`, bfloat16.
        bias: `[out_features]`, contiguous, of the hidden states' dtype, or None.

    Raises:
        ModelError: the hidden states have another dtype or size.
    """
    dtype = torch.float32 if kind == FLOAT32 else torch.bfloat16
    if hidden.dtype != dtype or hidden.shape[-1] != in_features:
        raise ModelError(
            f"hidden states of {hidden.dtype}, {list(hidden.shape)}, for a packed layer: expected "
            f"{dtype}, [..., {in_features}]; load the model with pack=False for other passes."
        )
    for name, vector, kind_of in (("scale", scale, torch.bfloat16), ("bias", bias, dtype)):
        if vector is not None and (vector.shape, vector.dtype) != ((out_features,), kind_of):
            raise ModelError(
                f"a packed layer's {name} of {vector.dtype}, {list(vector.shape)}: expected "
                f"{kind_of}, [{out_features}]."
            )
    hidden = hidden.contiguous()
    output = hidden.new_empty((*hidden.shape[:-1], out_features))
    failed = native.library().amulet_product(
        kind,
        hidden.data_ptr(),
        weight,
        native.address(scale),
        native.address(bias),
        output.data_ptr(),
        hidden.numel() // in_features,
        out_features,
        in_features,
    )
    if failed:
        raise native.out_of_memory()
    return output


def int8_blocks(rounded: torch.Tensor) -> torch.Tensor:
    """Return int8 `[out_features, in_features]` as `[blocks, in_features / 2, BLOCK, 2]`."""
    padded = pad(rounded, (0, 0, 0, -rounded.shape[0] % BLOCK))
    return padded.view(-1, BLOCK, rounded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def int4_blocks(levels: torch.Tensor, scale: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return weights `scale * level + least` as bytes `[parts, groups, lines, 64]`, 16 rows a part.

    Args:
        levels: `[out_features, in_features]`, uint8 of 0 to 15; multiples of 16 and 32.
        scale, least: `[out_features, groups]`, bfloat16, of each 32 weights of a row.
    """
    groups = scale.shape[1]
    byte = levels.view(-1, 16, groups, 4, 2, 2, 2).permute(0, 2, 3, 1, 6, 4, 5)
    low, high = byte.unbind(-1)  # [parts, groups, lines, rows, odd, byte]
    lines = (low | high << 4).reshape(-1, groups, 4, 64)
    pairs = torch.stack([scale, least], dim=2).view(-1, 16, groups, 2).transpose(1, 2)
    first = pairs.contiguous().view(torch.uint8).reshape(-1, groups, 1, 64)
    return torch.cat([first, lines], dim=2)


def unpack(
    kind: int,
    blocks: torch.Tensor,
    out_features: int,
    in_features: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weight that was packed into blocks, `[out_features, in_features]`, bfloat16.

    Args:
        kind: INT8 or INT4.
        blocks: the result of `int8_blocks` or `int4_blocks`.
        out_features, in_features: their shape.
        scale: int8's, `[out_features]`, bfloat16.
    """
    weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    native.library().amulet_unpack(
        kind, blocks.data_ptr(), native.address(scale), weight.data_ptr(), out_features, in_features
    )
    return weight
