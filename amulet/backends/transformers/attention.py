"""Attention of new tokens over cached ones, without copies of keys and values and without a mask.

On the CPU, few tokens attend by `native/attention.c` and many by `native/prefill.c`, where those
are faster. Elsewhere, where query heads share key and value heads, Transformers repeats the latter
in passes of several tokens and in compiled code, or PyTorch reads them once per query head; here
the query heads of a group become tokens of one head. And a long pass, which a mask would slow down,
attends separately to the cached and to the new columns, neither of which needs a mask.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from amulet.backends.transformers.cpu import native
from amulet.backends.transformers.masks import attention_kind
from amulet.errors import is_out_of_memory, one_line

logger = logging.getLogger("amulet")

WIDEST = 32  # tokens; for more, repeating the mask costs more than the copies
FEW = 16  # tokens; for more, `native/prefill.c` pays off although it rearranges keys and values
TRITON_DTYPES = torch.float32, torch.bfloat16, torch.float16
MOST_TOKENS = 128  # tokens of a group of heads that the Triton code takes at once
SIDE = 64  # columns that it is tried with


class _Pass(threading.local):
    """Whether this thread's forward pass is Amulet's, not that of other code."""

    is_ours = False


_pass = _Pass()


@contextmanager
def grouped() -> Iterator[None]:
    """Make models with `sdpa` attention use `grouped_attention` in the block, in this thread."""
    _pass.is_ours = True
    try:
        yield
    finally:
        _pass.is_ours = False


def _sdpa(*args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Attend by `grouped_attention` in Amulet's passes, and as Transformers does in all others.

    A model and its config may be shared with other code, so neither can tell which pass it is.
    """
    attend = grouped_attention if _pass.is_ours else _sdpa_before
    attended: tuple[torch.Tensor, None] = attend(*args, **options)
    return attended


def _sdpa_mask(*args: Any, **options: Any) -> Any:
    """Make no mask in Amulet's passes, which bring their own where plain causal is not right."""
    return None if _pass.is_ours else _sdpa_mask_before(*args, **options)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as Transformers' `sdpa` does.

    Args:
        module: the attention layer.
        query: `[rows, heads, width, dim]`.
        key, value: `[rows, kv_heads, columns, dim]`.
        attention_mask: bool or additive `[rows, 1, width, columns]`, or None.
        scaling: of the products; None is `dim ** -0.5`.
        options: as for Transformers' attention functions.

    Returns:
        `[rows, width, heads, dim]`, and None for the weights.
    """
    rows, heads, width, dim = query.shape
    kv_heads, columns = key.shape[1:3]
    biased = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    scale = dim**-0.5 if scaling is None else scaling
    if not biased and _attends_natively(query, key, value, attention_mask):
        if _prefills(query, attention_mask):
            return _prefill(query, key, value, scale), None
        attend = torch.ops.amulet.attend if torch.compiler.is_compiling() else _attend
        return attend(query, key, value, attention_mask, scale), None
    if not biased and _attends_by_triton(query, key, value, attention_mask):
        return torch.ops.amulet.attend(query, key, value, attention_mask, scale), None
    if attention_mask is None and 1 < width < columns:
        if value.shape[-1] == dim and not biased and query.device.type == "cpu":
            return _behind_cached(query, key, value, scaling).transpose(1, 2).contiguous(), None
        # Not supported by the CPU's kernel, or a layer on another device than the first.
        allowed = torch.ones(width, columns, dtype=torch.bool, device=query.device)
        attention_mask = allowed.tril(columns - width)[None, None]
    # Without a mask, several tokens attend causally, which grouping would break.
    alike = heads == kv_heads or width > (1 if attention_mask is None else WIDEST)
    if alike or biased:
        attended, _ = _sdpa_before(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return attended, None
    groups = heads // kv_heads
    if width > 1 and attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    attended = scaled_dot_product_attention(
        query.reshape(rows, kv_heads, groups * width, -1),
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(rows, heads, width, -1).transpose(1, 2).contiguous(), None


def _attends_natively(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Tell whether `_attend` supports the pass and is faster."""
    width, dim, columns = query.shape[2], query.shape[3], key.shape[2]
    halves = query.dtype == torch.bfloat16
    return (
        query.device.type == "cpu"
        and (width <= WIDEST or _prefills(query, mask))
        and (halves or query.dtype == torch.float32)
        and query.dtype == key.dtype == value.dtype
        and dim % (32 if halves else 16) == 0
        and key.shape == value.shape == (query.shape[0], key.shape[1], columns, dim)
        and query.shape[1] % key.shape[1] == 0
        and (not halves or key.stride(2) % 2 == value.stride(2) % 2 == 0)
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
        and native.library() is not None  # checked last, because it may compile
    )


