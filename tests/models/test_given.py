"""What stands in a model's place and is none: the error names the call that takes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, ModelError, RequestError
from amulet.models.given import call_for
from tests.models import ScriptedModel, byte_tokenizer

MODEL = ScriptedModel(byte_tokenizer(), "Hello")
BOTH: Any = SimpleNamespace(model=MODEL, tokenizer=byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("Qwen/Qwen3-0.6B", "Amulet.from_pretrained('Qwen/Qwen3-0.6B')"),
        ("my folder", "Amulet.from_pretrained('my folder')"),
        ("https://huggingface.co/a/b/tree/main", "Amulet.from_pretrained('a/b')"),
        ("model.gguf", "Amulet.from_gguf('model.gguf')"),
        ("ollama:llama3.2:1b", "Amulet.from_gguf('ollama:llama3.2:1b')"),
        ("embedded", "Amulet.embedded()"),
        ("http://127.0.0.1:8000", "Amulet.connect('http://127.0.0.1:8000')"),
    ],
)
def test_a_name_has_its_call(name: str, call: str) -> None:
    assert call_for(name) == call
    with pytest.raises(RequestError, match="has a name: expected a loaded model") as refused:
        Amulet(name)  # type: ignore[arg-type]
    assert str(refused.value).endswith(f"Use {call}.")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((), r"has no model: expected Amulet\(model, tokenizer\).* or Amulet\.embedded\(\)\."),
        ((None, byte_tokenizer()), "has no model"),
        ((Path("folder"),), r"Use Amulet\.from_pretrained\('folder'\)\."),
        ((5, byte_tokenizer()), "a model of type int: expected a loaded"),
        (
            (byte_tokenizer(), MODEL),
            r"a model of type \w+: expected a loaded causal .* its tokenizer\.\n",
        ),
        ((BOTH,), r"a model of type SimpleNamespace: .* Use Amulet\(it\.model, it\.tokenizer\)\."),
        ((MODEL,), r"tokenizer=None: .*Amulet\.from_pretrained\('Qwen/Qwen3-0\.6B'\) loads both"),
        ((MODEL, "a/b"), r"tokenizer='a/b': .* such as AutoTokenizer\.from_pretrained\('a/b'\)"),
        (
            (MODEL, byte_tokenizer().backend_tokenizer),
            "a tokenizer of type Tokenizer: expected one",
        ),
    ],
)
def test_what_is_no_model_with_its_tokenizer_is_named(parts: tuple[Any, ...], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Amulet(*parts)


@pytest.mark.parametrize("load", [Amulet.from_pretrained, Amulet.from_gguf])
def test_what_is_no_name_is_not_loaded(load: Any) -> None:
    with pytest.raises(RequestError, match="has a name of type NoneType: expected a hub id"):
        load(None)
    with pytest.raises(
        RequestError, match=r"of type ScriptedModel: .* Use Amulet\(model, tokenizer\)\."
    ):
        load(MODEL)
    with pytest.raises(RequestError, match=r"Use Amulet\(it\.model, it\.tokenizer\)\."):
        load(BOTH)


@pytest.mark.parametrize(
    "load",
    [
        Amulet.embedded,
        lambda **options: Amulet.from_pretrained("a/b", **options),
        lambda **options: Amulet.from_gguf("a.gguf", **options),
    ],
)
def test_an_option_of_an_answer_is_no_option_for_loading(load: Any) -> None:
    with pytest.raises(
        RequestError, match=r"^strength: .* Use steering=Steering\(strength=\.\.\.\)"
    ):
        load(strength=0.5)
    with pytest.raises(RequestError, match=r"^preference: .* the call: chat\(\.\.\., preference="):
        load(preference="Be brief.")


@pytest.mark.parametrize("name", ["embedded", "http://127.0.0.1:8000"])
def test_a_name_of_another_call_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="is no folder and no hub name") as refused:
        Amulet.from_pretrained(name)
    assert call_for(name) in str(refused.value)


async def test_the_preference_may_be_the_second_argument(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model: Any = ScriptedModel(tokenizer, {"Be brief.": "short", "": "long"})
    amulet = Amulet(model, tokenizer)
    chat, wish = [{"role": "user", "content": "Hi"}], "Be brief."
    assert amulet.chat(chat, wish).text == "short"
    assert "".join(amulet.stream(chat, wish)) == "short"
    assert amulet.complete("Hi", wish).text == "short"
    assert "".join(amulet.stream_complete("Hi", wish)) == "short"
    assert (await amulet.achat(chat, wish)).text == "short"
    assert (await amulet.acomplete("Hi", wish)).text == "short"
    assert (await amulet.astream(chat, wish).read()).text == "short"
    assert (await amulet.astream_complete("Hi", wish).read()).text == "short"
    assert amulet.chat(chat).text == "long"


def test_a_text_in_a_models_place_is_not_repeated() -> None:
    with pytest.raises(RequestError, match="<str of 400 characters>") as raised:
        Amulet("Be brief. " * 40)  # type: ignore[arg-type]
    assert "Be brief" not in str(raised.value)
    assert call_for("Qwen/Qwen3-0.6B") in str(raised.value)


@pytest.mark.parametrize("load", [Amulet.from_pretrained, Amulet.from_gguf])
def test_a_text_in_a_names_place_is_not_repeated(load: Any) -> None:
    with pytest.raises(
        RequestError, match=r"a name of 400 characters: expected a hub id"
    ) as raised:
        load("Be brief. " * 40)
    assert "Be brief" not in str(raised.value)
