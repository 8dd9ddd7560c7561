"""LangChain's caches never give one user's answer to another."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import BaseCache, InMemoryCache
from langchain_core.load import dumps, loads
from langchain_core.messages import HumanMessage

from amulet import Amulet, Preference, Steering
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.models import ScriptedModel, byte_tokenizer, random_model

ANSWERS = {"system\nA": "A!", "system\nB": "B!", "": "plain"}


class SQLiteCache(BaseCache):
    """What the community's SQLite cache does, in twenty lines: keys and answers as text."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, check_same_thread=False)
        self.connection.execute("create table if not exists answers (prompt, llm, answer)")

    def lookup(self, prompt: str, llm_string: str) -> Any:
        found = self.connection.execute(
            "select answer from answers where prompt = ? and llm = ?", (prompt, llm_string)
        ).fetchone()
        return loads(found[0], allowed_objects="core") if found else None

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Any]) -> None:
        row = (prompt, llm_string, dumps(list(return_val)))
        self.connection.execute("insert into answers values (?, ?, ?)", row)

    def clear(self, **_: Any) -> None:
        self.connection.execute("delete from answers")


# `loads` is what the community's cache uses
pytestmark = pytest.mark.filterwarnings("ignore:The function `loads`")


@pytest.fixture(params=["memory", "sqlite"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "memory":
        yield InMemoryCache()
        return
    kept = SQLiteCache(tmp_path / "cache.db")
    yield kept
    kept.connection.close()


def models(cache: BaseCache) -> list[Any]:
    tokenizer = byte_tokenizer()
    llm: Any = ScriptedModel(tokenizer, {"A\n\n": "A!", "B\n\n": "B!", "": "plain"})
    chat: Any = ScriptedModel(tokenizer, ANSWERS)
    return [
        ChatAmulet(
            amulet=Amulet(chat, tokenizer, steering=Steering(placement="system")), cache=cache
        ),
        AmuletLLM(amulet=Amulet(llm, tokenizer), cache=cache),
    ]


def calls(model: Any) -> int:
    count = len(model.engine.model.calls)
    model.engine.model.calls.clear()
    return count


@pytest.mark.parametrize("index", [0, 1])
async def test_a_hit_only_where_everything_is_the_same(cache: BaseCache, index: int) -> None:
    model = models(cache)[index]
    configs: list[Any] = [
        {},
        {"configurable": {"preference": "A"}},
        {"configurable": {"preference": "B"}},
        {"configurable": {"preference": "A", "strength": 1.0}},
        {"configurable": {"preference": "A", "floor": 0.5}},
        {"configurable": {"preference": "A", "placement": "user"}},
    ]
    options: list[dict[str, Any]] = [
        {"preference": "A"},
        {"preference": Preference("A", weight=0.5)},
        {"temperature": 0.01},
        {"temperature": 0.01, "top_k": 1},
        {"temperature": 0.01, "top_p": 0.5},
        {"temperature": 0.01, "min_p": 0.5},
        {"temperature": 0.01, "seed": 1},
        {"repetition_penalty": 1.01},
        {"max_tokens": 2},
        {"stop": ["!"]},
        {"logprobs": True},
        {"n": 2},
    ]
    asked = [(config, {}) for config in configs] + [({}, option) for option in options]
    first = []
    for config, option in asked:
        first.append(model.invoke("x\n", config, **option))
        assert calls(model) > 0, (config, option)
    for (config, option), answer in zip(asked, first, strict=True):
        assert text(model.invoke("x\n", config, **option)) == text(answer)
        assert text(await model.ainvoke("x\n", config, **option)) == text(answer)
        assert calls(model) == 0, (config, option)
    model.batch(["x\n", "x\n"], configs[1:3])
    assert calls(model) == 0


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.content)


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_constructors_differ_as_calls_do(cache: BaseCache, kind: type[Any]) -> None:
    tokenizer = byte_tokenizer()
    scripted: Any = ScriptedModel(tokenizer, ANSWERS)
    amulet = Amulet(scripted, tokenizer)
    variants: list[dict[str, Any]] = [
        *({}, {"preference": "A"}, {"preference": "B"}, {"preference": "A", "strength": 1.0}),
        *({"temperature": 0.01}, {"max_tokens": 2}, {"stop": ["!"]}),
    ]
    if kind is ChatAmulet:
        variants.append({"template_options": {"enable_thinking": False}})
        variants.append({"output_version": "v1"})  # its content is a list
    for variant in variants:
        model = kind(amulet=amulet, cache=cache, **variant)
        model.invoke("x\n")
        assert calls(model) > 0, variant
        kind(amulet=amulet, cache=cache, **variant).invoke("x\n")
        assert calls(model) == 0, variant
    pinned = kind(amulet=amulet, cache=cache).with_preference("")
    pinned.invoke("x\n", {"configurable": {"preference": "B"}})
    assert calls(pinned) > 0


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_models_of_one_name_with_other_weights_are_told_apart(
    cache: BaseCache, kind: type[Any]
) -> None:
    answers = []
    for seed in (0, 1):
        amulet = Amulet(random_model("qwen2", seed=seed), byte_tokenizer())
        model = kind(amulet=amulet, cache=cache, max_tokens=8)
        answers.append(text(model.invoke("x\n")))
    assert answers[0] != answers[1]


def test_a_preference_stated_in_the_history_is_part_of_the_key(cache: BaseCache) -> None:
    model = models(cache)[0]
    for wish, answer in (("A", "A!"), ("B", "B!"), (None, "plain")):
        stated = {"preference": wish} if wish else {}
        assert model.invoke([HumanMessage("x", additional_kwargs=stated)]).content == answer


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
def test_an_answer_of_other_weights_is_no_hit(cache: BaseCache, kind: type[Any]) -> None:
    """Loaded, rounded or edited weights of one name; the same ones are found again."""
    tokenizer = byte_tokenizer()

    def ask(model: Any) -> str:
        return text(kind(amulet=Amulet(model, tokenizer), cache=cache, max_tokens=8).invoke("x"))

    models = [random_model("llama", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    for model, pack in zip(models, ("int8", "int8"), strict=True):
        pack_linears(model, pack)  # type: ignore[arg-type]
    assert ask(models[0]) != ask(models[1])
    plain = random_model("llama", seed=0)
    first = ask(plain)
    plain.load_state_dict(random_model("llama", seed=2).state_dict())
    assert ask(plain) != first
    plain.load_state_dict(random_model("llama", seed=0).state_dict())
    calls: list[int] = []
    plain.get_input_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    assert ask(plain) == first
    assert not calls
