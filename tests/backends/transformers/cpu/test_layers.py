"""Whole decoder layers in C give what Transformers' own forward gives, and only where they can."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from amulet.backends.transformers import attention
from amulet.backends.transformers.attention import FEW
from amulet.backends.transformers.backend import TransformersBackend
from amulet.backends.transformers.cpu import native, products
from amulet.backends.transformers.cpu.layers import (
    PART,
    NativeLayer,
    are_native,
    use_native_layers,
)
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.pages import PageCache
from tests.bounds import of_logits
from tests.engines import engine_over
from tests.marks import needs_code
from tests.models import Kind, random_model
from tests.search import examples

pytestmark = needs_code

Pack = Literal[True, "int8", "int4"]
_models: dict[tuple[Kind, torch.dtype, Pack, int], PreTrainedModel] = {}


def packed(
    kind: Kind, dtype: torch.dtype, pack: Pack = True, head_dim: int = 32
) -> PreTrainedModel:
    if (kind, dtype, pack, head_dim) not in _models:
        model = random_model(kind, dtype=dtype, head_dim=head_dim, biased=kind == "llama")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms are ones and biases zeros: no two would differ
                    parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
        pack_linears(model, pack)
        _models[kind, dtype, pack, head_dim] = model
    return _models[kind, dtype, pack, head_dim]


@contextmanager
def own_forward(model: PreTrainedModel) -> Iterator[None]:
    """Let the layers compute as Transformers has them."""
    changed = [module for module in model.modules() if hasattr(module, "own_class")]
    classes = [type(module) for module in changed]
    for module in changed:
        module.__class__ = module.own_class
    try:
        yield
    finally:
        for module, native_class in zip(changed, classes, strict=True):
            module.__class__ = native_class


def logits_of(model: PreTrainedModel, starts: list[int], width: int) -> torch.Tensor:
    """Prefill each row up to its start, then pass `width` tokens of all rows together."""
    engine = engine_over(model)
    engine.backend._cache.reserve(len(starts), max(starts) + width)
    ids = torch.randint(0, 256, (len(starts), max(starts) + width)).tolist()
    with torch.inference_mode():
        for row, start in enumerate(starts):
            if start:
                engine.backend.forward([ids[row][:start]], [0], row, [start - 1])
        new = [ids[row][start : start + width] for row, start in enumerate(starts)]
        return engine.backend.forward(new, starts, 0, list(range(width)))


def check(made: torch.Tensor, expected: torch.Tensor) -> None:
    if made.dtype == torch.float32:
        assert (made - expected).abs().max() <= of_logits(made.dtype) * expected.abs().max()
    else:  # PyTorch's attention rounds elsewhere, which some of so many logits show
        off = (made - expected).float().abs().mean(-1).max() / expected.float().std()
        assert off <= 0.2


WEIGHTS: list[tuple[torch.dtype, Pack]] = [(torch.float32, True), (torch.bfloat16, True)]
if products.serves(products.INT8):  # elsewhere layers with rounded weights aren't C code
    WEIGHTS += [(torch.bfloat16, "int8"), (torch.bfloat16, "int4")]
KINDS: list[Kind] = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]


@examples(60)
@given(
    kind=st.sampled_from(KINDS),
    weights=st.sampled_from(WEIGHTS),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    width=st.sampled_from([1, 2, 5, FEW, FEW + 1, 40]),
    seed=st.integers(0, 99),
)
def test_a_pass_gives_what_the_model_s_own_layers_give(
    kind: Kind, weights: tuple[torch.dtype, Pack], starts: list[int], width: int, seed: int
) -> None:
    model = packed(kind, *weights)
    assert are_native(model)
    torch.manual_seed(seed)
    made = logits_of(model, starts, width)
    torch.manual_seed(seed)
    with own_forward(model):
        assert not are_native(model)
        check(made, logits_of(model, starts, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others(kind: Kind, dtype: torch.dtype) -> None:
    model = packed(kind, dtype)
    ids = torch.arange(30).view(3, 10).tolist()
    together, alone = engine_over(model), engine_over(model)
    with torch.inference_mode():
        together.backend._cache.reserve(3, 10)
        for row in range(3):
            together.backend.forward([ids[row][: 5 + row]], [0], row, [4 + row])
        new = [[ids[row][5 + row]] for row in range(3)]
        found = together.backend.forward(new, [5, 6, 7], 0, [0])
        alone.backend._cache.reserve(1, 10)
        alone.backend.forward([ids[1][:6]], [0], 0, [5])
        assert torch.equal(found[1:2], alone.backend.forward(new[1:2], [6], 0, [0]))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that is told which way each layer goes from now on."""
    calls: list[str] = []
    for name in ("_whole", "_by_operations"):
        way = getattr(NativeLayer, name)
        monkeypatch.setattr(
            NativeLayer,
            name,
            lambda self, *given, way=way, name=name: calls.append(name) or way(self, *given),
        )
    return calls


