"""Runs whole decoder layers of Llama's shape on the CPU in one call of `native/layer.c`.

A layer of Transformers makes about fifty calls of a few microseconds each, half of a small model's
step; and a long pass takes less time and memory in parts. Passes that the C code does not support,
or is slower at, run the same operations one by one.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amulet.backends.transformers.attention import (
    FEW,
    grouped,
    grouped_attention,
    prefills_well,
    steps_are_native,
)
from amulet.backends.transformers.cpu import native, rowwise
from amulet.backends.transformers.cpu.packed_layers import PackedLayer, PackedLinear
from amulet.backends.transformers.cpu.products import FLOAT32
from amulet.backends.transformers.masks import column_mask, kind_of_layer, reach
from amulet.backends.transformers.pages import PageCache, PageKind
from amulet.backends.transformers.support import cache_argument
from amulet.backends.transformers.weights import hooks, weights_state
from amulet.errors import ModelError, is_out_of_memory

logger = logging.getLogger("amulet")

# Classes whose forward is known to compute the same; a trial checks that it still does.
KNOWN = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")}
ACTIVATIONS = {"SiLUActivation": False, "SiLU": False, "GELUTanh": True}  # is it GELU?
PART = 128  # tokens of a long pass that `native/layer.c` computes at once, on up to four cores
OUTSIDE = -1  # returned by `native/layer.c` for a pass outside its buffers
ALIKE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # relative tolerance of the trial


def use_native_layers(model: nn.Module) -> int:
    """Let the C code compute a packed model's decoder layers; return their number.

    Applies to layers of `KNOWN` classes whose products and attention all use the C code. Only
    passes over a `PageCache` change. Norms and biases are read now; see `renew_packed`.
    """
    found: list[Any] = [m for m in model.modules() if type(m).__name__ in KNOWN]
    if not found or not isinstance(model, PreTrainedModel) or not steps_are_native(model):
        return 0
    if are_native(model):
        return 0
    try:
        if not all(map(_fits, found)):
            return 0
        layers = [NativeLayer(module) for module in found]
        agrees = layers[0].agrees(found[0], model.config)
    except Exception as error:  # Transformers changed its layers: use its own code
        if is_out_of_memory(error):
            raise
        logger.info("Layers aren't C code: %s: %.200s", type(error).__name__, error)
        return 0
    if not agrees:
        logger.info("Layers aren't C code: %s computes otherwise.", type(found[0]).__name__)
        return 0
    for module, layer in zip(found, layers, strict=True):
        own_class: Any = type(module)
        module.native = layer
        module.__class__ = _native_class(own_class)
    return len(layers)


def renew_packed(model: nn.Module) -> None:
    """Read changed weights of a packed model again: norms, biases and embedding.

    Call this when `weights_state` has changed, but not during a pass.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, PackedLayer) and head.embedding_state is not None:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        if (state := weights_state(embedding)) != head.embedding_state:
            dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            dense.weight = embedding.weight
            packed = type(head)(dense)
            packed.bias, packed.embedding_state = head.bias, state
            model.set_output_embeddings(packed)  # type: ignore[operator]
    for module in model.modules():
        own_class: Any = getattr(type(module), "own_class", None)
        if own_class is None:
            continue
        module.__class__ = own_class
        try:
            fits = _fits(module)
        except Exception:  # a layer was replaced by another kind
            fits = False
        if fits:
            module.native = NativeLayer(module)  # type: ignore[assignment]
            module.__class__ = _native_class(own_class)
        else:
            del module.native


def are_native(model: nn.Module) -> bool:
    """Tell whether `use_native_layers` has changed the model's layers."""
    return any(hasattr(type(module), "own_class") for module in model.modules())


