"""Packed linear layers give what dense ones give, and only where they can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from amulet import packing
from amulet.errors import ModelError
from amulet.packing import Int8Linear, PackedLinear, pack_linears
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
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert model.get_input_embeddings().weight.shape == (320, 64)


def test_what_can_not_be_packed_is_left_alone() -> None:
    assert pack_linears(random_model("llama", dtype=torch.float64)) == 0
    adapted = random_model("llama")
    adapted._hf_peft_config_loaded = True
    assert pack_linears(adapted) == 0
    assert pack_linears(nn.Linear(2, 2, device="meta")) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_an_int8_layer_is_near_the_dense_one(bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48, bias=bias, dtype=torch.bfloat16)
    hidden = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        rounded = Int8Linear(dense)
        assert (rounded(hidden) - dense(hidden)).abs().max() < 0.03
        assert (rounded.weight - dense.weight).abs().max() < 0.001
    assert rounded(hidden).shape == (1, rows, 48)


def test_int8_is_refused_where_it_does_not_work() -> None:
    with pytest.raises(ModelError, match='load with dtype="bfloat16"'):
        pack_linears(random_model("llama"), "int8")
    assert pack_linears(random_model("llama", dtype=torch.bfloat16), "int8") == 4 * 7 + 1


def test_a_packed_layer_s_weight_goes_when_the_layer_goes() -> None:
    layer = PackedLinear(nn.Linear(8, 8))
    held = len(packing._packed)
    del layer
    assert len(packing._packed) == held - 1