def let_long_passes_be_whole(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever processor this is: with AMX they would be oneDNN's and PyTorch's."""
    for module in ("attention", "cpu.layers"):
        name = f"amulet.backends.transformers.{module}.prefills_well"
        monkeypatch.setattr(name, lambda dtype: True)
    for module in model.modules():
        if hasattr(module, "native"):
            monkeypatch.setattr(module.native, "_most_in_parts", 10**9)


# A part's end lies within a row in those of several rows.
SHORT = [(1, 0, FEW + 1), (1, 0, PART), (1, 30, PART + 1), (3, 7, 50), (4, 0, 60)]
LONG = [(5, 0, 60), (1, 0, 400)]  # for which rounded weights are rather made dense


@pytest.mark.parametrize(
    ("weights", "rows", "start", "width"),
    [
        (weights, *sizes)
        for weights in WEIGHTS
        for sizes in (SHORT + LONG if weights[1] is True else SHORT)
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_long_pass_gives_what_the_model_s_own_layers_give(
    kind: Kind,
    weights: tuple[torch.dtype, Pack],
    rows: int,
    start: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = packed(kind, *weights, head_dim=64)
    let_long_passes_be_whole(model, monkeypatch)
    with monkeypatch.context() as patch:
        calls = calls_of(patch)
        torch.manual_seed(0)
        made = logits_of(model, [start] * rows, width)
    assert calls[-4:] == ["_whole"] * 4
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "prefills_well", lambda dtype: False)
    with own_forward(model):
        expected = logits_of(model, [start] * rows, width)
    check(made, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_long_prompt_is_the_same_in_passes_of_any_width(
    weights: tuple[torch.dtype, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed("llama", *weights, head_dim=64)
    let_long_passes_be_whole(model, monkeypatch)
    ids = torch.randint(0, 256, (2, 300), generator=torch.Generator().manual_seed(0)).tolist()

    @torch.inference_mode()
    def logits(rows: slice, widths: tuple[int, ...]) -> torch.Tensor:
        engine, begin = engine_over(model), 0
        engine.backend._cache.reserve(2, 300)
        for width in widths:
            chunk = [row[begin : begin + width] for row in ids[rows]]
            out = engine.backend.forward(chunk, [begin] * len(chunk), 0, [len(chunk[0]) - 1])
            begin += width
        return out

    together = logits(slice(0, 2), (300,))
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        for widths in ((300,), (150, 150), (20, 260, 20)):
            assert torch.equal(logits(rows, widths), together[rows])


@pytest.mark.parametrize(
    ("known", "weights", "most"),
    [
        ("avx512_bf16", (torch.float32, True), sys.maxsize),
        ("avx512_bf16", (torch.bfloat16, True), sys.maxsize),
        ("avx512_bf16", (torch.bfloat16, "int8"), 256),
        ("avx512_bf16", (torch.bfloat16, "int4"), 512),
        ("avx512_bf16 amx_bf16", (torch.bfloat16, True), 16),
    ],
)
def test_how_many_tokens_are_the_c_code_s(
    known: str, weights: tuple[torch.dtype, Pack], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weights not in WEIGHTS:
        pytest.skip("needs a processor with AVX-512's bfloat16")
    monkeypatch.setattr(native, "processor", lambda: known)
    monkeypatch.setattr(products, "serves", lambda kind: True)
    products.most_rows.cache_clear()
    try:
        model = random_model("llama", dtype=weights[0], head_dim=64)
        pack_linears(model, weights[1])
        found = {
            module.native._most_in_parts for module in model.modules() if hasattr(module, "native")
        }
    finally:
        products.most_rows.cache_clear()
    assert found == {most}


def test_what_is_faster_otherwise_goes_through_the_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rounded = packed("llama", torch.bfloat16, "int8", head_dim=64)
    dense = packed("llama", torch.float32)
    calls = calls_of(monkeypatch)  # after their trials
    logits_of(rounded, [0], 300)  # more tokens than rounded weights are multiplied by as they are
    assert calls == ["_by_operations"] * 4
    calls.clear()
    monkeypatch.setattr(
        "amulet.backends.transformers.cpu.layers.prefills_well", lambda dtype: False
    )
    logits_of(dense, [20, 30], 1)
    assert calls == ["_by_operations"] * 8 + ["_whole"] * 4


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_attend_over_their_pages_in_place(
    kind: Kind, weights: tuple[torch.dtype, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of more rows than the C code multiplies by must not copy their pages."""
    model = packed(kind, *weights)
    for module in model.modules():
        if hasattr(module, "native"):
            monkeypatch.setattr(module.native, "_most", 2)
    monkeypatch.setattr("amulet.backends.transformers.cpu.layers.prefills_well", lambda dtype: True)
    for width in (1, 4, FEW + 1):
        with monkeypatch.context() as patch:
            patch.setattr(PageCache, "update", lambda *given: pytest.fail("pages are copied"))
            calls = calls_of(patch)
            torch.manual_seed(0)
            made = logits_of(model, [0, 300, 40], width)
        assert width > FEW or calls[-4:] == ["_by_operations"] * 4
        torch.manual_seed(0)
        with own_forward(model):
            check(made, logits_of(model, [0, 300, 40], width))


def test_passes_over_another_cache_are_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("llama", torch.float32)

    def refuse(*given: Any) -> None:
        raise AssertionError("not over this cache")

    monkeypatch.setattr(NativeLayer, "_whole", refuse)
    monkeypatch.setattr(NativeLayer, "_by_operations", refuse)
    ids = torch.arange(6)[None]
    found = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (1, 10)


def test_layers_whose_attention_is_another_stay_as_they_are() -> None:
    model = random_model("gemma3", head_dim=32)
    model.config.attn_logit_softcapping = 30.0
    assert pack_linears(model) > 0
    assert not are_native(model)


def test_layers_of_another_class_stay_as_they_are() -> None:
    model = random_model("gemma2", head_dim=32)
    assert pack_linears(model) > 0
    assert not are_native(model)


def test_a_hook_inside_of_a_layer_is_called() -> None:
    model = packed("llama", torch.float32)
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *given: seen.append(given))
    logits_of(model, [3], 1)
    hook.remove()
    assert len(seen) == 2
    logits_of(model, [3], 1)
    assert len(seen) == 2


