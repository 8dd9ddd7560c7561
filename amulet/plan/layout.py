"""`make_plan`: computes how many GPUs and machines a number of users need."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from amulet.errors import RequestError
from amulet.plan.costs import (
    Work,
    amulet_bytes,
    amulet_users,
    step_bytes,
    vllm_block_bytes,
    vllm_blocks,
    vllm_users,
)
from amulet.plan.gpus import Gpu
from amulet.plan.shapes import BYTES, Shape

PARTS = (1, 2, 4, 8)  # numbers of GPUs over which one machine splits a model
PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """The GPUs that one engine needs for all users.

    Attributes:
        fits: how many users fit on one copy of the model; 0 means not even one.
        parts: GPUs that share one copy of the model (tensor parallel).
        copies: copies of the model (data parallel).
        nodes: machines of 8 GPUs.
        users: users per copy.
        cache: bytes of the KV cache of one copy's users, on each of its GPUs.
        step_seconds: minimum time of a step of one copy, by the GPU's bandwidth; None if the
            bandwidth is unknown.
    """

    fits: int
    parts: int = 0
    copies: int = 0
    nodes: int = 0
    users: int = 0
    cache: int = 0
    step_seconds: float | None = None

    @property
    def gpus(self) -> int:
        """The total number of GPUs."""
        return self.parts * self.copies


@dataclass(frozen=True)
class Plan:
    """The arguments of `make_plan` and the result.

    Attributes:
        shape, dtype, gpu, users, work, utilization: as given to `make_plan`.
        weights: bytes of the weights.
        token: bytes of one token's keys and values in one row.
        blocks: blocks of one user in vLLM's cache; `plain_blocks` for a plain request.
        vllm, amulet: GPUs with each engine; `vllm_plain` without preferences.
        steered_over_plain: ratio of the bytes that a steered and a plain step read, with the
            users of one copy.
    """

    shape: Shape
    dtype: str
    gpu: Gpu
    users: int
    work: Work
    utilization: float
    weights: int
    token: int
    blocks: int
    plain_blocks: int
    vllm: Layout
    vllm_plain: Layout
    amulet: Layout
    steered_over_plain: float

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, in bytes and seconds."""
        found = asdict(self)
        for name in ("vllm", "vllm_plain", "amulet"):
            found[name]["gpus"] = getattr(self, name).gpus
        return found


def make_plan(
    shape: Shape, gpu: Gpu, users: int, work: Work, *, dtype: str = "auto", utilization: float = 0.9
) -> Plan:
    """Find how many GPUs a number of simultaneous users need.

    Args:
        shape: the model's shape.
        gpu: the kind of GPU.
        users: users whose answers are decoded at the same time.
        work: the request of each user.
        dtype: of weights and cache; "auto" is the model's own.
        utilization: share of the GPU's memory for weights and cache. The rest is for activations,
            kept prefixes and the driver.

    Raises:
        RequestError: a number is out of range, or prompt and answer exceed the model's window.
    """
    dtype = shape.dtype if dtype == "auto" else dtype
    if dtype not in BYTES:
        raise RequestError(f"dtype={dtype!r}: expected auto, {', '.join(BYTES)}.")
    if users < 1:
        raise RequestError(f"users={users}: expected 1 or more.")
    if not 0 < utilization <= 1:
        raise RequestError(f"utilization={utilization}: expected a share above 0 and up to 1.")
    longest = max(work.rows)
    if shape.window is not None and longest > shape.window:
        raise RequestError(
            f"prompt, preference and answer have {longest} tokens and the model's context window "
            f"{shape.window}; shorten them."
        )
    vllm = _vllm(shape, dtype, gpu, users, work, utilization)
    together = vllm.users or users
    return Plan(
        shape=shape,
        dtype=dtype,
        gpu=gpu,
        users=users,
        work=work,
        utilization=utilization,
        weights=shape.weights(dtype),
        token=shape.token(dtype),
        blocks=vllm_blocks(work),
        plain_blocks=vllm_blocks(work.plain),
        vllm=vllm,
        vllm_plain=_vllm(shape, dtype, gpu, users, work.plain, utilization),
        amulet=_amulet(shape, dtype, gpu, users, work, utilization),
        steered_over_plain=step_bytes(shape, dtype, work, together)
        / step_bytes(shape, dtype, work.plain, together),
    )


def _vllm(shape: Shape, dtype: str, gpu: Gpu, users: int, work: Work, utilization: float) -> Layout:
    """Return the layout with the fewest GPUs, and among those the one that splits least."""
    found: list[Layout] = []
    for parts in PARTS:
        memory = gpu.memory * utilization - shape.weights(dtype) / parts
        fits = vllm_users(shape, dtype, work, memory, parts)
        if fits:
            each = vllm_blocks(work) * vllm_block_bytes(shape, dtype, parts)
            found.append(_layout(shape, dtype, gpu, users, work, parts, fits, each))
    return min(found, key=lambda layout: (layout.gpus, layout.parts), default=Layout(0))


def _amulet(
    shape: Shape, dtype: str, gpu: Gpu, users: int, work: Work, utilization: float
) -> Layout:
    """Return the layout of Amulet's own engine, one GPU per process."""
    memory = gpu.memory * utilization - shape.weights(dtype)
    fits = amulet_users(shape, dtype, work, memory)
    if not fits:
        return Layout(0)
    layout = _layout(shape, dtype, gpu, users, work, 1, fits, 0)
    cache = amulet_bytes(shape, dtype, work, layout.users)
    return Layout(**{**asdict(layout), "cache": cache})


def _layout(
    shape: Shape,
    dtype: str,
    gpu: Gpu,
    users: int,
    work: Work,
    parts: int,
    fits: int,
    each: int,
) -> Layout:
    copies = -(-users // fits)
    per_copy = -(-users // copies)
    seconds = None
    if gpu.bandwidth is not None:
        seconds = step_bytes(shape, dtype, work, per_copy, parts) / gpu.bandwidth
    nodes = -(-copies * parts // PER_NODE)
    return Layout(fits, parts, copies, nodes, per_copy, each * per_copy, seconds)
