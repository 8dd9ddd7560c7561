"""Errors put where tensors are made, and what a driver does when an engine raises one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amulet.decoding.engine import Engine
from amulet.decoding.generation import Generation

CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4194304 bytes. Error code 12 (Cannot allocate memory)"
)
# The two kinds in which PyTorch says that memory is short, and an error that says something else.
FAULTS: dict[str, Callable[[], Exception]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 MiB."),
    "cpu": lambda: RuntimeError(CPU_SAYS),
    "other": lambda: ValueError("something else is broken"),
}
SHORTAGES = "gpu", "cpu"


@cache  # a model's pass asks it thousands of times, of some dozens
def makes_a_tensor(operation: Any) -> bool:
    """Whether an operation returns a tensor that is no view of another."""
    returns = operation._schema.returns
    return any(r.alias_info is None and "Tensor" in str(r.type) for r in returns)


class Allocations(TorchDispatchMode):
    """Counts the tensors that are made in the block, and may raise in place of making one.

    Args:
        fail_at: the number, from 1 on, of the allocation that raises; 0 for none.
        fault: makes what it raises.

    Attributes:
        count: how many there were.
    """

    def __init__(
        self, fail_at: int = 0, fault: Callable[[], BaseException] = FAULTS["cpu"]
    ) -> None:
        super().__init__()
        self.count = 0
        self.fail_at, self.fault = fail_at, fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if makes_a_tensor(func):
            self.count += 1
            if self.count == self.fail_at:
                raise self.fault()
        return func(*args, **(kwargs or {}))


def admit(engine: Engine, *generations: Generation) -> None:
    """Admit generations together, and each alone if that fails, as a driver does."""
    try:
        engine.admit(*generations)
    except Exception as error:
        if len(generations) == 1:
            generations[0].error = error
        for generation in generations if len(generations) > 1 else ():
            admit(engine, generation)
    engine.sweep()


def step(engine: Engine) -> None:
    """Make a step; a failure ends all that took part, as with a driver."""
    try:
        engine.step()
    except Exception as error:
        engine.fail_all(error)
    engine.sweep()
