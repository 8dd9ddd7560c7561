"""Checkpoints as people have them, saved tiny and loaded by folder: they answer as `generate` does.

Tied and untied heads, vocabularies wider than the tokenizer, several end ids, adapters, offloaded
and quantised weights. For the libraries that quantise see `docs/models.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from amulet import Amulet, Grammar, Request
from tests.coverage.check import Reference
from tests.models import END_OF_TEXT, IM_END, VOCAB_SIZE
from tests.models.test_multimodal import PLAIN

CHAT = [{"role": "user", "content": "Which tea is it that they drink in the north?"}]
SHORT = [{"role": "user", "content": "Tea?"}]
TORCHAO = Path(sys.prefix) / "torchao"
TORCHAO_TESTS = Path(__file__).parent / "with_torchao.py"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
QUIET = pytest.mark.filterwarnings("ignore")  # of what the libraries call


def save(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    kind: type[PretrainedConfig] = LlamaConfig,
    **config: Any,
) -> Path:
    """Save a random model of two layers, a Llama by default, and the byte tokenizer."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": END_OF_TEXT,
    }
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **config}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], saved: bool
) -> tuple[Amulet, Any]:
    """Return a model that is quantised while it is loaded, and Transformers' own beside it.

    Args:
        tmp_path: for checkpoints.
        tokenizer: theirs.
        options: of loading, by which it is quantised.
        saved: load a checkpoint that was saved quantised.
    """
    folder = save(tmp_path / "dense", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if saved:
        folder = tmp_path / "quantised"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        options = {"device": "cpu", "dtype": torch.float32}
    return Amulet.from_pretrained(folder, **options), model


def check(amulet: Amulet, model: Any) -> list[list[int]]:
    """Compare plain and steered answers, alone and in a batch, with those of `generate`."""
    reference = Reference(model)
    assert not reference.failed
    requests = [
        Request(messages=messages, preference=preference, **PLAIN)
        for messages in (CHAT, SHORT)
        for preference in (None, "Be brief.")
    ]
    alone = [list(amulet.start(request).read().token_ids) for request in requests]
    for request, ids in zip(requests, alone, strict=True):
        prompts = [list(ids) for ids in amulet.prepare(request).generation.prompts]
        assert ids in reference.answers(prompts)
    together = amulet.batch(requests)
    assert [list(getattr(reply, "token_ids", ())) for reply in together] == alone
    assert len({tuple(ids) for ids in alone}) > 1
    return alone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_heads_tied_to_the_embedding_and_their_own(
    tied: bool, pack: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save(tmp_path, tokenizer, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    check(Amulet.from_pretrained(folder, device="cpu", pack=pack), model)


def test_a_head_wider_than_the_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save(tmp_path, tokenizer, tie_word_embeddings=False, vocab_size=384)
    model = AutoModelForCausalLM.from_pretrained(folder)
    amulet = Amulet.from_pretrained(folder, device="cpu", pack=False)
    length = len(tokenizer)
    with torch.no_grad():  # as where training never touched them
        for head in (model.lm_head, amulet.model.lm_head):
            head.weight[length:] *= 4.0
    answers = check(amulet, model)
    assert max(map(max, answers)) >= length  # `generate` chooses such ids, too; they have no text
    reply = amulet.start(Request(messages=CHAT, **PLAIN)).read()
    kept = [token_id for token_id in reply.token_ids if token_id < length]
    assert reply.text == tokenizer.decode(kept, skip_special_tokens=True)
    held = amulet.chat(CHAT, grammar=Grammar.regex("[a-z]{8}"))
    assert max(held.token_ids) < length
    assert len(held.text) == 8


def test_any_of_several_ids_ends_an_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save(tmp_path, tokenizer)
    amulet = Amulet.from_pretrained(folder, device="cpu")
    whole = amulet.start(Request(messages=CHAT, **PLAIN)).read()
    third = whole.token_ids[3]
    assert third not in whole.token_ids[:3]
    GenerationConfig(eos_token_id=[END_OF_TEXT, third]).save_pretrained(folder)
    amulet = Amulet.from_pretrained(folder, device="cpu")
    assert amulet.end_ids == {IM_END, END_OF_TEXT, third}
    reply = amulet.start(Request(messages=CHAT, **PLAIN)).read()
    assert (reply.finish_reason, reply.token_ids) == ("stop", whole.token_ids[:4])


@QUIET
def test_the_folder_of_an_adapter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import peft

    base = save(tmp_path / "base", tokenizer)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    amulet = Amulet.from_pretrained(tmp_path / "adapter", device="cpu")
    answers = check(amulet, adapted.eval().base_model.model)
    assert answers != check(Amulet(plain, tokenizer), plain)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(place: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(tmp_path / "model", tokenizer, tie_word_embeddings=False)
    placed: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": place,
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": place,
    }
    amulet = Amulet.from_pretrained(
        folder, device_map=placed, offload_folder=str(tmp_path / "offload")
    )
    elsewhere = {name for name, tensor in amulet.model.named_parameters() if tensor.is_meta}
    assert bool(elsewhere) is (place == "disk")
    check(amulet, AutoModelForCausalLM.from_pretrained(folder))


# ---- quantised checkpoints ----


def save_quantised(
    folder: Path, tensors: dict[str, torch.Tensor], method: dict[str, Any], dense: dict[str, Any]
) -> None:
    """Replace a checkpoint's tensors and say how they are to be read."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = dict(model.named_parameters())
    assert len(dense) >= 4
    for name, weight in dense.items():
        assert torch.equal(loaded[name], weight)


@QUIET
@pytest.mark.parametrize("pack", [True, False])
def test_fp8(pack: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As Qwen3 and DeepSeek are published: 8 bits, a scale for each 128 by 128 of them."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 2}
    folder = save(tmp_path, tokenizer, **sizes)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 128, 128, columns // 128, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name] = rounded.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scales
        dense[name] = (rounded.float() * scales[:, None, :, None]).view(rows, columns)
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save_quantised(folder, tensors, {**method, "activation_scheme": "dynamic"}, dense)
    amulet = Amulet.from_pretrained(folder, device="cpu", dtype="float32", pack=pack)
    check(amulet, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@QUIET
@pytest.mark.parametrize("pack", [True, False])
def test_mxfp4(pack: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As gpt-oss is published: experts of 4 bits, an exponent for each 32 of them."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    folder = save(tmp_path, tokenizer, GptOssConfig, **experts)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values, generator = torch.cat([half, -half]), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        many, inputs, outputs = tensors.pop(name).shape
        shape = many, outputs, inputs // 32
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
        fours = torch.stack([blocks & 15, blocks >> 4], dim=-1).reshape(*shape, 32)
        wide = values[fours.long()] * torch.exp2(scales[..., None].float() - 127)
        dense[name] = wide.reshape(many, outputs, inputs).transpose(1, 2)
    save_quantised(folder, tensors, {"quant_method": "mxfp4"}, dense)
    amulet = Amulet.from_pretrained(folder, device="cpu", dtype="float32", pack=pack)
    check(amulet, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def packed(numbers: torch.Tensor, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Pack eight numbers of 4 bits, in this order, into each of the last dimension's."""
    eights = numbers.long().unflatten(-1, (-1, 8))[..., list(order)] << torch.arange(0, 32, 4)
    return eights.sum(-1).to(torch.int32).contiguous()  # the highest bit is the sign


@QUIET
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As AutoGPTQ and AutoAWQ write them, a scale and a zero for each 32 weights; by auto-round."""
    pytest.importorskip("auto_round", reason="needs auto-round")
    pytest.importorskip("auto_round_kernel", reason="needs auto-round-lib")
    from transformers import AutoRoundConfig

    folder = save(tmp_path, tokenizer)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        groups = weight.unflatten(1, (-1, 32))
        least, most = groups.aminmax(dim=-1)
        scales = ((most - least) / 15).half().float()
        zeros = (-least / scales).round()
        numbers = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
        rounded = ((numbers - zeros[..., None]) * scales[..., None]).flatten(1)
        dense.get_parameter(name).data.copy_(rounded)
        layer = name.removesuffix("weight")
        tensors[f"{layer}scales"] = scales.half().t().contiguous()
        if kind == "gptq":
            tensors[f"{layer}qweight"] = packed(numbers.flatten(1)).t().contiguous()
            tensors[f"{layer}qzeros"] = packed((zeros - 1).t())
            tensors[f"{layer}g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
        else:
            tensors[f"{layer}qweight"] = packed(numbers.flatten(1).t(), AWQ_ORDER)
            tensors[f"{layer}qzeros"] = packed(zeros.t(), AWQ_ORDER)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    method = {"quant_method": kind, "bits": 4, "group_size": 32, "sym": False}
    method |= {"desc_act": False} if kind == "gptq" else {"zero_point": True, "version": "gemm"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    options: dict[str, Any] = {"quantization_config": AutoRoundConfig(), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)
    layer = model.model.layers[1].mlp.down_proj
    assert type(layer) is not torch.nn.Linear
    expected = dense.model.layers[1].mlp.down_proj
    hidden = torch.randn(2, expected.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(hidden), expected(hidden))
    check(Amulet.from_pretrained(folder, device="cpu", **options), model)


@pytest.mark.slow
def test_torchao() -> None:
    """In a process of its own, which alone imports it: it logs at every import of Transformers."""
    if not TORCHAO.is_dir():
        pytest.skip("torchao is installed by `make install`, in a folder of its own")
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(TORCHAO)])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TORCHAO_TESTS)],
        env={**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "\n2 passed" in ran.stdout, ran.stdout + ran.stderr


@QUIET
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("saved", [True, False])
def test_bitsandbytes(
    bits: int, saved: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers import BitsAndBytesConfig

    # A threshold splits columns off by the values of all rows: one row's tokens may be another's.
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_threshold=0.0
    )
    options: dict[str, Any] = {
        "quantization_config": config,
        "dtype": torch.float32,
        "device_map": {"": "cpu"},
    }
    check(*quantised(tmp_path, tokenizer, options, saved))


@QUIET
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors(bits: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(save(tmp_path / "dense", tokenizer))
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format="pack-quantized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            least, most = module.weight.aminmax(dim=1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(least, most, weights)[0])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = tmp_path / "quantised"
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tokenizer.save_pretrained(folder)
    amulet = Amulet.from_pretrained(folder, device="cpu", dtype="float32")
    assert {parameter.dtype for parameter in amulet.model.parameters()} >= {torch.int32}
    check(amulet, AutoModelForCausalLM.from_pretrained(folder))
