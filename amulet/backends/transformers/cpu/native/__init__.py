"""Compiles and loads the C code for the CPU: products, attention, layers and threads.

In a step of few rows, PyTorch's kernels read weights, keys and values at a fraction of the memory
bandwidth. The C code is compiled on the machine where it runs, and cached. Without a C compiler,
PyTorch's kernels are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch  # before the library, whose OpenMP is PyTorch's

from amulet.cache_folder import cache_folder

logger = logging.getLogger("amulet")

FOLDER = Path(__file__).parent
HEADERS = "common.h", "threads.h", "pages.h", "attention.h", "tiles.h", "products.h", "rowwise.h"
SOURCES = "threads.c", "attention.c", "prefill.c", "pages.c", "products.c", "rowwise.c", "layer.c"
FLAGS = "-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-pthread", "-fPIC"
FORGOTTEN_AFTER = 24 * 3600  # seconds until a failed compilation is retried
MOST_THREADS = 16  # of the team; not measured with more


_libraries: list[tuple[Any, str]] = []  # after the first call: the library, or None and why


def library() -> Any:
    """Return the compiled code, or None after logging the reason."""
    if not _libraries:  # `torch.compile` can't trace `functools.cache`
        _libraries.append(_load())
    return _libraries[0][0]


def reason() -> str:
    """Return why `library` returned None, or ""."""
    library()
    return _libraries[0][1]


@contextmanager
def team() -> Iterator[None]:
    """Run the C code's tasks on its own helpers in this block, and PyTorch on one thread.

    For a block in which the C code does most of the work; see `threads.c`. Changes nothing if there
    are more than `MOST_THREADS` threads, or fewer cores for this thread than threads: OpenMP may
    have bound each thread to a core.
    """
    code = library()
    code.amulet_leave_team()  # in case an interrupt came between entering and leaving
    threads = torch.get_num_threads()
    if not 1 < threads <= min(MOST_THREADS, len(os.sched_getaffinity(0))):
        yield
        return
    try:
        code.amulet_enter_team()
        yield
    finally:
        code.amulet_leave_team()


def _load() -> tuple[Any, str]:
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = _said(error)
        logger.info("The CPU's decode steps run without Amulet's C code: %.300s", said)
        return None, said
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.amulet_attend.argtypes = [
        pointer,
        ctypes.c_int,
        *[pointer] * 4,
        ctypes.c_float,
        pointer,
    ]
    loaded.amulet_prefill.argtypes = [
        pointer,
        ctypes.c_int,
        *[pointer] * 3,
        ctypes.c_float,
        pointer,
    ]
    loaded.amulet_product.argtypes = [ctypes.c_int, *[pointer] * 5, *[number] * 3]
    loaded.amulet_unpack.argtypes = [ctypes.c_int, *[pointer] * 3, *[number] * 2]
    loaded.amulet_unpack.restype = None
    whole = ctypes.c_int
    loaded.amulet_norm.argtypes = [whole, whole, *[pointer] * 3, *[number] * 2, ctypes.c_float]
    loaded.amulet_rotate.argtypes = [whole, *[pointer] * 3, *[number] * 5]
    loaded.amulet_gate.argtypes = [whole, whole, *[pointer] * 2, number]
    for name in ("norm", "rotate", "gate"):
        getattr(loaded, f"amulet_{name}").restype = None
    loaded.amulet_layer.argtypes = [pointer] * 4
    loaded.amulet_layer_attention.argtypes = [pointer] * 6
    return loaded, ""


def _said(error: Exception) -> str:
    """Return the compiler's message, or the error, in one line."""
    return " ".join(str(getattr(error, "stderr", None) or error).split())


def _built() -> Path:
    """Compile, unless that was done for these files, this compiler and this processor.

    A failure is remembered, too, so that it is retried only once a day.
    """
    if sys.platform != "linux":
        raise OSError(f"it is compiled only on Linux, not on {sys.platform}")
    if "avx512f" not in processor().split():
        raise OSError("it requires a processor with AVX-512")
    name, *options = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    compiler = shutil.which(name)
    if compiler is None:
        raise OSError(f"there is no C compiler `{name}` (Debian: apt install gcc libc6-dev)")
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in HEADERS + SOURCES]
    made_of = texts, FLAGS, options, compiler, os.stat(compiler).st_mtime, processor()
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]
    path = cache_folder() / "native" / f"{key}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_own(path.parent)
    if path.is_file():
        _check_own(path)
        return path
    failed = path.with_suffix(".failed")
    if failed.is_file() and time.time() - failed.stat().st_mtime < FORGOTTEN_AFTER:
        said = failed.read_text(encoding="utf-8", errors="replace")
        raise OSError(f"{said} (to retry at once, delete {failed})")
    try:
        _compile(compiler, options, path)
    except subprocess.SubprocessError as error:
        if getattr(error, "returncode", 1) > 0:  # negative if it was killed
            failed.write_text(_said(error), encoding="utf-8")
        raise
    failed.unlink(missing_ok=True)
    return path


def _compile(compiler: str, options: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = {name: str(Path(folder, name).with_suffix(".o")) for name in SOURCES}
        with ThreadPoolExecutor() as pool:
            commands = [
                (compiler, *FLAGS, *options, "-c", str(FOLDER / name), "-o", target)
                for name, target in objects.items()
            ]
            list(pool.map(_run, commands))
        # Linked without OpenMP, so that it uses the library that PyTorch has loaded, with
        # PyTorch's threads. Those of a second library would compete with them.
        whole = str(Path(folder, path.name))
        _run((compiler, *options, "-shared", "-pthread", *objects.values(), "-o", whole))
        os.chmod(whole, 0o755)
        os.replace(whole, path)


def _check_own(path: Path) -> None:
    """Raise OSError if another user may have written the code."""
    found = path.lstat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & stat.S_IWOTH:
        raise OSError(
            f"{path} belongs to another user, or other users can write to it; set "
            "AMULET_CACHE to a folder of your own"
        )


def _run(command: Sequence[str]) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=120
    )


@cache
def processor() -> str:
    """Return what compiled code depends on: the processor's model and instructions."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def address(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's numbers, or None (C's null) without a tensor."""
    return None if tensor is None else tensor.data_ptr()


def out_of_memory() -> torch.OutOfMemoryError:
    """Return the error to raise if C code runs out of memory."""
    return torch.OutOfMemoryError("out of memory for a step's intermediate results")