@cache
def _native_class(own: Any) -> Any:
    """Return a subclass whose layers use their `native` where possible."""

    class Native(own):  # type: ignore[misc]
        own_class = own

        def forward(
            self,
            hidden_states: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            position_embeddings: Any = None,
            **options: Any,
        ) -> Any:
            if not torch.compiler.is_compiling():
                native: NativeLayer = self.native
                made = native(hidden_states, attention_mask, position_embeddings, options)
                if made is not None:
                    return made
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **options,
            )

        def __reduce__(self) -> Any:
            """Refuse copying and pickling, as the packed layers inside do."""
            raise ModelError(
                "A packed model can't be copied or saved whole: load it with pack=False for that."
            )

    Native.__name__, Native.__qualname__, Native.__module__ = (
        own.__name__,
        own.__qualname__,
        own.__module__,
    )
    return Native


def _fits(module: Any) -> bool:
    attention, mlp = module.self_attn, module.mlp
    layers = [m for m in (*attention.children(), *mlp.children()) if isinstance(m, PackedLayer)]
    inner = {name for name, _ in attention.named_children()}
    blocks = [layer.blocks for layer in layers if layer.blocks is not None]
    dtype = module.input_layernorm.weight.dtype
    vectors = [*_norms(module).values(), *(layer.bias for layer in layers)]
    return (
        "forward" not in module.__dict__  # not replaced by other code
        and type(module).__module__.startswith("transformers.models.")
        and inner - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and len(blocks) == 7
        and all((weight.kind == FLOAT32) == (dtype == torch.float32) for weight in blocks)
        and all(layer.out_features % rowwise.LANES == 0 for layer in layers)
        and all(vector is None or vector.dtype == dtype for vector in vectors)
        and attention.head_dim % (2 * rowwise.LANES) == 0
        and attention.head_dim <= 256  # as in `native/pages.c`
        and type(mlp.act_fn).__name__ in ACTIVATIONS
    )


# Norms before attention and MLP, of heads, and after both; some layers have fewer.
NORMS = "before", "between", "query_norm", "key_norm", "attended", "fed"


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("kind", "out_features", "in_features")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_long)
            for name in ("half", "plus_one", "gelu", "heads", "key_heads", "dim")
        ),
        *((name, ctypes.c_double) for name in ("epsilon", "scaling")),
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("rows", "width", "part")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        ("angles", ctypes.c_long),
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("layer", "window")),
    ]


