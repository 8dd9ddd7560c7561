"""`load_pretrained`: what it loads, and what it says when it can't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from amulet import Amulet
from amulet.errors import MissingPackageError, ModelError
from amulet.models.loading import default_device, load_pretrained


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved Llama of one layer, in bfloat16, with the byte tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def said(folder: Path | str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_pretrained(folder, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_saved_model_comes_back_in_eval_mode_on_the_default_device(folder: Path) -> None:
    model, tokenizer = load_pretrained(folder)
    assert not model.training
    assert model.device.type == default_device()
    assert tokenizer("hé").input_ids == [104, 195, 169]
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(
        model.get_input_embeddings().weight.cpu(), saved["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_takes_names_and_torch_dtypes(
    folder: Path, given: str | torch.dtype, expected: torch.dtype
) -> None:
    model, _ = load_pretrained(folder, dtype=given, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("given", ["float", "int8", "", torch.int8, None])
def test_an_unknown_dtype_is_named(folder: Path, given: object) -> None:
    assert said(folder, dtype=given) == (
        f'dtype={given!r}: expected "auto", "float32", "bfloat16", "float16" '
        "or a floating-point torch.dtype."
    )


def test_device_map_and_attention_pass_through(folder: Path) -> None:
    model, _ = load_pretrained(folder, device_map={"": "cpu"}, attn_implementation="eager")
    assert model.device == torch.device("cpu")
    assert model.config._attn_implementation == "eager"


def test_device_and_device_map_exclude_each_other(folder: Path) -> None:
    assert said(folder, device="cpu", device_map="auto") == (
        "device='cpu' and device_map='auto' were both given: give device for one device, or "
        'device_map (such as "auto") for several.'
    )


def test_a_device_that_is_not_there_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    fix = 'here; give device="cpu", or leave device out.'
    assert said("nowhere", device="cuda") == (
        f"device='cuda': torch {torch.__version__} sees no CUDA GPU {fix}"
    )
    assert said("nowhere", device=torch.device("mps")) == (
        f"device='mps': torch {torch.__version__} has no MPS {fix}"
    )
    assert said("nowhere", device="gpu") == (
        'device=\'gpu\': expected "cpu", "cuda", "cuda:<number>" or "mps".'
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert said("nowhere", device="cuda:2") == (
        "device='cuda:2': there are 2 CUDA GPUs, numbered from 0; give "
        'device="cuda", or leave device out.'
    )


@pytest.mark.parametrize("given", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "", "a\\b"])
def test_a_folder_that_does_not_exist(given: str) -> None:
    assert said(given) == (
        f"model {given!r}: there is no such folder. Give the folder of a saved model, or a hub "
        'name such as "Qwen/Qwen3-0.6B".'
    )


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert said(tmp_path) == (
        f"{tmp_path} is not a saved model: it has no config.json. Give the folder that "
        "save_pretrained wrote, or one downloaded from the hub."
    )


def test_a_file_instead_of_its_folder(folder: Path) -> None:
    file = folder / "model.safetensors"
    assert said(file) == f"{file} is a file: give the folder that contains it."


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert said(folder) == (
        f"{folder} has a config but no weights: no *.safetensors file is there."
    )


def test_pickle_weights_are_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"would run code")
    assert said(folder).startswith(
        f"{folder} has only pickle weights (such as pytorch_model.bin), which can run code"
    )


def test_remote_code_is_not_run_unasked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {
            "AutoConfig": "homemade.HomemadeConfig",
            "AutoModelForCausalLM": "homemade.Homemade",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "homemade.py").write_text("raise SystemExit('remote code was run')")
    assert said(folder) == (
        f"{folder} needs Python code from its repository, which was not run. Read that code, then "
        "pass trust_remote_code=True."
    )


def test_weights_that_lack_tensors_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert said(folder) == (
        f"{folder}: 1 of the model's weights are not in its files, the first is "
        "model.norm.weight. The copy is not complete, or is not a causal language model."
    )


def test_broken_weights_are_reported(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert said(folder).startswith(f"{folder} can't be loaded: SafetensorError: ")


def test_a_model_that_writes_no_text(folder: Path) -> None:
    T5Config(vocab_size=320, d_model=16, num_layers=1).save_pretrained(folder)
    assert said(folder) == (
        f"{folder} is not a causal language model (a decoder that writes text)."
    )


def test_a_misspelt_option_is_an_error(folder: Path) -> None:
    assert said(folder, attention="eager").startswith(f"{folder}: unknown option; check its")


def test_an_option_of_another_type_is_an_error(folder: Path) -> None:
    assert said(folder, quantization_config="4bit").startswith(
        "quantization_config='4bit': expected a config of Transformers, such as"
    )
    found = said(folder, attn_implementation=5)
    assert found.startswith(f"{folder} can't be loaded: AttributeError: ")


def test_an_adapter_needs_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    monkeypatch.setattr("amulet.models.loading.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as caught:
        load_pretrained(folder)
    assert str(caught.value) == f"{folder} is a PEFT adapter: run `pip install peft`."


def test_an_adapter_without_a_tokenizer_takes_its_base_models(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from amulet.models.loading import _tokenizer_source

    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder)})
    )
    assert _tokenizer_source(str(adapter)) == str(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
    assert _tokenizer_source(str(adapter)) == str(adapter)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        load_pretrained("nobody/nothing")
    assert str(caught.value).startswith(
        "nobody/nothing: neither a local folder nor a model that the hub returned. Check the name, "
        "the network (HF_HUB_OFFLINE forbids it), and for a private or gated model pass token=."
    )
    assert isinstance(caught.value.__cause__, OSError)


def test_importing_the_module_loads_no_torch() -> None:
    code = (
        "import sys, amulet.models.loading, amulet.models.embedded;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# ---- GGUF ----


@pytest.fixture
def gguf_folder(tmp_path: Path) -> Path:
    """A random Llama of one layer as a GGUF file with a tokenizer of bytes, and nothing else."""
    width, inner, vocab = 32, 64, 258
    tokens = [*bytes_to_unicode().values(), "ab", "<|endoftext|>"]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(vocab)
    writer.add_context_length(128)
    writer.add_block_count(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocab - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(vocab - 1)
    writer.add_chat_template(
        "{% for m in messages %}{{ m['content'] + '<|endoftext|>' }}{% endfor %}"
    )
    shapes = {
        **dict.fromkeys(("token_embd", "output"), (vocab, width)),
        **{f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")},
        **dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (inner, width)),
        "blk.0.ffn_down": (width, inner),
        **dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (width,)),
    }
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_a_gguf_file_loads_without_any_other(gguf_folder: Path) -> None:
    amulet = Amulet.from_pretrained(gguf_folder, gguf_file="tiny.gguf", device="cpu")
    assert amulet.model.dtype == torch.float32
    assert amulet.encode("cab") == [amulet.encode("c")[0], 256]
    reply = amulet.chat(
        [{"role": "user", "content": "Hi"}], preference="Be brief.", focus=0, max_new_tokens=3
    )
    assert reply.usage.completion_tokens == len(reply.token_ids) >= 1
    assert reply.usage.base_prompt_tokens == len("Hi") + 1


def test_a_gguf_file_has_to_be_named(gguf_folder: Path) -> None:
    assert said(gguf_folder).endswith('holds GGUF files: name one, such as gguf_file="tiny.gguf".')
    assert said(gguf_folder / "tiny.gguf").endswith('contains it, and gguf_file="tiny.gguf".')
    assert said(gguf_folder, gguf_file="other.gguf") == (
        f"gguf_file='other.gguf': there is no such file in {gguf_folder}."
    )
