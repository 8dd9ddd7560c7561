"""SmolLM2 end to end: the preference shows, tools and JSON stay intact."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.tools import tool
from pydantic import BaseModel

from amulet_integrations.langchain import ChatAmulet
from tests.langchain.test_chat_model import joined

pytestmark = pytest.mark.slow
WISH = "Answer in one short sentence."


class City(BaseModel):
    city: str
    continent: Literal["Europe", "Asia", "Africa"]


@tool
def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return "It's sunny."


@pytest.fixture(scope="module")
def chat() -> ChatAmulet:
    return ChatAmulet.embedded(tools_prompt="fallback", max_tokens=80)


def test_a_preference_shortens_the_answer_and_streams_the_same(chat: ChatAmulet) -> None:
    question = "What is photosynthesis?"
    plain = chat.invoke(question)
    short = chat.invoke(question, preference=WISH)
    assert plain.response_metadata["finish_reason"] == "length"
    assert short.response_metadata["finish_reason"] == "stop"
    assert short.response_metadata["model_name"] == "SmolLM2-135M-Instruct"
    assert joined(list(chat.stream(question, preference=WISH))).content == short.content


def test_a_forced_tool_and_a_schema_are_not_steered(chat: ChatAmulet) -> None:
    for wish in ("", "Talk like a pirate."):
        bound = chat.bind_tools([get_weather], tool_choice="any").bind(preference=wish)
        calls = bound.invoke("What is the weather in Paris?").tool_calls
        assert [(call["name"], call["args"]) for call in calls] == [
            ("get_weather", {"location": "Paris"})
        ]
        for method in ("json_schema", "function_calling"):
            model: Any = chat.bind(preference=wish).with_structured_output(City, method=method)
            assert model.invoke("Where is Paris?") == City(city="Paris", continent="Europe")
