"""Which model a class stands for: what can't all be meant at once is refused, not dropped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField

from amulet import Amulet, ModelError, RequestError
from amulet_integrations import _loading
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from amulet_integrations.llama_index import AmuletLLM as LlamaIndexLLM
from tests.models import ScriptedModel, byte_tokenizer

KINDS: list[Any] = [ChatAmulet, AmuletLLM, LlamaIndexLLM]


def amulet() -> Amulet:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, "Hello")
    return Amulet(model, tokenizer)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Load scripted models in place of real ones, and list what was to be loaded."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> Amulet:
        asked.append((name, options))
        return amulet()

    monkeypatch.setattr(Amulet, "from_pretrained", load)
    monkeypatch.setattr(Amulet, "embedded", lambda **options: load("the embedded one", **options))
    monkeypatch.setattr(_loading, "_loaded", {})
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "option", [{"dtype": "bfloat16"}, {"device": "cpu"}, {"model_kwargs": {"a": 1}}]
)
def test_options_for_loading_beside_a_loaded_model_are_refused(kind: Any, option: Any) -> None:
    with pytest.raises(RequestError, match="the given amulet is loaded already"):
        kind(amulet=amulet(), **option)


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_two_models_are_refused_and_one_named_twice_is_not(kind: Any) -> None:
    given = amulet()
    with pytest.raises(RequestError, match=r"model='other' and amulet= \('llama'\) are two models"):
        kind(amulet=given, model="other")
    assert kind(amulet=given, model="llama").engine is given
    assert kind(amulet=given).model == "llama"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_amulet_is_refused(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"(?s)amulet.*Amulet"):
        kind(amulet="Qwen/Qwen3-0.6B")
    with pytest.raises(RequestError, match=r"(?s)amulet.*Amulet"):
        kind(amulet=5)


MODEL = ScriptedModel(byte_tokenizer(), "x")
PLACES: list[tuple[Any, str, str]] = [
    ("some/model", "'some/model'", "(model='some/model')"),
    ("embedded", "'embedded'", ".embedded()"),
    ("http://host:8000", "'http://host:8000'", "(amulet=Amulet.connect('http://host:8000'))"),
    (Path("folder"), "<PosixPath>", "(model='folder')"),
    (amulet(), "<Amulet>", "(amulet=...)"),
    (MODEL, "<ScriptedModel>", "(amulet=Amulet(model, tokenizer))"),  # not its repr, which is long
    (SimpleNamespace(llm=1), "<SimpleNamespace>", ".from_...(...)"),
    (5, "<int>", "(model='hub id or folder')"),
]


@pytest.mark.parametrize(("given", "shown", "use"), PLACES, ids=[shown for _, shown, _ in PLACES])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_where_a_model_is_given(
    kind: Any, given: Any, shown: str, use: str, loaded: Any
) -> None:
    name = kind.__name__
    takes = "from_huggingface" if kind is LlamaIndexLLM else "from_pipeline"
    use = f"Use {name}{use.replace('from_...', takes)}."
    with pytest.raises(RequestError) as refused:
        kind(given)
    assert str(refused.value) == f"{name}({shown}): expected every option by its name. {use}"
    if not isinstance(given, str | Path):
        with pytest.raises(RequestError) as refused:
            kind(model=given)
        expected = "expected a hub id, a folder or a GGUF file."
        assert str(refused.value) == f"{name}(model={shown}): {expected} {use}"
    if not isinstance(given, Amulet):
        with pytest.raises(RequestError) as refused:
            kind(amulet=given)
        assert str(refused.value) == f"{name}(amulet={shown}): expected an Amulet. {use}"
    assert loaded == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_a_path(kind: Any, loaded: Any) -> None:
    assert kind(model=Path("some/folder")).model == "some/folder"
    assert loaded == [("some/folder", {})]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_a_models_place_is_not_repeated(kind: Any) -> None:
    text = "Be brief. " * 40
    for wrong in (lambda: kind(text), lambda: kind(amulet=text)):
        with pytest.raises(RequestError, match="<str of 400 characters>") as raised:
            wrong()
        assert "Be brief" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_constructors_that_bring_a_model_take_no_other(kind: Any) -> None:
    with pytest.raises(RequestError, match=r"embedded\(\) takes no model='x'"):
        kind.embedded(model="x")
    with pytest.raises(RequestError, match=r"embedded\(\) takes no amulet="):
        kind.embedded(amulet=amulet())


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_model_under_its_names_and_with_its_options(kind: Any, loaded: Any) -> None:
    first, second = kind.embedded(), kind(model="embedded")
    assert first.amulet is second.amulet
    assert kind.embedded(dtype="bfloat16").amulet is not first.amulet
    assert kind(model="embedded", dtype="bfloat16", model_kwargs={"max_rows": 3}) is not None
    assert loaded == [
        ("the embedded one", {}),
        ("the embedded one", {"dtype": "bfloat16"}),
        ("the embedded one", {"dtype": "bfloat16", "max_rows": 3}),
    ]


def test_frameworks_share_the_weights_of_one_name(loaded: Any) -> None:
    models = [kind(model="some/model", device="cpu") for kind in KINDS]
    assert len({id(model.amulet) for model in models}) == 1
    assert loaded == [("some/model", {"device": "cpu"})]


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_a_configurable_model_is_loaded_and_its_options_too(kind: Any, loaded: Any) -> None:
    chat = kind(model="first/model", preference="Be brief.")
    fields = {name: ConfigurableField(id=name) for name in ("model", "dtype", "temperature")}
    composed = chat.configurable_fields(**fields)
    for config in ({}, {"temperature": 0.5}, {"model": "second/model"}, {"dtype": "float16"}):
        assert composed.invoke("x", {"configurable": config}) is not None
    assert loaded == [
        ("first/model", {}),
        ("second/model", {}),
        ("first/model", {"dtype": "float16"}),
    ]


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_a_given_amulet_stays_with_other_fields(kind: Any) -> None:
    chat = kind(amulet=amulet())
    composed = chat.configurable_fields(temperature=ConfigurableField(id="temperature"))
    answer = composed.invoke("x", {"configurable": {"temperature": 0.0}})
    assert getattr(answer, "content", answer) == "Hello"


HIDDEN = """
import sys
class Hider:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hider())
from amulet import MissingPackageError
try:
    {statement}
except MissingPackageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hidden", "statement", "extra"),
    [
        ("langchain_core", "from amulet_integrations.langchain import ChatAmulet", "langchain"),
        ("langchain_core", "import amulet_integrations.langchain.llms", "langchain"),
        (
            "langchain",
            "from amulet_integrations.langchain import PreferenceMiddleware",
            "langchain",
        ),
        ("langgraph", "from amulet_integrations.langchain import PreferenceMemory", "langchain"),
        ("llama_index", "from amulet_integrations.llama_index import AmuletLLM", "llama-index"),
        ("llama_index", "import amulet_integrations.llama_index.llm", "llama-index"),
    ],
)
def test_a_missing_framework_names_its_pip_command(hidden: str, statement: str, extra: str) -> None:
    script = HIDDEN.format(hidden=(hidden,), statement=statement)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stderr == ""
    assert f'pip install "amulet-integrations[{extra}]"' in ran.stdout


def test_what_can_not_be_loaded_says_what_was_looked_for() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        ChatAmulet(model="/nowhere")
