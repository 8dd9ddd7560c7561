"""Releases a thread's OpenMP helpers, so that those of other threads wake quickly.

GNU's OpenMP keeps helpers for every thread that ever computed. Once all helpers together outnumber
the cores, they no longer wait actively for work, and each of the hundreds of short products of a
decode step has to wake one. Then a step takes twice as long, whichever thread runs it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

HARD = 2  # omp_pause_hard of OpenMP 5.0: release all; it is created again when needed


def release() -> None:
    """Free the calling thread's helpers; does nothing if PyTorch's OpenMP is not GNU's."""
    library = _library()
    if library is not None:
        library.omp_pause_resource_all(HARD)


@cache
def _library() -> Any:
    """Return PyTorch's copy of the library, already loaded, or None."""
    if sys.platform != "linux":
        return None
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