def test_hooks_that_capture_outputs_are_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers leaves them on the attention for good once hidden states were asked for."""
    model = random_model("llama", head_dim=32)
    pack_linears(model)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    outputs = []
    whole = NativeLayer.__call__
    monkeypatch.setattr(
        NativeLayer, "__call__", lambda *given: outputs.append(whole(*given)) or outputs[-1]
    )
    logits_of(model, [3], 1)
    assert outputs
    assert all(output is not None for output in outputs)


def test_a_model_is_freed_at_once() -> None:
    model = random_model("llama", head_dim=32)
    pack_linears(model)
    assert are_native(model)
    layer = weakref.ref(model.model.layers[0])
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_packing_twice_changes_nothing() -> None:
    model = packed("llama", torch.float32)
    before = type(model.model.layers[0])
    assert use_native_layers(model) == 0
    assert type(model.model.layers[0]) is before


def test_norms_of_another_dtype_stay() -> None:
    model = random_model("llama", dtype=torch.bfloat16, head_dim=32)
    model.model.layers[2].input_layernorm.float()
    pack_linears(model)
    assert not are_native(model)


def test_a_pass_behind_a_row_s_end_is_refused() -> None:
    engine = engine_over(packed("llama", torch.float32))
    with torch.inference_mode(), pytest.raises(AssertionError, match="not 399 tokens"):
        engine.backend.forward([[1]], [399], 0, [0])


def test_heads_that_the_code_can_not_turn_stay_as_they_are() -> None:
    model = random_model("llama", head_dim=16)
    assert pack_linears(model) > 0
    assert not are_native(model)


def test_a_forward_that_somebody_replaced_stays() -> None:
    model = random_model("llama", head_dim=32)
    first = model.model.layers[0]
    first.forward = first.forward
    pack_linears(model)
    assert not are_native(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_otherwise_than_known_stays(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = LlamaAttention.forward

    def sharper(self: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
        scaling, self.scaling = self.scaling, 1.5 * self.scaling
        attended = own(self, hidden_states, **options)
        self.scaling = scaling
        return attended

    monkeypatch.setattr(LlamaAttention, "forward", sharper)
    caplog.set_level(logging.INFO, "amulet")
    model = random_model("llama", dtype=dtype, head_dim=32)
    pack_linears(model)
    assert not are_native(model)
    assert caplog.messages == ["Layers aren't C code: LlamaDecoderLayer computes otherwise."]
    monkeypatch.undo()
    assert use_native_layers(model) == 4


def test_a_layer_that_is_called_otherwise_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    monkeypatch.setattr(LlamaDecoderLayer, "forward", refuse)
    model = random_model("llama", head_dim=32)
    pack_linears(model)
    assert not are_native(model)


def test_another_activation_stays() -> None:
    model = random_model("llama", head_dim=32)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    pack_linears(model)
    assert not are_native(model)


def test_dense_layers_stay() -> None:
    assert use_native_layers(random_model("llama", head_dim=32)) == 0
    assert use_native_layers(torch.nn.Linear(4, 4)) == 0


def test_short_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __getattr__(self, name: str) -> Any:
            return (lambda *given: 1) if name == "amulet_layer" else getattr(code, name)

    code = native.library()
    model = packed("llama", torch.float32)
    monkeypatch.setattr(native, "_libraries", [(Short(), "")])
    with pytest.raises(torch.OutOfMemoryError):
        logits_of(model, [3], 1)


def test_auto_does_not_compile_what_is_faster_uncompiled() -> None:
    assert TransformersBackend(packed("llama", torch.float32), compile="auto")._compile is False
    assert TransformersBackend(random_model("llama"), compile="auto")._compile == "auto"
    assert TransformersBackend(packed("llama", torch.float32), compile=True)._compile is True
