"""Lets go of a thread's OpenMP helpers, so that another thread's are quick to wake.

GNU's OpenMP keeps helpers for every thread that ever computed. Once all of them together are more
than the processor has cores, none waits actively for work any more, and each of the hundreds of
short products of a decode step waits for a helper to be woken: a step takes twice as long,
whichever thread runs it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

HARD = 2  # omp_pause_hard of OpenMP 5.0: give up what is held; it is made anew when needed


def release() -> None:
    """Free the calling thread's helpers; nothing where PyTorch has another OpenMP than GNU's."""
    library = _library()
    if library is not None:
        library.omp_pause_resource_all(HARD)


@cache
def _library() -> Any:
    """PyTorch's own copy of the library, already loaded, or None."""
    if sys.platform != "linux":
        return None
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        library = ctypes.CDLL(str(path))
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
