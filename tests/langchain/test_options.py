"""Options of the wrong kind: always an error that names them, never one of Python's own."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from pydantic import BaseModel

from amulet import Amulet, AmuletError, Preference, RequestError
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.langchain.scripted import preferring, scripted_chat
from tests.models import ScriptedModel, byte_tokenizer


class City(BaseModel):
    """A city."""

    name: str


def llm() -> AmuletLLM:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, "Hello")
    return AmuletLLM(amulet=Amulet(model, tokenizer))


SHARED = (
    *("max_tokens", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n"),
    *("repetition_penalty", "logprobs", "top_logprobs", "preference", "strength", "floor"),
    *("placement", "focus", "loop_guard", "preference_source", "stop"),
)
CHAT = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "template_options")
WRONG: list[Any] = ["5x", [1.5], {"a": 1}, object(), b"x", float("nan"), 10**30, lambda: 1, City]


@pytest.mark.parametrize("way", ["call", "constructor", "bind", "stream", "batch", "generate"])
@pytest.mark.parametrize("kind", ["chat", "llm"])
def test_no_option_of_a_wrong_kind_raises_an_error_of_pythons(kind: str, way: str) -> None:
    model: Any = preferring("A") if kind == "chat" else llm()
    prompts: Any = [[HumanMessage("x")]] * 2 if kind == "chat" else ["x", "x"]
    for name in (*SHARED, *(CHAT if kind == "chat" else ())):
        for value in WRONG:
            option = {name: value}
            try:
                if way == "call":
                    model.invoke("x", **option)
                elif way == "constructor":
                    type(model)(amulet=model.engine, **option)
                elif way == "bind":
                    model.bind(**option).invoke("x")
                elif way == "stream":
                    list(model.stream("x", **option))
                elif way == "batch":
                    model.batch(["x", "x"], **option)
                else:
                    model.generate(prompts, **option)
            except AmuletError:
                continue  # any other error fails the test; some values are valid for some options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": "5x"}, "seed='5x'"),
        ({"seed": -1}, "seed=-1"),
        ({"n": 10**30}, "n=1000000000000000000000000000000: expected a whole number"),
        ({"n": True}, "n=True: expected a whole number"),
        ({"n": "2"}, "n='2': expected a whole number"),
        ({"logprobs": "no"}, "logprobs='no': expected True or False"),
        ({"tools": 5}, "tools=5: expected a list"),
        ({"tools": "ask"}, "tools='ask': expected a list"),
        ({"tool_choice": "any"}, 'tool_choice="any" requires tools'),
        ({"tool_choice": "required"}, 'tool_choice="any" requires tools'),
        ({"tool_choice": True}, 'tool_choice="any" requires tools'),
        ({"tool_choice": "ask"}, "tool_choice='ask': expected .* there are none"),
        ({"tool_choice": ["ask"]}, r"tool_choice=\['ask'\]: expected"),
        ({"tool_choice": {"function": {"name": "ask"}}}, "tool_choice='ask'"),
        ({"tool_choice": "any", "tools": []}, 'tool_choice="any" requires tools'),
        ({"template_options": "x"}, "template_options='x': expected a dict"),
        ({"enable_thinking": "no"}, "enable_thinking='no': expected True or False"),
        ({"stop": (part for part in "ab")}, "stop=.*: expected a non-empty string or a list"),
    ],
)
async def test_the_error_names_the_option(options: dict[str, Any], told: str) -> None:
    model = scripted_chat("Hello")
    with pytest.raises(RequestError, match=told):
        model.invoke("x", **options)
    with pytest.raises(RequestError, match=told):
        await model.ainvoke("x", **options)
    with pytest.raises(RequestError, match=told):
        model.bind(**options).invoke("x")


@pytest.mark.parametrize("config", ["Be brief.", Preference("Be brief."), 5, ["Be brief."], b"x"])
@pytest.mark.parametrize(
    "way", [lambda it: it, lambda it: it.bind(seed=1), lambda it: it.with_retry()]
)
async def test_a_preference_in_the_place_of_the_config_is_told(config: Any, way: Any) -> None:
    model, told = (
        way(scripted_chat("Hello")),
        r"config is a \w+: .* \w+\(\.\.\., preference=\.\.\.\)",
    )
    with pytest.raises(RequestError, match=f"^invoke: {told}"):
        model.invoke("x", config)
    with pytest.raises(RequestError, match=f"^stream: {told}"):
        model.stream("x", config)
    with pytest.raises(RequestError, match=f"^ainvoke: {told}"):
        await model.ainvoke("x", config)
    with pytest.raises(RequestError, match=f"^batch: {told}"):
        model.batch(["x"], config)
    with pytest.raises(RequestError, match=f"^abatch: {told}"):
        await model.abatch(["x"], config)
    with pytest.raises(RequestError, match=f"^batch_as_completed: {told}"):
        list(model.batch_as_completed(["x"], config))


def test_no_tools_and_no_choice_of_one_are_fine() -> None:
    model = scripted_chat("Hello")
    for choice in (None, "auto", "none", False):
        assert model.invoke("x", tool_choice=choice).content == "Hello"


def test_a_seed_written_as_text_is_a_number_and_seeds_wrap() -> None:
    model = scripted_chat("Hello", temperature=30.0, max_tokens=6)
    assert model.invoke("x", seed="5").content == model.invoke("x", seed=5).content
    result = model.generate([[HumanMessage("x")]], seed=2**63 - 1, n=2)
    assert len({one.text for one in result.generations[0]}) == 2


@pytest.mark.parametrize("include_raw", [False, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_refuses_and_passes_on_options(method: Any, include_raw: bool) -> None:
    model = scripted_chat('{"name": "Rome"}')
    options: dict[str, Any] = {"method": method, "include_raw": include_raw}
    with pytest.raises(RequestError, match="colour='red'"):
        model.with_structured_output(City, colour="red", **options)
    structured = model.with_structured_output(City, **options)
    with pytest.raises(RequestError, match="colour='red'"):
        structured.invoke("x", colour="red")
    with pytest.raises(RequestError, match="colour='red'"):
        list(structured.stream("x", colour="red"))
    if include_raw:
        raw = structured.invoke("x", preference="A")["raw"]
        assert raw.response_metadata["preference_source"] == "call"
        cut = structured.invoke("x", max_tokens=2)
        assert cut["parsed"] is None
        assert "max_tokens cut the answer" in str(cut["parsing_error"])


def test_streamed_structured_output_with_raw_ends_as_invoke_does() -> None:
    structured = scripted_chat('{"name": "Rome"}').with_structured_output(City, include_raw=True)
    whole, pieces = structured.invoke("x"), list(structured.stream("x"))
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged + piece
    assert merged["parsed"] == whole["parsed"] == City(name="Rome")
    assert merged["raw"].content == whole["raw"].content
    assert merged["parsing_error"] is whole["parsing_error"] is None


def test_streaming_as_it_was_asked_for() -> None:
    assert len(list(scripted_chat("Hello").stream("x"))) > 5
    assert len(list(scripted_chat("Hello", streaming=False).stream("x"))) == 1
    assert len(list(scripted_chat("Hello", streaming=True).stream("x"))) > 5
    copied = ChatAmulet(
        **{
            **scripted_chat("Hello").model_dump(),
            "amulet": scripted_chat("Hello").engine,
            "model": None,
        }
    )
    assert len(list(copied.stream("x"))) > 5
