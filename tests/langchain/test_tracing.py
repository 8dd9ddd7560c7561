"""What LangSmith is sent of a steered answer: its settings, but nowhere the preference's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from langchain.agents import create_agent
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langsmith import Client, tracing_context

from amulet import Amulet, Preference
from amulet_integrations._preference import Chosen, choose, digest
from amulet_integrations.langchain import AmuletLLM, ChatAmulet, PreferenceMiddleware
from tests.langchain.scripted import scripted_chat
from tests.models import ScriptedModel, byte_tokenizer

WISH = "secret wish"


class Sent(requests.Session):
    """Stands in for LangSmith's server, and keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[dict[str, Any]] = []

    def request(self, method: Any, url: Any, *_: Any, **options: Any) -> requests.Response:
        self.bodies.append(json.loads(options["data"]))
        response = requests.Response()
        response.status_code = 202
        return response

    @property
    def models(self) -> list[dict[str, Any]]:
        """The metadata of the models' calls, each by its last message."""
        runs = {run["id"]: run for run in self.bodies if run.get("run_type") == "llm"}
        return [run["extra"]["metadata"] for run in runs.values()]


@contextmanager
def langsmith() -> Iterator[Sent]:
    """Trace the block's runs, and give what was sent."""
    sent = Sent()
    where = "http://langsmith.invalid"
    client = Client(where, api_key="k", session=sent, auto_batch_tracing=False, info={})
    with tracing_context(enabled=True, client=client):
        yield sent
    assert sent.models
    assert WISH not in json.dumps(sent.bodies)


def chat(**options: Any) -> ChatAmulet:
    return scripted_chat("hello", **options)


def llm(**options: Any) -> AmuletLLM:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, "hello")
    return AmuletLLM(amulet=Amulet(model, tokenizer), **options)


WAYS: dict[str, Callable[[Any], Any]] = {
    "call": lambda model: model().invoke("x\n", preference=WISH),
    "stream": lambda model: list(model().stream("x\n", preference=WISH)),
    "batch": lambda model: model().batch(["x\n", "y\n"], preference=WISH),
    "bound": lambda model: model().bind(preference=WISH).invoke("x\n"),
    "pinned": lambda model: model().with_preference(WISH).invoke("x\n"),
    "constructor": lambda model: model(preference=WISH).invoke("x\n"),
    "conversation": lambda model: model().invoke("x\n", {"configurable": {"preference": [WISH]}}),
    "weighted": lambda model: model().invoke("x\n", preference=[Preference(WISH, 0.5), "other"]),
}


@pytest.mark.parametrize("model", [chat, llm])
@pytest.mark.parametrize("way", WAYS)
def test_settings_are_metadata_and_the_text_is_nowhere(model: Any, way: str) -> None:
    with langsmith() as sent:
        WAYS[way](model)
    preference = [{"text": WISH, "weight": 0.5}, "other"] if way == "weighted" else WISH
    sources = {"conversation": "conversation", "constructor": "constructor"}
    for metadata in sent.models:
        settings = {key: metadata[key] for key in metadata if key.startswith("amulet_")}
        assert settings == {
            "amulet_preference": digest(preference),
            "amulet_preference_source": sources.get(way, "call"),
            "amulet_strength": 2.0 if model is chat else 0.35,
            "amulet_floor": 0.1,
            "amulet_placement": "system" if model is chat else "user",
            "amulet_focus": 1.0,
            "amulet_loop_guard": 4,
        }
        assert metadata["ls_provider"] == "amulet"


async def test_async_calls_are_traced_as_well() -> None:
    with langsmith() as sent:
        for model in (chat(), llm()):
            await model.ainvoke("x\n", preference=WISH, strength=0.5)
            assert [piece async for piece in model.astream("x\n", preference=WISH, strength=0.5)]
    assert [metadata["amulet_strength"] for metadata in sent.models] == [0.5] * 4


@pytest.mark.parametrize("model", [chat, llm])
def test_a_plain_answer_has_no_strength(model: Any) -> None:
    with langsmith() as sent:
        model().invoke("x")
        model(preference=WISH).invoke("x", preference="")
    assert len(sent.models) == 2
    assert [key for one in sent.models for key in one if key.startswith("amulet_")] == []


def test_in_a_chain_and_an_agent() -> None:
    chain = ChatPromptTemplate.from_template("{q}") | chat() | StrOutputParser()
    asked = {"configurable": {"preference": [WISH]}}  # a text would be LangChain's own metadata
    with langsmith():
        chain.invoke({"q": "x"}, asked)
    agent = create_agent(chat(), middleware=[PreferenceMiddleware()])
    said: Any = {"messages": "x"}
    with langsmith() as sent:
        agent.invoke(said, context={"preference": WISH})
    assert sent.models[0]["amulet_strength"] == 2.0


def test_a_digest_tells_preferences_apart_without_showing_them() -> None:
    assert digest(None) is None
    assert digest("") == digest([]) == ""
    assert digest("A") == digest(["A"]) == digest(Preference("A")) != digest("B")
    assert digest("A") != digest(["A", "B"])
    chosen = choose(call={"preference": WISH, "strength": "wrong"})
    assert chosen.preference == WISH
    assert WISH not in repr(chosen) + str(chosen) + chosen.model_dump_json(warnings=False)
    assert repr(Chosen(preference="A")) != repr(Chosen(preference="B"))
