"""AmuletLLM: prompt in, text out, by the same rules as the chat model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import PromptTemplate

from amulet import Amulet, RequestError
from amulet_integrations.langchain import AmuletLLM
from tests.models import ScriptedModel, byte_tokenizer


def llm(**options: Any) -> AmuletLLM:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"wish A": "a!", "wish B": "b!", "": "plain"})
    return AmuletLLM(amulet=Amulet(model, tokenizer), **options)


@pytest.mark.parametrize(
    ("constructor", "config", "call", "answer"),
    [
        (None, {}, {}, "plain"),
        ("wish A", {}, {}, "a!"),
        ("wish A", {"configurable": {"preference": "wish B"}}, {}, "b!"),
        ("wish A", {"configurable": {"preference": "wish B"}}, {"preference": ""}, "plain"),
        (None, {}, {"preference": "wish B"}, "b!"),
    ],
)
async def test_precedence(
    constructor: str | None, config: Any, call: dict[str, Any], answer: str
) -> None:
    model = llm(preference=constructor)
    chain = PromptTemplate.from_template("{q}\n") | model.bind(**call)
    asked = {"q": "x"}
    assert chain.invoke(asked, config) == answer
    assert await chain.ainvoke(asked, config) == answer
    assert chain.batch([asked, asked], config) == [answer, answer]
    assert await chain.abatch([asked, asked], config) == [answer, answer]
    assert "".join(chain.stream(asked, config)) == answer
    assert "".join([piece async for piece in chain.astream(asked, config)]) == answer
    assert model.with_preference("").invoke("x\n", config) == "plain"


def test_options_and_errors() -> None:
    assert llm(max_tokens=2).invoke("x\n") == "pl"
    assert llm(stop=["in"]).invoke("x\n") == "pla"
    assert llm().invoke("x\n", stop=["i"]) == "pla"
    with pytest.raises(RequestError, match="did you mean temperature"):
        llm(temprature=1)
    with pytest.raises(RequestError, match="did you mean temperature"):
        llm().invoke("x\n", temprature=1)


def test_generate_gives_choices_usage_and_metadata() -> None:
    result = llm(temperature=40.0, max_tokens=6, seed=1).generate(["x\n", "y\n"], n=2)
    assert [len(row) for row in result.generations] == [2, 2]
    assert len({generation.text for row in result.generations for generation in row}) >= 2
    one = llm(preference="wish A").generate(["x\n"])
    info = one.generations[0][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "stop"
    assert info["preference_source"] == "constructor"
    assert info["usage_metadata"]["output_tokens"] == 3
    assert one.llm_output is not None
    assert one.llm_output["token_usage"]["completion_tokens"] == 3


def test_a_stream_calls_back_per_token_and_ends_with_metadata() -> None:
    class Heard(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []
            self.info: Any = None

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.tokens.append(token)

        def on_llm_end(self, response: Any, **_: Any) -> None:
            self.info = response.generations[0][0].generation_info

    heard = Heard()
    assert list(llm().stream("x\n", {"callbacks": [heard]})) == [*"plain", ""]
    assert heard.tokens == [*"plain"]
    assert heard.info["finish_reason"] == "stop"
    assert heard.info["usage_metadata"]["output_tokens"] == 6


def test_token_counts_are_the_models_own() -> None:
    assert llm().get_num_tokens("héllo") == 6
