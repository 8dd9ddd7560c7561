"""Joined layers stay what they are to everybody but the code that is compiled for them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from amulet.backends.transformers.compiled import CompiledStep
from amulet.backends.transformers.cuda.siblings import SiblingLinear, join_siblings
from tests.models import Kind, random_model

IDS = torch.arange(9)[None]


def _joined(model: nn.Module) -> list[SiblingLinear]:
    return [module for module in model.modules() if isinstance(module, SiblingLinear)]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without and with biases
def test_a_joined_model_computes_saves_and_trains_as_before(kind: Kind, tmp_path: Path) -> None:
    model = random_model(kind)
    expected = model(IDS).logits
    parameters = dict(model.named_parameters())
    with torch.inference_mode():  # as a decode step would
        join_siblings(model)
    layers = _joined(model)
    assert len(layers) == 4 * 5  # q, k, v, gate and up of four layers
    assert all(layer.is_joined() for layer in layers)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    assert torch.equal(model(IDS).logits, expected)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved(IDS).logits, expected)


def test_what_was_moved_is_joined_anew_and_what_was_not_is_left_alone() -> None:
    model = random_model("llama")
    join_siblings(model)
    joints = [layer.joint for layer in _joined(model)]
    join_siblings(model)
    assert [layer.joint for layer in _joined(model)] == joints
    other = copy.deepcopy(model)
    model.to(torch.float64)
    assert not any(layer.is_joined() for layer in [*_joined(model), *_joined(other)])
    join_siblings(model)
    assert all(layer.is_joined() for layer in _joined(model))
    assert {layer.joint.weight.dtype for layer in _joined(model)} == {torch.float64}


def test_layers_that_differ_are_not_joined() -> None:
    model = random_model("llama")
    layer = model.model.layers[0]
    layer.self_attn.k_proj = nn.Linear(64, 32, bias=True)  # q and v have none
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)  # somebody's own
    join_siblings(model)
    assert not _joined(layer)
    assert len(_joined(model)) == 3 * 5


def test_only_a_model_that_is_compiled_by_layers_is_joined() -> None:
    model = random_model("llama")
    CompiledStep(model, by_layer=False).prepare()
    assert not _joined(model)
    CompiledStep(model, by_layer=True).prepare()
    assert _joined(model)
