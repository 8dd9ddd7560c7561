"""Products of a few rows with packed weights: `products.c`, compiled here once and cached.

PyTorch's kernels read the weights of a step of few rows at half of the memory's speed. Where there
is no C compiler, or oneDNN lays weights out otherwise than the code reads them, they are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from amulet.cache_folder import cache_folder

logger = logging.getLogger("amulet")

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # kinds of weights, as `products.c` numbers them
BLOCK = 64  # outputs that lie together
# By kind, up to how many rows these products are the faster ones; and where oneDNN has AMX's tiles.
MOST_ROWS = (128, 128, 256, 512)
MOST_ROWS_AMX = (128, 16, 48, 192)


@cache
def library() -> Any:
    """Return the compiled code, or None, with the reason in the log."""
    try:
        path = _built()
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.info("Products of few rows are PyTorch's: %.300s", " ".join(str(said).split()))
        return None
    address, number = ctypes.c_void_p, ctypes.c_long
    loaded.amulet_product.argtypes = [ctypes.c_int, *[address] * 5, *[number] * 3]
    loaded.amulet_unpack.argtypes = [ctypes.c_int, *[address] * 3, *[number] * 2]
    loaded.amulet_unpack.restype = None
    return loaded


def _built() -> Path:
    """Compile, unless that was done before for this source, compiler and processor."""
    if sys.platform != "linux":
        raise OSError(f"they are compiled on Linux alone, not on {sys.platform}")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("there is no C compiler (`cc`; Debian: apt install gcc libc6-dev)")
    made_of = (SOURCE.read_text(), compiler, os.stat(compiler).st_mtime, FLAGS, processor())
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    path = cache_folder() / "products" / f"{key}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        parts = str(Path(folder) / "products.o"), str(Path(folder) / "products.so")
        # Linked without OpenMP: its functions are then those of the library that PyTorch has
        # loaded, and its threads are PyTorch's. A second library's would compete with them.
        _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", parts[0])
        _run(compiler, "-shared", parts[0], "-o", parts[1])
        os.replace(parts[1], path)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@cache
def processor() -> str:
    """Return what code made for this processor depends on: its model and instructions."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def serves(kind: int) -> bool:
    """Tell whether there are products of this kind here."""
    return library() is not None and bool(library().amulet_serves(kind))


@cache
def most_rows(kind: int) -> int:
    """Return up to how many rows these products are the faster ones."""
    return (MOST_ROWS_AMX if "amx_bf16" in processor() else MOST_ROWS)[kind]


def address_of_blocks(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return where oneDNN's packed weight lies, if `multiply` can read it.

    Args:
        packed: the opaque tensor that oneDNN made of the weight.
        weight: `[out_features, in_features]`, float32 or bfloat16.
    """
    if not serves(FLOAT32) or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    address: int = torch.ops.mkldnn.data_ptr(packed)
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    rows = -(-weight.shape[0] // BLOCK) * BLOCK
    if weight.shape[1] % pair:
        return None
    size = rows * weight.shape[1] * weight.itemsize
    if torch.ops.mkldnn._nbytes(packed) != size or address % weight.itemsize:
        return None
    # The layout is oneDNN's own affair, so it is looked at, bit for bit, and not relied on.
    whole = torch.int16 if pair == 2 else torch.int32
    found = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=whole)
    padded = pad(weight.contiguous().view(whole), (0, 0, 0, rows - weight.shape[0]))
    expected = padded.view(rows // BLOCK, BLOCK, -1, pair).transpose(1, 2)
    return address if torch.equal(found.view(expected.shape), expected) else None


def multiply(
    kind: int,
    hidden: torch.Tensor,
    weight: int,
    out_features: int,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `hidden @ weight.T + bias`, `[..., out_features]`.

    Args:
        kind: of the weight.
        hidden: `[..., in_features]` on the CPU, float32 for float32 weights, else bfloat16.
        weight: the address of what `address_of_blocks`, `int8_blocks` or `int4_blocks` returned.
        out_features: the weight's rows.
        scale: int8's, `[out_features]`, bfloat16.
        bias: `[out_features]`, contiguous, of the hidden states' dtype, or None.
    """
    hidden = hidden.contiguous()
    in_features = hidden.shape[-1]
    output = hidden.new_empty((*hidden.shape[:-1], out_features))
    failed = library().amulet_product(
        kind,
        hidden.data_ptr(),
        weight,
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        hidden.numel() // in_features,
        out_features,
        in_features,
    )
    if failed:
        raise torch.OutOfMemoryError("no memory for the sums of a product")
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
    kind: int, blocks: torch.Tensor, out_features: int, in_features: int, scale: Any = None
) -> torch.Tensor:
    """Return what was packed into blocks, `[out_features, in_features]`, bfloat16.

    Args:
        kind: INT8 or INT4.
        blocks: of `int8_blocks` or `int4_blocks`.
        out_features, in_features: their shape.
        scale: int8's, `[out_features]`, bfloat16.
    """
    weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    address = None if scale is None else scale.data_ptr()
    library().amulet_unpack(
        kind, blocks.data_ptr(), address, weight.data_ptr(), out_features, in_features
    )
    return weight
