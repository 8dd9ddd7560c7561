"""Packed linear layers give what dense ones give, and only where they can."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from amulet.backends.transformers.cpu import native, packed_layers, packing, products
from amulet.backends.transformers.cpu.packed_layers import (
    Int4Linear,
    Int8Linear,
    PackedLayer,
    PackedLinear,
)
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.errors import ModelError
from tests.bounds import of_logits
from tests.models import random_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64)])
def test_a_packed_layer_equals_the_dense_one(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=dtype)
    hidden = torch.randn(*shape, dtype=dtype)
    with torch.inference_mode():
        packed = PackedLinear(dense)
        torch.testing.assert_close(packed(hidden), dense(hidden))
        assert torch.equal(packed.weight, dense.weight)


def test_a_packed_model_gives_the_same_logits_and_keeps_a_tied_embedding() -> None:
    model = random_model("qwen2")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = model(ids).logits
        assert pack_linears(model) == 4 * 7 + 1
        off = (model(ids).logits - before).abs().max()
        assert off <= of_logits(torch.float32, columns=40) * before.abs().max()
    assert model.get_input_embeddings().weight.shape == (320, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_a_packed_model_lets_go_of_the_file_it_was_mapped_from(tmp_path: Path) -> None:
    random_model("qwen2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert pack_linears(model) > 0
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_can_not_be_packed_is_left_alone() -> None:
    import peft

    assert pack_linears(random_model("llama", dtype=torch.float64)) == 0
    adapted = random_model("llama")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert pack_linears(adapted) == 0
    assert pack_linears(nn.Linear(2, 2, device="meta")) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40, 300])
def test_an_int8_layer_is_near_the_dense_one(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        rounded = Int8Linear(dense)
        assert (rounded(hidden) - dense(hidden)).abs().max() < 0.03
        assert (rounded.weight - dense.weight).abs().max() < 0.001
    assert rounded(hidden).shape == (1, rows, 48)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 120, 600])  # the last beyond what C code serves
def test_an_int4_layer_gives_what_its_rounded_weights_give(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        rounded = Int4Linear(dense)
        expected = nn.functional.linear(hidden, rounded.weight, dense.bias)
        torch.testing.assert_close(rounded(hidden), expected, atol=0.02, rtol=0.02)
        step = dense.weight.unflatten(1, (2, 32)).float()
        step = (step.amax(2) - step.amin(2)) / 15  # levels lie this far apart
        wrong = (rounded.weight - dense.weight).unflatten(1, (2, 32)).abs().float()
        assert (wrong < 0.55 * step[..., None]).all()  # half a step, and the scale's own rounding


def test_int4_keeps_weights_that_have_sixteen_levels() -> None:
    """As those of a model that comes from a Q4_1 file."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode():
        levels = torch.randint(0, 16, (16, 2, 32))
        levels[..., 0], levels[..., 1] = 0, 15
        scales = 2.0 ** torch.randint(-8, -4, (16, 2, 1))
        dense.weight.copy_(((levels - 6) * scales).flatten(1))
        assert torch.equal(Int4Linear(dense).weight, dense.weight)


def test_rounded_weights_are_refused_where_they_do_not_work() -> None:
    for pack in ("int8", "int4"):
        with pytest.raises(ModelError, match='load with dtype="bfloat16"'):
            pack_linears(random_model("llama"), pack)
        assert pack_linears(random_model("llama", dtype=torch.bfloat16), pack) == 4 * 7 + 1
    with pytest.raises(ModelError, match="expected True, False"):
        pack_linears(random_model("llama"), "int3")


def test_int4_leaves_the_head_and_odd_shapes_in_8_bits() -> None:
    model = random_model("llama", dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 120, dtype=torch.bfloat16)
    pack_linears(model, "int4")
    assert type(model.lm_head) is Int8Linear
    assert type(model.model.layers[0].mlp.up_proj) is Int8Linear
    assert type(model.model.layers[0].mlp.down_proj) is Int4Linear


@pytest.mark.parametrize(("pack", "count"), [(True, 0), ("int8", 29)])
def test_a_processor_without_bfloat16_keeps_its_dense_layers(
    monkeypatch: pytest.MonkeyPatch, pack: Any, count: int
) -> None:
    model = random_model("llama", dtype=torch.bfloat16)

    def refuses(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw")

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuses)
    assert pack_linears(model, pack) == count


@pytest.mark.parametrize(("packed", "dense", "count"), [(0.1, 0.2, 29), (0.2, 0.1, 0)])
def test_without_own_products_float32_is_packed_only_where_a_trial_is_faster_so(
    monkeypatch: pytest.MonkeyPatch, packed: float, dense: float, count: int
) -> None:
    def seconds(layers: list[nn.Module]) -> float:
        return packed if isinstance(layers[0], PackedLinear) else dense

    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(packing, "TRIAL", (0, 2**28))
    monkeypatch.setattr(packing, "_seconds", seconds)
    assert pack_linears(random_model("llama")) == count


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear])
def test_a_packed_layer_goes_when_nobody_holds_it(kind: type[PackedLayer]) -> None:
    gc.collect()
    held = len(packed_layers._layers)
    layer = kind(nn.Linear(8, 8, dtype=torch.bfloat16))
    assert len(packed_layers._layers) == held + 1
    del layer
    assert len(packed_layers._layers) == held


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_rounded_layers_need_no_c_compiler(
    monkeypatch: pytest.MonkeyPatch, kind: type[PackedLayer], bias: bool
) -> None:
    """PyTorch's kernels give the same, to rounding, of the same weights."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    own = kind(dense)
    weight, output = own.weight, own(hidden)
    monkeypatch.setattr(native, "library", lambda: None)
    pytorchs = kind(dense)
    torch.testing.assert_close(pytorchs.weight, weight, atol=0.002, rtol=0.01)
    torch.testing.assert_close(pytorchs(hidden), output, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear, Int4Linear])
def test_a_packed_layer_is_neither_copied_nor_saved(kind: type[PackedLayer]) -> None:
    layer = kind(nn.Linear(32, 16, dtype=torch.bfloat16))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ModelError, match="load the model with pack=False"):
            attempt(layer)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_hidden_states_that_do_not_fit_are_an_error(kind: type[PackedLayer]) -> None:
    layer = kind(nn.Linear(64, 48, dtype=torch.bfloat16))
    with torch.inference_mode():
        for hidden in (torch.zeros(2, 64), torch.zeros(2, 32, dtype=torch.bfloat16)):
            with pytest.raises((ModelError, RuntimeError)):
                layer(hidden)


def test_a_system_that_is_not_linux_packs_without_the_c_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_such_file() -> str:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "processor", no_such_file)
    products.most_rows.cache_clear()
    torch.manual_seed(0)
    for kind in (PackedLinear, Int8Linear, Int4Linear):
        dense = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(False)
        hidden = torch.randn(2, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(kind(dense)(hidden), dense(hidden), atol=0.2, rtol=0.1)