def _attends_by_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Tell whether `triton_attention.py` supports the pass and is faster."""
    width, dim = query.shape[2:]
    return (
        query.device.type == "cuda"
        and (width == 1 or (width % 4 == 0 and width <= FEW))  # each width is compiled
        and query.shape[1] // key.shape[1] * width <= MOST_TOKENS
        and mask is not None
        and mask.dtype == torch.bool
        and mask.shape[1] == 1
        and query.dtype in TRITON_DTYPES
        and query.dtype == key.dtype == value.dtype
        and key.shape == value.shape
        and dim <= 256
        and _triton_serves
    )


def _prefills(query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    width, dim = query.shape[2:]
    return (
        width > FEW
        and mask is None
        and dim % 32 == 0
        and query.stride(2) % 2 == 0
        and prefills_well(query.dtype)
    )


@cache
def prefills_well(dtype: torch.dtype) -> bool:
    """Tell whether `native/prefill.c` is faster than PyTorch on this processor."""
    known = native.processor()
    # With AMX's tiles, PyTorch may be as fast; that has not been measured.
    return "amx_bf16" not in known and (dtype == torch.float32 or "avx512_bf16" in known)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Return the result of `grouped_attention`, `[rows, width, heads, dim]`.

    Without a mask, tokens after cached ones attend causally.
    """
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    rows, heads, width, dim = query.shape
    output = query.new_empty((rows, width, heads, dim))
    mask, strides = mask_for_c(mask, rows, width, key.shape[2])
    given = _given(query, key, value, strides)
    if native.library().amulet_attend(*given, native.address(mask), scale, output.data_ptr()):
        raise native.out_of_memory()
    return output


def mask_for_c(
    mask: torch.Tensor | None, rows: int, width: int, columns: int
) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """Return a mask in the form of `native/attention.c`, and its strides by rows and tokens."""
    if mask is None:
        return None, (0, 0)
    if mask.dtype != torch.bool:
        raise ValueError(f"an attention mask of {mask.dtype}: expected torch.bool")
    mask = mask.expand(rows, 1, width, columns)
    if mask.stride(3) != 1:
        mask = mask.contiguous()
    return mask, (mask.stride(0), mask.stride(2))


