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
BLOCK = 64  # outputs that lie together
MOST_ROWS, MOST_ROWS_AMX = 128, 16  # beyond them oneDNN is as fast: its tiles, in bfloat16


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
    loaded.amulet_blocked.argtypes = [ctypes.c_int, *[address] * 4, *[number] * 3]
    loaded.amulet_blocked.restype = None
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


@cache
def most_rows(dtype: torch.dtype) -> int:
    """Return up to how many rows these products are the faster ones."""
    tiles = dtype == torch.bfloat16 and "amx_bf16" in processor()
    return MOST_ROWS_AMX if tiles else MOST_ROWS


def address_of_blocks(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Return where oneDNN's packed weight lies, if `multiply` can read it.

    Args:
        packed: the opaque tensor that oneDNN made of the weight.
        weight: `[out_features, in_features]`, float32 or bfloat16.
    """
    if library() is None or not hasattr(torch.ops.mkldnn, "data_ptr"):
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
    whole = torch.int16 if weight.itemsize == 2 else torch.int32
    found = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=whole)
    padded = pad(weight.contiguous().view(whole), (0, 0, 0, rows - weight.shape[0]))
    expected = padded.view(rows // BLOCK, BLOCK, -1, pair).transpose(1, 2)
    return address if torch.equal(found.view(expected.shape), expected) else None


def multiply(
    hidden: torch.Tensor, address: int, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """Return `hidden @ weight.T + bias`, `[..., out_features]`.

    Args:
        hidden: `[..., in_features]`, contiguous, on the CPU, of the weight's dtype.
        address: what `address_of_blocks` returned.
        bias: `[out_features]`, contiguous, of the same dtype, or None.
        out_features: the weight's rows.
    """
    in_features = hidden.shape[-1]
    output = hidden.new_empty((*hidden.shape[:-1], out_features))
    library().amulet_blocked(
        hidden.dtype == torch.bfloat16,
        hidden.data_ptr(),
        address,
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        hidden.numel() // in_features,
        out_features,
        in_features,
    )
    return output
