"""However a model is composed, nothing that was bound to it is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models import FakeListChatModel
from langchain_core.load import dumpd
from langchain_core.messages import HumanMessage
from langchain_core.prompt_values import ChatPromptValue, StringPromptValue
from langchain_core.runnables import ConfigurableField, RunnableConfig
from pydantic import BaseModel

from amulet import Amulet, RequestError, Steering
from amulet_integrations.langchain import AmuletLLM, ChatAmulet, PreferenceMiddleware
from tests.langchain.scripted import preferring, scripted_chat
from tests.models import ScriptedModel, byte_tokenizer


class City(BaseModel):
    """A city."""

    name: str


def lookup(city: str) -> str:
    """Look a city up."""
    return city


WISH: RunnableConfig = {"configurable": {"preference": "A"}}
FIELD = ConfigurableField(id="wish")

# Each gives the preference, in a way of its own; the last needs the config that `config_of` gives.
GIVES: dict[str, Callable[[Any], Any]] = {
    "bind": lambda model: model.bind(preference="A"),
    "with_config": lambda model: model.with_config(WISH),
    "with_config, by name": lambda model: model.with_config(configurable={"preference": "A"}),
    "with_preference": lambda model: model.with_preference("A"),
    "configurable_fields": lambda model: model.configurable_fields(preference=FIELD),
}
# None of these says anything about the preference.
KEEPS: dict[str, Callable[[Any], Any]] = {
    "bind": lambda model: model.bind(max_tokens=50),
    "with_config": lambda model: model.with_config(tags=["t"]),
    "with_config, a setting": lambda model: model.with_config(configurable={"floor": 0.2}),
    "with_preference": lambda model: model.with_preference(strength=1.5),
    "with_retry": lambda model: model.with_retry(stop_after_attempt=2),
    "with_fallbacks": lambda model: model.with_fallbacks([scripted_chat("fallback")]),
    "with_listeners": lambda model: model.with_listeners(on_start=lambda run: None),
    "with_alisteners": lambda model: model.with_alisteners(),
    "with_types": lambda model: model.with_types(output_type=str),
    "configurable_fields": lambda model: model.configurable_fields(
        max_tokens=ConfigurableField(id="limit")
    ),
    "configurable_alternatives": lambda model: model.configurable_alternatives(
        ConfigurableField(id="which"), default_key="this", other=lambda: scripted_chat("other")
    ),
}
CHAT_KEEPS = {**KEEPS, "bind_tools": lambda model: model.bind_tools([lookup])}


def config_of(given: str) -> dict[str, Any]:
    return {"configurable": {"wish": "A"}} if given == "configurable_fields" else {}


def chat() -> ChatAmulet:
    return preferring("A", "B")


def llm() -> AmuletLLM:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"A\n\n": "A!", "": "plain"})
    return AmuletLLM(amulet=Amulet(model, tokenizer))


CHAT = chat()


def text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer.content)


@pytest.mark.parametrize(("gives", "keeps"), list(product(GIVES, CHAT_KEEPS)))
def test_a_step_between_loses_nothing(gives: str, keeps: str) -> None:
    config: Any = config_of(gives)
    composed = CHAT_KEEPS[keeps](GIVES[gives](CHAT))
    assert composed.invoke("x", config).content == "A!"
    assert composed.bind_tools([lookup]).invoke("x", config).content == "A!"
    if keeps in ("bind_tools", "with_fallbacks"):  # a stock wrapper may have no `with_preference`
        return
    assert composed.with_preference(strength=1.0).invoke("x", config).content == "A!"


@pytest.mark.parametrize(("keeps", "gives"), list(product(CHAT_KEEPS, GIVES)))
def test_nor_does_it_before(keeps: str, gives: str) -> None:
    config: Any = config_of(gives)
    composed = GIVES[gives](CHAT_KEEPS[keeps](CHAT))
    assert composed.invoke("x", config).content == "A!"
    assert composed.bind_tools([lookup]).invoke("x", config).content == "A!"


@pytest.mark.parametrize("first", KEEPS)
def test_nor_do_two(first: str) -> None:
    for second in KEEPS:
        composed = KEEPS[second](KEEPS[first](CHAT.with_config(WISH))).bind_tools([lookup])
        assert composed.invoke("x").content == "A!", second


@pytest.mark.parametrize("gives", GIVES)
async def test_every_way_of_calling_what_was_composed(gives: str) -> None:
    composed = GIVES[gives](chat()).with_listeners(on_start=lambda run: None).bind_tools([lookup])
    config: Any = config_of(gives)
    assert composed.invoke("x", config).content == "A!"
    assert (await composed.ainvoke("x", config)).content == "A!"
    assert "".join(text(piece) for piece in composed.stream("x", config)) == "A!"
    assert "".join([text(piece) async for piece in composed.astream("x", config)]) == "A!"
    assert [text(one) for one in composed.batch(["x", "y"], config)] == ["A!", "A!"]
    assert [text(one) for one in await composed.abatch(["x", "y"], config)] == ["A!", "A!"]
    completed = dict(composed.batch_as_completed(["x", "y"], config))
    assert {position: text(one) for position, one in completed.items()} == {0: "A!", 1: "A!"}
    async for position, one in composed.abatch_as_completed(["x", "y"], config):
        assert position in (0, 1)
        assert text(one) == "A!"
    events = [event async for event in composed.astream_events("x", config, version="v2")]
    assert events[-1]["data"]["output"].content == "A!"
    assert "".join(text(one) for one in composed.transform(iter(["x"]), config)) == "A!"


@pytest.mark.parametrize("gives", [name for name in GIVES if name != "configurable_fields"])
async def test_what_langchain_forwards_to_the_bare_model_keeps_it_too(gives: str) -> None:
    composed = GIVES[gives](chat()).bind_tools([lookup]).with_config(tags=["t"])
    messages = [[HumanMessage("x")], [HumanMessage("y")]]
    prompt: Any = [ChatPromptValue(messages=messages[0])]
    for result in (
        composed.generate(messages),
        await composed.agenerate(messages),
        composed.generate_prompt(prompt),
        await composed.agenerate_prompt(prompt),
    ):
        assert {row[0].text for row in result.generations} == {"A!"}
    given = GIVES[gives](llm()).with_retry()
    for result in (
        given.generate(["x\n", "y\n"]),
        await given.agenerate(["x\n"]),
        given.generate_prompt([StringPromptValue(text="x\n")]),
    ):
        assert {row[0].text for row in result.generations} == {"A!"}


@pytest.mark.parametrize(("gives", "keeps"), list(product(GIVES, KEEPS)))
async def test_the_llm_loses_nothing_either(gives: str, keeps: str) -> None:
    config: Any = config_of(gives)
    model = llm()
    for composed in (KEEPS[keeps](GIVES[gives](model)), GIVES[gives](KEEPS[keeps](model))):
        assert text(composed.invoke("x\n", config)) == "A!"
        assert text(await composed.ainvoke("x\n", config)) == "A!"
        assert "".join(map(text, composed.stream("x\n", config))) == "A!"
        assert [text(one) for one in composed.batch(["x\n"] * 2, config)] == ["A!", "A!"]


class Passing(AgentMiddleware[Any, Any, Any]):
    """Hands every call on as it is."""

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(request)


@pytest.mark.parametrize("middleware", [(), (Passing(),), (PreferenceMiddleware(),)])
@pytest.mark.parametrize(("gives", "keeps"), list(product(GIVES, KEEPS)))
def test_an_agents_model(gives: str, keeps: str, middleware: Any) -> None:
    composed = KEEPS[keeps](GIVES[gives](CHAT))
    agent: Any = create_agent(composed, [lookup], middleware=middleware)
    answer = agent.invoke({"messages": [HumanMessage("x")]}, config_of(gives))["messages"][-1]
    assert answer.content == "A!"


def test_a_bound_setting_adds_to_the_runs_preference() -> None:
    agent: Any = create_agent(chat().with_config(configurable={"strength": 1.0}), [lookup])
    answer = agent.invoke({"messages": [HumanMessage("x")]}, WISH)["messages"][-1]
    assert answer.content == "A!"
    assert answer.response_metadata["strength"] == 1.0


@pytest.mark.parametrize("middleware", [(), (PreferenceMiddleware(),)])
def test_what_is_bound_to_an_agents_model_is_nearer_than_the_run(middleware: Any) -> None:
    agent: Any = create_agent(chat().with_config(WISH), [lookup], middleware=middleware)
    run: Any = {"configurable": {"preference": "B"}}
    assert agent.invoke({"messages": [HumanMessage("x")]}, run)["messages"][-1].content == "A!"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("gives", GIVES)
def test_structured_output_knows_whose_preference_it_does_not_apply(
    gives: str, method: str
) -> None:
    model = scripted_chat('{"name": "Rome"}')
    composed = GIVES[gives](model).with_retry().with_structured_output(City, include_raw=True)
    result = composed.invoke("x", config_of(gives))
    level = {"configurable_fields": "constructor", "bind": "call", "with_preference": "call"}
    assert result["parsed"] == City(name="Rome")
    assert result["raw"].response_metadata["preference_source"] == level.get(gives, "conversation")


def test_a_preference_after_a_preference_replaces_it() -> None:
    composed = chat().bind(preference="B").bind_tools([lookup])
    assert composed.with_preference("A").invoke("x").content == "A!"
    assert composed.with_preference("").invoke("x").content == "plain"
    assert composed.bind(preference="A").invoke("x").content == "A!"
    assert composed.with_preference("A").with_config(WISH).kwargs["preference"] == "A"


def test_retries_and_fallbacks_still_work() -> None:
    model = chat()
    scripted: Any = model.engine.model
    scripted.fail_with = ValueError("once")
    composed = model.with_config(WISH).with_retry(wait_exponential_jitter=False)
    assert composed.bind_tools([lookup]).invoke("x").content == "A!"
    scripted.fail_with = ValueError("once")
    other = scripted_chat("fallback")
    composed = model.with_config(WISH).with_fallbacks([other]).bind_tools([lookup])
    assert composed.with_config(tags=["t"]).invoke("x").content == "fallback"


def test_alternatives_still_switch_and_get_tools_in_their_own_form() -> None:
    class Fake(FakeListChatModel):
        """Says which tools it got, by the name of their class."""

        def bind_tools(self, tools: Any, **_: Any) -> Any:
            return FakeListChatModel(responses=[f"tools: {tools[0].__name__}"])

    composed = (
        chat()
        .configurable_alternatives(
            ConfigurableField(id="which"),
            other=scripted_chat("other"),
            lazy=lambda: scripted_chat("lazy"),
            fake=Fake(responses=["no tools"]),
        )
        .bind_tools([lookup])
    )
    for which, answer in (("other", "other"), ("lazy", "lazy"), ("fake", "tools: lookup")):
        assert composed.invoke("x", {"configurable": {"which": which}}).content == answer
    assert composed.invoke("x", WISH).content == "A!"


def test_configured_fields_still_apply_and_stream_token_by_token() -> None:
    composed = (
        chat()
        .configurable_fields(max_tokens=ConfigurableField(id="limit"))
        .bind_tools([lookup])
        .with_config(WISH)
    )
    assert composed.invoke("x", {"configurable": {"limit": 1}}).content == "A"
    pieces = list(composed.stream("x", {"configurable": {"limit": 50}}))
    assert [piece.content for piece in pieces if piece.content] == ["A", "!"]
    assert [spec.id for spec in composed.config_specs] == ["limit"]


def test_a_binding_is_written_as_langchains_own() -> None:
    written = dumpd(chat().bind(preference="A"))
    assert written["id"] == ["langchain", "schema", "runnable", "RunnableBinding"]
    assert written["kwargs"]["kwargs"] == {"preference": "A"}


# ---- max_tokens has two names


def limited(**options: Any) -> ChatAmulet:
    return scripted_chat("z" * 20, **options)


SPELLINGS = [("max_tokens", "max_new_tokens"), ("max_new_tokens", "max_tokens")]


@pytest.mark.parametrize(("early", "late"), [*SPELLINGS, ("max_new_tokens", "max_new_tokens")])
async def test_the_later_limit_wins_whatever_it_is_called(early: str, late: str) -> None:
    bound = limited(**{early: 3}).bind(**{early: 5})
    assert len(bound.invoke("x").content) == 5
    assert len(bound.invoke("x", **{late: 7}).content) == 7
    assert len((await bound.ainvoke("x", **{late: 7})).content) == 7
    assert len("".join(text(piece) for piece in bound.stream("x", **{late: 7}))) == 7
    assert [len(text(one)) for one in bound.batch(["x", "y"], **{late: 7})] == [7, 7]
    assert len(bound.bind(**{late: 9}).invoke("x").content) == 9
    assert len(bound.bind_tools([lookup], **{late: 9}).invoke("x").content) == 9
    generated = bound.generate([[HumanMessage("x")]], **{late: 7})
    assert len(generated.generations[0][0].text) == 7


def test_both_names_in_one_place_are_refused() -> None:
    both: dict[str, Any] = {"max_tokens": 5, "max_new_tokens": 7}
    model = limited()
    for attempt in (
        lambda: ChatAmulet(amulet=model.engine, **both),
        lambda: model.bind(**both),
        lambda: model.bind(max_tokens=1).bind(**both),
        lambda: model.bind(max_tokens=1).invoke("x", **both),
        lambda: model.invoke("x", **both),
        lambda: model.bind_tools([lookup], **both),
        lambda: list(model.stream("x", **both)),
        lambda: model.batch(["x"], **both),
    ):
        with pytest.raises(RequestError, match="max_tokens and max_new_tokens are one option"):
            attempt()


# ---- what can be read only once


def once() -> Any:
    return (wish for wish in ["A"])


async def test_a_generator_is_no_preference() -> None:
    for model in (chat(), llm()):
        for attempt in (
            lambda m=model: m.invoke("x", preference=once()),
            lambda m=model: m.bind(preference=once()),
            lambda m=model: m.with_preference(once()),
            lambda m=model: m.invoke("x", {"configurable": {"preference": once()}}),
            lambda m=model: type(m)(amulet=m.engine, preference=once()),
            lambda m=model: m.batch(["x"], preference=map(str, ["A"])),
        ):
            with pytest.raises(
                RequestError, match=r"a preference of type (generator|map) can be read"
            ):
                attempt()


def test_equal_preferences_share_a_cached_answer_and_others_do_not() -> None:
    from langchain_core.caches import InMemoryCache

    class Wishes:
        """What can be read again and again, and is written as an address."""

        def __init__(self, *wishes: str) -> None:
            self.wishes = wishes

        def __iter__(self) -> Any:
            return iter(self.wishes)

    tokenizer = byte_tokenizer()
    scripted: Any = ScriptedModel(tokenizer, {"system\nA": "A!", "system\nB": "B!", "": "plain"})
    engine = Amulet(scripted, tokenizer, steering=Steering(placement="system", focus=0))
    model = ChatAmulet(amulet=engine, cache=InMemoryCache())
    for wish in "ABAB":
        assert model.invoke("x", preference=Wishes(wish)).content == f"{wish}!"
    assert model.invoke("x", preference=["A"]).content == "A!"
    prefills = [shape for shape in scripted.calls if shape[1] > 1]
    assert len(prefills) == 2


def test_tools_and_schemas_are_cached_by_what_they_say() -> None:
    from langchain_core.caches import InMemoryCache

    def tool(answer: str) -> Any:
        def ask(city: str) -> str:
            return city

        ask.__doc__ = f"{answer} of a city."
        return ask

    model = scripted_chat({"First": "one", "Second": "two"}, cache=InMemoryCache())
    for answer, said in (("First", "one"), ("Second", "two"), ("First", "one")):
        assert model.invoke("x", tools=[tool(answer)]).content == said
        assert model.invoke("x", tools=iter([tool(answer)])).content == said
    calls: Any = model.engine.model.calls
    assert len([shape for shape in calls if shape[1] > 1]) == 2