def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return what `_attend` does without a mask, for many tokens, `[rows, width, heads, dim]`."""
    rows, heads, width, dim = query.shape
    output = query.new_empty((rows, width, heads, dim))
    given = _given(query, key, value, (0, 0))
    if native.library().amulet_prefill(*given, scale, output.data_ptr()):
        raise native.out_of_memory()
    return output


def _given(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: tuple[int, int]
) -> tuple[Any, ...]:
    """Return the first arguments of the C functions: sizes, strides and addresses."""
    rows, heads, width, dim = query.shape
    kv_heads, columns = key.shape[1:3]
    half = query.dtype == torch.bfloat16
    if (
        not key.shape == value.shape == (rows, kv_heads, columns, dim)
        or heads % kv_heads
        or width > columns
        or not query.dtype == key.dtype == value.dtype
        or not (half or query.dtype == torch.float32)
        or dim % (32 if half else 16)
    ):
        raise ValueError(
            f"attention of {list(query.shape)} over {list(key.shape)} and {list(value.shape)}, "
            f"{query.dtype}, {key.dtype} and {value.dtype}: shapes or types do not fit together"
        )
    sizes = (
        *(rows, kv_heads, heads // kv_heads, width, columns, dim),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *seen,
    )
    return (
        (ctypes.c_long * len(sizes))(*sizes),
        half,
        *(states.data_ptr() for states in (query, key, value)),
    )


_library: Any = torch.library.Library("amulet", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor"
)
_library.impl("attend", _attend, "CPU")


def _attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    from amulet.backends.transformers.cuda.triton_attention import attend

    with torch.cuda.device(query.device):  # Triton launches on the current one
        return attend(query, key, value, mask, scale)


_triton_serves = False  # until a trial succeeds


def try_triton(model: PreTrainedModel) -> None:
    """Use Triton's attention on GPUs from now on, if it runs for this model's shapes.

    It compiles on the machine where it runs, which requires a C compiler and enough shared memory.
    """
    global _triton_serves
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = head_dim(config)
    if model.dtype not in TRITON_DTYPES or not 0 < dim <= 256:
        return
    columns = torch.ones(1, 1, 1, SIDE, dtype=torch.bool, device=model.device)
    try:
        for width in (1, 4):
            query = torch.zeros(1, heads, width, dim, dtype=model.dtype, device=model.device)
            keys = query.new_zeros(1, kv_heads, SIDE, dim)
            _attend_on_gpu(query, keys, keys, columns.expand(1, 1, width, SIDE), 1.0)
        torch.cuda.synchronize(model.device)
    except Exception as error:  # of Triton, a compiler or the driver
        if is_out_of_memory(error):
            raise
        _triton_serves = False
        logger.info("Attention on the GPU runs without Triton: %.300s", one_line(error))
    else:
        _triton_serves = True


_library.impl("attend", _attend_on_gpu, "CUDA")


@torch.library.register_fake("amulet::attend", lib=_library)  # type: ignore[untyped-decorator]
def _attend_shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    rows, heads, width, dim = query.shape
    return query.new_empty((rows, width, heads, dim))


def head_dim(config: PretrainedConfig) -> int:
    """Return a head's dimension, or 0 if the layers' heads differ or the config has none."""
    try:
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except (RuntimeError, AttributeError):
        return 0
    return int(dim)


def steps_are_native(model: PreTrainedModel) -> bool:
    """Tell whether this model's decode steps attend by `native/attention.c`."""
    config = model.config.get_text_config()
    dim = head_dim(config)
    return (
        causal_behind_cached(model)
        and model.dtype in (torch.float32, torch.bfloat16)
        and dim > 0
        and dim % 32 == 0
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "v_head_dim", None)  # keys and values of different sizes
        and native.library() is not None  # the last question: it may compile
    )


def causal_behind_cached(model: PreTrainedModel) -> bool:
    """Tell whether new tokens after cached ones are causal without a mask, in the `grouped` block.

    Only on the CPU, because on a GPU a mask costs nothing. Code that does not call its attention
    through Transformers' interface would attend without any mask.
    """
    config = model.config.get_text_config()
    is_asked: bool = model.is_backend_compatible()  # type: ignore[no-untyped-call]
    asked = attention_kind(config) == "sdpa" and is_asked
    ours = _registered(AttentionInterface) is _sdpa  # unless other code has replaced it since
    return bool(asked and ours and model.device.type == "cpu")


def _behind_cached(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attend causally with the new tokens as the last columns, `[rows, heads, width, dim]`.

    Once over the cached columns, all of which every new token sees, and once over the new ones; the
    two are joined by their log-sum-exps. Neither needs a mask, which would slow down the pass.
    """
    rows, heads, width, dim = query.shape
    kv_heads, start = key.shape[1], key.shape[2] - width
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    new, weight_new = attend(
        query, key[:, :, start:], value[:, :, start:], 0.0, True, scale=scaling
    )
    groups = query.reshape(rows, kv_heads, heads // kv_heads * width, dim)
    old, weight_old = attend(groups, key[:, :, :start], value[:, :, :start], scale=scaling)
    old, weight_old = old.reshape(query.shape), weight_old.reshape(rows, heads, width)
    share = torch.sigmoid(weight_old - weight_new)[..., None]  # of the cached columns
    return torch.lerp(new.to(share.dtype), old.to(share.dtype), share).to(query.dtype)


def _registered(interface: Any) -> Any:
    return interface()["sdpa"]


_sdpa_before = _registered(AttentionInterface)
AttentionInterface.register("sdpa", _sdpa)
_sdpa_mask_before = _registered(AttentionMaskInterface)
AttentionMaskInterface.register("sdpa", _sdpa_mask)
