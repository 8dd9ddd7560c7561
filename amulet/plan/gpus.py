"""The memory and bandwidth of common GPUs, from the manufacturers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from amulet.errors import RequestError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: the product name.
        memory: bytes.
        bandwidth: maximum bytes per second that it reads; None if unknown.
    """

    name: str
    memory: float
    bandwidth: float | None = None


# Name, memory, GB/s. "80 GB" of memory is 80 * 2**30 bytes, minus a reserve for error
# correction that `utilization` has to cover.
_SOLD = (
    ("T4", 16, 320),
    ("L4", 24, 300),
    ("L40S", 48, 864),
    ("A10", 24, 600),
    ("RTX 3090", 24, 936),
    ("RTX 4090", 24, 1008),
    ("RTX 5090", 32, 1792),
    ("V100", 32, 900),
    ("A100 40GB", 40, 1555),
    ("A100", 80, 2039),
    ("H100", 80, 3350),
    ("H200", 141, 4800),
    ("B200", 180, 8000),
    ("MI300X", 192, 5300),
)
GPUS = {name: Gpu(name, gib * 2**30, rate * 1e9) for name, gib, rate in _SOLD}


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name; case, spaces and dashes don't matter.

    Raises:
        RequestError: it is not in the list.
    """
    for known, gpu in GPUS.items():
        if _plain(known) == _plain(name):
            return gpu
    raise RequestError(
        f"gpu={name!r}: expected one of {', '.join(GPUS)}; for another GPU, give --memory GB."
    )


def _plain(name: str) -> str:
    return "".join(name.lower().replace("nvidia", "").replace("amd", "").split()).replace("-", "")
