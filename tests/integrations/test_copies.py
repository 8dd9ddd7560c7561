"""Copies share the loaded model; what can't be stored says so, and leaves the live object whole."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, AmuletError, ModelError, Steering
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from amulet_integrations.llama_index import AmuletLLM as LlamaIndexLLM
from tests.models import random_model

KINDS: dict[str, Callable[[Amulet], Any]] = {
    "amulet": lambda amulet: amulet,
    "chat": lambda amulet: ChatAmulet(amulet=amulet, max_tokens=6),
    "llm": lambda amulet: AmuletLLM(amulet=amulet, max_tokens=6),
    "llama_index": lambda amulet: LlamaIndexLLM(amulet=amulet, max_tokens=6),
}


def ask(model: Any) -> Any:
    if isinstance(model, Amulet):
        return model.complete("Hi", max_new_tokens=6).text
    if isinstance(model, LlamaIndexLLM):
        return model.complete("Hi").text
    answer = model.invoke("Hi")
    return getattr(answer, "content", answer)


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    return KINDS[request.param](Amulet(random_model("llama", seed=3), tokenizer))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_a_copy_answers_alike_and_is_set_apart(model: Any, way: Callable[[Any], Any]) -> None:
    made = way(model)
    assert made is not model
    assert ask(made) == ask(model)
    if isinstance(model, Amulet):
        assert made.model is model.model
        made.steering = Steering(strength=3.0)
    else:
        made.temperature = 0.5
        assert model.temperature is None
    assert getattr(model, "steering", None) != Steering(strength=3.0)


def test_what_can_not_be_pickled_says_so_and_stays_whole(model: Any) -> None:
    before = ask(model)
    for _ in range(2):
        with pytest.raises(AmuletError, match=r"can't be pickled.*from_pretrained"):
            pickle.dumps(model)
        assert ask(model) == before


class State(TypedDict):
    llm: Any
    answer: str


@pytest.mark.parametrize("kind", ["chat", "llm"])
def test_a_chat_model_in_a_checkpoint(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """It comes back as the live object; once that is gone, it is never another model."""
    graph: Any = StateGraph(State)
    graph.add_node("ask", lambda state: {"answer": str(ask(state["llm"]))})
    graph.add_edge(START, "ask")
    graph.add_edge("ask", END)
    app = graph.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}
    # Its name is that of other weights.
    weights: Any = random_model("llama", seed=3)
    weights.config._name_or_path = "somebody/else"
    model = KINDS[kind](Amulet(weights, tokenizer))
    wanted = ask(model)
    assert app.invoke({"llm": model, "answer": ""}, thread)["answer"] == wanted
    again = app.get_state(thread).values["llm"]
    assert ask(again) == wanted
    assert app.invoke({"answer": ""}, thread)["answer"] == wanted
    del model, again, weights
    gc.collect()
    lost = app.get_state(thread).values["llm"]
    with pytest.raises(ModelError, match="checkpoint"):
        ask(lost)
