"""Names of other libraries that are not public, and that Amulet relies on: are they still there?

What a name does is tested where it is used; here a renamed or removed one is told by its name.
ARCHITECTURE.md lists them.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from amulet.backends.transformers.masks import attention_kind
from amulet.backends.transformers.weights import is_adapter, weights_state
from tests.models import random_model


def test_the_config_says_which_attention_a_model_has() -> None:
    model = random_model("llama")
    assert attention_kind(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert attention_kind(model.config) == "eager"


def test_transformers_names_a_model_by_a_name_that_can_be_set() -> None:
    config = PretrainedConfig(name_or_path="a/b")
    assert config.name_or_path == "a/b"
    config.name_or_path = "c/d"
    assert config.name_or_path == "c/d"
    assert isinstance(PreTrainedModel.is_backend_compatible(), bool)


def test_transformers_looks_attention_and_masks_up_by_name() -> None:
    import_module("amulet.backends.transformers.attention")  # which registers its own
    attention = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    masks = import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    assert attention["sdpa"].__module__ == "amulet.backends.transformers.attention"
    assert masks["sdpa"].__module__ == "amulet.backends.transformers.attention"
    sdpa = import_module("transformers.integrations.sdpa_attention").sdpa_attention_forward
    names = ["module", "query", "key", "value", "attention_mask"]
    assert list(inspect.signature(sdpa).parameters)[:5] == names


def test_modules_keep_their_parts_in_dicts_of_these_names() -> None:
    parts = vars(nn.Linear(2, 2))
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        assert hasattr(parts[name], "values"), name


def test_a_tensor_counts_the_writes_to_it() -> None:
    layer = nn.Linear(2, 2)
    before, state = layer.weight._version, weights_state(layer)
    with torch.no_grad():
        layer.weight.add_(0)
    assert layer.weight._version == before + 1
    assert weights_state(layer) != state


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("mkldnn", "data_ptr"),
        ("mkldnn", "_nbytes"),
        ("mkldnn", "_reorder_linear_weight"),
        ("mkldnn", "_linear_pointwise"),
        ("mkldnn", "_is_mkldnn_bf16_supported"),
        ("aten", "_scaled_dot_product_flash_attention_for_cpu"),
        ("aten", "_weight_int8pack_mm"),
        ("aten", "_weight_int4pack_mm_for_cpu"),
        ("aten", "_convert_weight_to_int4pack_for_cpu"),
    ],
)
def test_pytorch_has_the_operation(place: str, name: str) -> None:
    if place == "mkldnn" and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this PyTorch has no oneDNN")
    assert hasattr(getattr(torch.ops, place), name)


def test_the_compilers_limit_can_be_set_for_a_while() -> None:
    config = import_module("torch._dynamo.config")
    before = config.cache_size_limit
    with config.patch(cache_size_limit=before + 1):
        assert config.cache_size_limit == before + 1
    assert config.cache_size_limit == before


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        (nn.Module, "_apply", ["self", "fn", "recurse"]),
        (nn.Module, "_save_to_state_dict", ["self", "destination", "prefix", "keep_vars"]),
        (nn.Module, "_load_from_state_dict", ["self", "state_dict", "prefix", "local_metadata"]),
    ],
)
def test_modules_are_moved_and_saved_by_these_methods(
    kind: Any, name: str, arguments: list[str]
) -> None:
    assert list(inspect.signature(getattr(kind, name)).parameters)[: len(arguments)] == arguments


def test_accelerate_puts_its_hook_into_an_attribute() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(2, 2)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    hook: Any = layer._hf_hook
    assert str(hook.execution_device) == "cpu"
    assert hasattr(hook, "weights_map")
    assert hasattr(hooks.SequentialHook(), "hooks")


def test_peft_marks_its_modules() -> None:
    peft = pytest.importorskip("peft")
    model = random_model("llama")
    assert not any(map(is_adapter, model.modules()))
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert sum(map(is_adapter, model.modules())) == 4
