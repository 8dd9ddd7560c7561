"""Shapes: parameters as published, configs of files, and clear words for what can't be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, MambaConfig, PreTrainedModel, PreTrainedTokenizerBase

from amulet import ModelError, RequestError
from amulet.plan.shapes import KNOWN, find_shape, shape_of
from tests.models import KINDS, Kind, random_model

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def test_known_shapes_have_the_published_numbers_of_parameters() -> None:
    assert {name: find_shape(name).parameters for name in KNOWN} == PUBLISHED


def test_what_a_step_reads_and_a_token_takes() -> None:
    one, eight = find_shape("Llama-3.2-1B"), find_shape("llama-3.1-8b")
    assert one.read == one.parameters  # the head is the embedding
    assert eight.read == eight.parameters - 128256 * 4096
    assert eight.weights("bfloat16") == 2 * eight.parameters
    assert eight.token("bfloat16") == 2 * 32 * 8 * 128 * 2
    assert eight.token("float32", parts=4) == 2 * 32 * 2 * 128 * 4
    assert eight.token("float16", parts=16) == 2 * 32 * 1 * 128 * 2  # a head is not split
    assert (eight.window, eight.dtype) == (131072, "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_is_that_of_the_model(kind: Kind) -> None:
    model = random_model(kind)
    shape = shape_of(model.config, kind)
    parameters = list(model.parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in parameters)
    assert shape.read == shape.parameters - model.get_input_embeddings().weight.numel()
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (4, 2, 16)


def test_the_embedded_model(smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model = smollm[0]
    known, own = find_shape("smollm2-135m"), shape_of(model.config, "own")
    names = ("parameters", "read", "layers", "kv_heads", "head_dim", "window")
    assert [getattr(known, name) for name in names] == [getattr(own, name) for name in names]
    assert known.parameters == model.num_parameters()


def test_a_file_and_a_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, dtype="float16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    by_folder = find_shape(str(tmp_path))
    by_file = find_shape(str(tmp_path / "config.json"))
    assert by_folder.parameters == by_file.parameters > 0
    assert (by_file.kv_heads, by_file.head_dim, by_file.dtype) == (2, 8, "float16")


def test_what_is_no_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such file or folder; known names are smollm2-135m"):
        find_shape("llama-9000b")
    with pytest.raises(ModelError, match=r"Expected a config\.json"):
        find_shape(str(tmp_path))
    broken = tmp_path / "config.json"
    for content in ("{", "[]", '{"model_type": "nothing"}', json.dumps({"hidden_size": 3})):
        broken.write_text(content)
        with pytest.raises(ModelError, match=r"Expected a config\.json"):
            find_shape(str(broken))
    with pytest.raises(ModelError, match=r"nobody/nothing.*Expected a config\.json"):
        find_shape("nobody/nothing")  # the hub can't be reached
    with pytest.raises(ModelError, match="this config is not of a causal language model"):
        shape_of(LlamaConfig(hidden_size=0, num_attention_heads=1), "empty")


def test_other_kinds_of_cache_are_refused() -> None:
    from transformers import DeepseekV3Config, Qwen2Config

    indexed = Qwen2Config(num_hidden_layers=2, layer_types=["indexed_attention"] * 2)
    with pytest.raises(ModelError, match="layers of the kind indexed_attention don't store"):
        shape_of(indexed, "indexed")

    with pytest.raises(ModelError, match="latent attention don't store"):
        shape_of(DeepseekV3Config(), "deepseek")
    with pytest.raises(
        ModelError, match=r"plan can't estimate their memory|not of a causal language model"
    ):
        shape_of(MambaConfig(), "mamba")