class NativeLayer:
    """Computes one decoder layer; has no reference to the layer, which would be a cycle.

    Args:
        module: a packed layer of a `KNOWN` class.
    """

    def __init__(self, module: Any) -> None:
        attention, mlp, norm = module.self_attn, module.mlp, module.input_layernorm
        self._attention = attention
        self._linears: list[PackedLayer] = [
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        ]
        self._most = min(layer.native_rows for layer in self._linears)
        # C code runs a long pass in parts; for rounded weights, making them dense is faster.
        dense = all(isinstance(layer, PackedLinear) for layer in self._linears)
        self._most_in_parts = sys.maxsize if dense and self._most >= PART else self._most
        self._norms = _norms(module)
        self._plus_one = type(module).__name__.startswith("Gemma")
        self._gelu = ACTIVATIONS[type(mlp.act_fn).__name__]
        self._epsilon: float = norm.eps if self._plus_one else norm.variance_epsilon
        self._dtype, self._dim = norm.weight.dtype, attention.head_dim
        self._cache = cache_argument(module)
        self._kind = kind_of_layer(attention.config, attention.layer_idx)
        self._window = reach(self._kind, attention.config) or 0
        self._inner = [part for part in module.modules() if part is not module]
        self._hooks = [
            of_kind
            for part in self._inner
            for of_kind in (part._forward_hooks, part._forward_pre_hooks)
        ]
        self._in_c = _Layer(
            self._dtype == torch.bfloat16,
            self._plus_one,
            self._gelu,
            self._linears[0].out_features // self._dim,
            self._linears[1].out_features // self._dim,
            self._dim,
            self._epsilon,
            attention.scaling,
            *map(native.address, self._norms.values()),
            *map(_linear, self._linears),
        )

    def __call__(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        options: dict[str, Any],
    ) -> torch.Tensor | None:
        """Return the layer's output, `[rows, width, hidden size]`, or None if not supported."""
        cache = options.get(self._cache)
        if (
            not isinstance(cache, PageCache)
            or cache.positions.shape != hidden.shape[:2]
            or hidden.dtype != self._dtype
            or hidden.shape[2] != self._linears[0].in_features
            or hidden.device.type != "cpu"
            or not (mask is None or mask.dtype == torch.bool)
            or any(not self._turns(angles, hidden) for angles in position_embeddings)
            # a hook reads or changes something inside the layer
            or (any(self._hooks) and any(map(hooks, self._inner)))
        ):
            return None
        rows, width = hidden.shape[:2]
        part, most = 0, self._most
        if width > FEW:
            part = max(PART, 32 * torch.get_num_threads())  # several tasks of a product per thread
            most = self._most_in_parts
        cosine, sine = (angles.contiguous() for angles in position_embeddings)
        given = hidden.contiguous(), cosine, sine, cache
        if not cache.causal or (part and not prefills_well(self._dtype)):
            return self._by_operations(*given, None, mask)
        if rows * width > most:
            return self._by_operations(*given, part)
        return self._whole(*given, part)

    def _turns(self, angles: torch.Tensor, hidden: torch.Tensor) -> bool:
        """Tell whether cosines or sines have the shape `[rows or 1, width, dim]` of the pass."""
        rows, width = hidden.shape[:2]
        shapes = ((rows, width, self._dim), (1, width, self._dim))
        return angles.dtype == self._dtype and angles.shape in shapes

    def _whole(
        self,
        hidden: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        cache: PageCache,
        part: int = 0,
    ) -> torch.Tensor:
        out = torch.empty_like(hidden)
        now = self._pass(hidden, cosine, sine, cache, part)
        self._run(native.library().amulet_layer, now, hidden, out)
        return out

    def _pass(
        self,
        hidden: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        cache: PageCache,
        part: int,
    ) -> _Pass:
        pages, layer = cache.of_layer(self._attention.layer_idx)
        expected = PageKind(pages.kind.layers, self._in_c.key_heads, self._dim, hidden.dtype)
        if (
            pages.kind != expected
            or pages.window not in (0, self._window)
            or cache.positions.shape != hidden.shape[:2]
        ):
            raise IndexError(
                f"no room for {list(hidden.shape[:2])} tokens of {expected} with a window of "
                f"{self._window} in {pages.kind} with one of {pages.window}"
            )
        return _Pass(
            *(*hidden.shape[:2], part),
            *(cosine.data_ptr(), sine.data_ptr(), cosine.numel() // self._dim),
            ctypes.addressof(pages.in_c),
            *(layer, self._window),
        )

    def _run(self, function: Any, now: _Pass, *tensors: torch.Tensor) -> None:
        addresses = (tensor.data_ptr() for tensor in tensors)
        failed = function(ctypes.byref(self._in_c), ctypes.byref(now), *addresses)
        if failed == OUTSIDE:
            raise IndexError(
                f"a pass of {now.rows} rows of {now.width} tokens lies outside of their pages"
            )
        if failed:
            raise native.out_of_memory()

    def _by_operations(
        self,
        hidden: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        cache: PageCache,
        part: int | None = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute as `_whole` does; if `part` is None, with PyTorch's attention, by the mask."""
        query, key, value, output, gate, up, down = (layer.product for layer in self._linears)
        heads = (*hidden.shape[:2], -1, self._dim)
        normed = self._norm("before", hidden)
        queries, keys, values = (by(normed).view(heads) for by in (query, key, value))
        queries, keys = self._norm("query_norm", queries), self._norm("key_norm", keys)
        del normed  # reduces the peak memory of a long pass
        rowwise.rotate_(queries, cosine, sine)
        rowwise.rotate_(keys, cosine, sine)
        if part is None:  # copies all pages of all rows, which only a long pass is worth
            all_keys, all_values = cache.update(
                keys.transpose(1, 2), values.transpose(1, 2), self._attention.layer_idx
            )
            attended, _ = grouped_attention(
                self._attention,
                queries.transpose(1, 2),
                all_keys,
                all_values,
                mask,
                scaling=self._attention.scaling,
            )
            del all_keys, all_values
        else:
            attended = torch.empty_like(queries)
            now = self._pass(hidden, cosine, sine, cache, part)
            attention = native.library().amulet_layer_attention
            self._run(attention, now, queries, keys, values, attended)
        del keys, values
        hidden = self._norm("attended", output(attended.flatten(2))).add_(hidden)
        del queries, attended
        normed = self._norm("between", hidden)
        gated = gate(normed)
        rowwise.gate_(gated, up(normed), self._gelu)
        return self._norm("fed", down(gated)).add_(hidden)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after one of `NORMS`, or unchanged if the layer has none."""
        weight = self._norms[name]
        if weight is None:
            return hidden
        return rowwise.norm(hidden, weight, self._epsilon, self._plus_one)

    def agrees(self, module: Any, config: PretrainedConfig) -> bool:
        """Tell whether, in a trial, all ways here compute what the module computes."""
        generator = torch.Generator().manual_seed(0)
        sizes = self._linears[0].in_features, self._dim, self._dim
        hidden, cosine, sine = (
            torch.randn(2, 1, size, generator=generator).to(self._dtype) for size in sizes
        )
        hidden = hidden / 64  # norms undo this, so the layer's own part dominates the output
        places = torch.tensor([[1], [3]])
        mask = column_mask(self._kind, self._attention.config, places, 4, None)
        with torch.no_grad(), grouped():
            own = module(
                hidden,
                attention_mask=mask,
                position_embeddings=(cosine, sine),
                position_ids=places,
                use_cache=True,
                **{self._cache: self._cache_for(places)},
            )
            alike = self._by_operations(hidden, cosine, sine, self._cache_for(places), None, mask)
            others = [
                way(hidden, cosine, sine, self._cache_for(places))
                for way in (self._by_operations, self._whole)
            ]
        if not isinstance(own, torch.Tensor) or own.shape != hidden.shape:
            return False
        bound, most = ALIKE[self._dtype], (own - hidden).abs().max()
        # Attention over pages rounds elsewhere, and a layer may amplify that.
        bounds = (alike, bound), *((other, 8 * bound) for other in others)
        return all(bool(((other - own).abs() <= off * most).all()) for other, off in bounds)

    def _cache_for(self, places: torch.Tensor) -> PageCache:
        layers = self._attention.layer_idx + 1
        cache = PageCache(PageKind(layers, self._in_c.key_heads, self._dim, self._dtype))
        starts = places[:, 0].tolist()
        cache.begin(0, [0] * len(starts), max(starts))  # gives the rows their pages
        cache.begin(0, starts, 1)
        return cache


def _norms(module: Any) -> dict[str, torch.Tensor | None]:
    """Return the weights of `NORMS`, or None for those that the layer lacks."""
    attention, after_attention = module.self_attn, module.post_attention_layernorm
    between = getattr(module, "pre_feedforward_layernorm", None)
    found = (
        module.input_layernorm,
        between or after_attention,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
        after_attention if between else None,
        getattr(module, "post_feedforward_layernorm", None),
    )
    return {
        name: None if norm is None else norm.weight.detach()
        for name, norm in zip(NORMS, found, strict=True)
    }


def _linear(layer: PackedLayer) -> _Linear:
    assert layer.blocks is not None
    kind, address, scale = layer.blocks
    sizes = layer.out_features, layer.in_features
    return _Linear(kind, *sizes, address, native.address(scale), native.address(layer.bias))
