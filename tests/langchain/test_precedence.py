"""Every source of a preference through every way of calling the model, as one table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.store.memory import InMemoryStore
from pydantic import BaseModel

from amulet import RequestError
from amulet_integrations._preference import choose
from amulet_integrations.langchain import ChatAmulet
from amulet_integrations.langchain.memory import PreferenceMemory, with_memory
from amulet_integrations.langchain.middleware import PreferenceMiddleware
from tests.langchain.scripted import preferring, scripted_chat


class City(BaseModel):
    """A city."""

    name: str


def lookup(city: str) -> str:
    """Look a city up."""
    return city


@dataclass
class Case:
    """One call: the model, and what goes along with it."""

    model: Any
    config: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[BaseMessage]:
        return [HumanMessage("Hi", additional_kwargs=self.stated)]


def model(**options: Any) -> Any:
    return preferring("near", "wrong", **options)


# name: how the source says it, and the level that it counts as. Every level further out says
# "wrong" at the same time.
Source = Callable[[str], Case]
OUTER = {"configurable": {"preference": "wrong"}}
SOURCES: dict[str, tuple[Source, str]] = {
    "call": (
        lambda wish: Case(model(preference="wrong"), OUTER, call={"preference": wish}),
        "call",
    ),
    "bind": (lambda wish: Case(model(preference="wrong").bind(preference=wish), OUTER), "call"),
    "with_preference": (
        lambda wish: Case(model(preference="wrong").with_preference(wish), OUTER),
        "call",
    ),
    "configurable": (
        lambda wish: Case(
            model(preference="wrong"),
            {"configurable": {"preference": wish}},
            {"preference": "wrong"},
        ),
        "conversation",
    ),
    "message": (
        lambda wish: Case(model(preference="wrong"), stated={"preference": wish}),
        "conversation",
    ),
    "constructor": (lambda wish: Case(model(preference=wish)), "constructor"),
}


async def invoke(case: Case) -> AIMessage:
    return case.model.invoke(case.messages, case.config, **case.call)


async def ainvoke(case: Case) -> AIMessage:
    return await case.model.ainvoke(case.messages, case.config, **case.call)


async def chain(case: Case) -> AIMessage:
    prompt = ChatPromptTemplate.from_messages([("placeholder", "{messages}")])
    return (prompt | case.model).invoke({"messages": case.messages}, case.config)


async def parallel(case: Case) -> AIMessage:
    both = RunnableParallel(one=case.model, other=case.model)
    answers = both.invoke(case.messages, case.config)
    assert answers["one"].content == answers["other"].content
    return answers["one"]


async def a_lambda(case: Case) -> AIMessage:
    inner = case.model
    return RunnableLambda(lambda messages: inner.invoke(messages)).invoke(
        case.messages, case.config
    )


async def bind_tools(case: Case) -> AIMessage:
    return case.model.bind_tools([lookup]).invoke(case.messages, case.config, **case.call)


async def with_retry(case: Case) -> AIMessage:
    return case.model.with_retry().invoke(case.messages, case.config, **case.call)


async def with_fallbacks(case: Case) -> AIMessage:
    return case.model.with_fallbacks([model()]).invoke(case.messages, case.config, **case.call)


async def with_config(case: Case) -> AIMessage:
    return case.model.with_config(tags=["t"]).invoke(case.messages, case.config, **case.call)


async def batch(case: Case) -> AIMessage:
    first, second = case.model.batch([case.messages] * 2, case.config, **case.call)
    assert first.content == second.content
    return first


async def abatch(case: Case) -> AIMessage:
    first, second = await case.model.abatch([case.messages] * 2, case.config, **case.call)
    assert first.content == second.content
    return first


async def stream(case: Case) -> Any:
    pieces = list(case.model.stream(case.messages, case.config, **case.call))
    assert len(pieces) > 2
    return sum(pieces[1:], pieces[0])


async def astream(case: Case) -> Any:
    pieces = [piece async for piece in case.model.astream(case.messages, case.config, **case.call)]
    assert len(pieces) > 2
    return sum(pieces[1:], pieces[0])


async def astream_events(case: Case) -> Any:
    events = case.model.astream_events(case.messages, case.config, version="v2", **case.call)
    ended = [event async for event in events if event["event"] == "on_chat_model_end"]
    return ended[0]["data"]["output"]


async def agent(case: Case) -> AIMessage:
    return create_agent(case.model, [lookup]).invoke({"messages": case.messages}, case.config)[
        "messages"
    ][-1]


async def agent_with_middleware(case: Case) -> AIMessage:
    answering = create_agent(case.model, middleware=[PreferenceMiddleware()])
    return (await answering.ainvoke({"messages": case.messages}, case.config))["messages"][-1]


def graph(case: Case) -> Any:
    inner = case.model

    def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [inner.invoke(state["messages"])]}

    built = StateGraph(MessagesState).add_node("answer", answer).add_edge(START, "answer")
    return built.compile()


async def node(case: Case) -> AIMessage:
    return graph(case).invoke({"messages": case.messages}, case.config)["messages"][-1]


async def subgraph(case: Case) -> AIMessage:
    outer = StateGraph(MessagesState).add_node("inner", graph(case)).add_edge(START, "inner")
    return outer.compile().invoke({"messages": case.messages}, case.config)["messages"][-1]


async def node_stream(case: Case) -> Any:
    stream = graph(case).stream({"messages": case.messages}, case.config, stream_mode="messages")
    pieces = [piece for piece, _ in stream]
    assert len(pieces) > 2  # tokens, not one message
    return sum(pieces[1:], pieces[0])


SURFACES: dict[str, Callable[[Case], Awaitable[Any]]] = {
    surface.__name__: surface
    for surface in (
        *(invoke, ainvoke, chain, parallel, a_lambda, bind_tools, with_retry, with_fallbacks),
        *(with_config, batch, abatch, stream, astream, astream_events),
        *(agent, agent_with_middleware, node, subgraph, node_stream),
    )
}
# A keyword of the call reaches a model that is called by oneself; inside these it is `bind`'s.
NO_KEYWORDS = {"chain", "parallel", "a_lambda", "agent", "agent_with_middleware"}
NO_KEYWORDS |= {"node", "subgraph", "node_stream"}
TABLE = [
    (source, surface)
    for source in SOURCES
    for surface in SURFACES
    if source != "call" or surface not in NO_KEYWORDS
]


@pytest.mark.parametrize(("source", "surface"), TABLE)
async def test_a_preference_reaches_the_answer(source: str, surface: str) -> None:
    build, level = SOURCES[source]
    answer = await SURFACES[surface](build("near"))
    assert answer.content == "near!"
    assert answer.response_metadata["preference_source"] == level
    assert answer.response_metadata["strength"] == 2.0


@pytest.mark.parametrize(("source", "surface"), TABLE)
async def test_off_is_an_answer(source: str, surface: str) -> None:
    build, level = SOURCES[source]
    answer = await SURFACES[surface](build(""))
    assert answer.content == "plain"
    assert answer.response_metadata["preference_source"] == level
    assert answer.response_metadata["strength"] is None


@pytest.mark.parametrize("wish", ["near", ""])
@pytest.mark.parametrize("source", [name for name in SOURCES if name != "call"])
async def test_structured_output_knows_the_preference_and_is_not_steered(
    source: str, wish: str
) -> None:
    build, level = SOURCES[source]
    case = build(wish)
    answers = {"system\nnear": '{"name": "Nice"}', "system\nwrong": "wrong", "": '{"name": "Rome"}'}
    inner = getattr(case.model, "bound", case.model)
    inner.amulet = scripted_chat(answers).amulet
    structured = case.model.with_structured_output(City, include_raw=True)
    result = structured.invoke(case.messages, case.config)
    assert result["parsed"] == City(name="Rome")
    assert result["raw"].response_metadata["preference_source"] == level


# ---- a key that nobody reads ----


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("preferance", "preference"),
        ("preferences", "preference"),
        ("amulet_preference", "preference"),
        ("Preference", "preference"),
        ("strenght", "strength"),
        ("placment", "placement"),
    ],
)
async def test_a_misspelt_key_of_the_config_is_told(key: str, meant: str) -> None:
    config: Any = {"configurable": {key: "near"}}
    told = f"the key '{key}' is not used; did you mean '{meant}'"
    chat = preferring("near")
    with pytest.warns(UserWarning, match=told):
        chat.invoke("Hi", config)
    with pytest.warns(UserWarning, match=told):
        await chat.ainvoke("Hi", config)
    with pytest.warns(UserWarning, match=told):
        list(chat.stream("Hi", config))
    with pytest.warns(UserWarning, match=told):
        (RunnableLambda(lambda text: text) | chat).batch(["Hi"], config)


def test_keys_of_other_components_pass() -> None:
    others = ("thread_id", "user_id", "session_id", "checkpoint_ns", "model", "reference", "length")
    config: Any = {"configurable": {**dict.fromkeys(others, "x"), "preference": "near"}}
    assert preferring("near").invoke("Hi", config).response_metadata["preference_source"]


def test_a_misspelt_key_of_a_message_or_a_context_is_told() -> None:
    message = HumanMessage("Hi", additional_kwargs={"preferance": "near"})
    with pytest.warns(UserWarning, match="additional_kwargs: the key 'preferance' is not used"):
        preferring("near").invoke([message])
    agent = create_agent(preferring("near"), middleware=[PreferenceMiddleware()])
    with pytest.warns(UserWarning, match="the run's context: the key 'preferance' is not used"):
        agent.invoke({"messages": "Hi"}, context={"preferance": "near"})


async def test_a_warning_points_to_the_line_that_made_the_call() -> None:
    """However many frames of ours and of the frameworks are between."""
    chat, config = preferring("near"), {"configurable": {"preferance": "near"}}
    chain = ChatPromptTemplate.from_template("{it}") | chat.with_retry()
    agent = create_agent(preferring("near"), middleware=[PreferenceMiddleware()])
    calls: list[Callable[[], Any]] = [
        lambda: chat.invoke("Hi", config),
        lambda: chat.batch(["Hi"], config),
        lambda: list(chat.stream("Hi", config)),
        lambda: chain.invoke({"it": "Hi"}, config),
        lambda: agent.invoke({"messages": "Hi"}, config),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="preferance") as told:
            call()
        places = {(each.filename, each.lineno) for each in told}
        assert places == {(__file__, call.__code__.co_firstlineno)}
    with pytest.warns(UserWarning, match="preferance") as told:
        await chat.ainvoke("Hi", config)
    assert {each.filename for each in told} == {__file__}


def test_a_key_that_probably_means_a_missing_id_is_told() -> None:
    memory = PreferenceMemory(InMemoryStore())
    chat = with_memory(preferring("near"), memory)
    for key, told in (("user", "user_id"), ("userid", "user_id"), ("session", "session_id")):
        with pytest.warns(UserWarning, match=f"'{key}' is not used; did you mean '{told}'"):
            chat.invoke("Hi", {"configurable": {key: "anna"}})
    chat.invoke("Hi", {"configurable": {"user_id": "anna", "user": "x", "thread_id": "1"}})
    agent = create_agent(
        preferring("near"), middleware=[PreferenceMiddleware()], store=InMemoryStore()
    )
    with pytest.warns(UserWarning, match="the run's context: the key 'user' is not used"):
        agent.invoke({"messages": "Hi"}, context={"user": "anna"})
    with pytest.warns(UserWarning, match="the key 'userid' is not used"):
        agent.invoke({"messages": "Hi"}, {"configurable": {"userid": "anna"}})


def test_the_middleware_refuses_in_its_own_name() -> None:
    with pytest.raises(
        RequestError, match="PreferenceMiddleware does not know the option strenght"
    ):
        PreferenceMiddleware("near", strenght=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("surface", SURFACES)
async def test_settings_are_looked_up_once_per_answer(
    surface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(model(preference="wrong").with_preference("near"), OUTER)
    looked: list[None] = []

    def counted(**levels: Any) -> Any:
        looked.append(None)
        return choose(**levels)

    monkeypatch.setattr("amulet_integrations.langchain.options.choose", counted)
    assert (await SURFACES[surface](case)).content == "near!"
    two = ("parallel", "batch", "abatch", "with_fallbacks")  # answers; the last makes a model
    assert len(looked) == (2 if surface in two else 1)


async def test_what_was_looked_up_can_not_be_forged() -> None:
    with pytest.raises(RequestError, match="chosen: leave it out"):
        model().invoke("Hi", chosen={"preference": "near"})


class Invoking(ChatAmulet):
    """A subclass that adds settings where it is called."""

    def invoke(self, input: Any, config: Any = None, **options: Any) -> Any:
        return super().invoke(input, config, **{**options, "preference": "near"})

    async def ainvoke(self, input: Any, config: Any = None, **options: Any) -> Any:
        return await super().ainvoke(input, config, **{**options, "preference": "near"})


class Generating(ChatAmulet):
    """A subclass that adds them where it decodes."""

    def _generate(self, *args: Any, **options: Any) -> Any:
        return super()._generate(*args, **{**options, "preference": "near"})

    async def _agenerate(self, *args: Any, **options: Any) -> Any:
        return await super()._agenerate(*args, **{**options, "preference": "near"})


@pytest.mark.parametrize("kind", [Invoking, Generating])
async def test_what_a_subclass_adds_is_the_nearest(kind: type[ChatAmulet]) -> None:
    chat = kind(amulet=preferring("near", "wrong").amulet)
    answers = [chat.invoke("Hi", preference="wrong", strength=1.0)]
    answers += chat.batch(["Hi", "Hi"], OUTER, strength=1.0)
    answers += await chat.abatch(["Hi"], OUTER, strength=1.0)
    for answer in answers:
        assert answer.content == "near!"
        assert answer.response_metadata["preference_source"] == "call"
        assert answer.response_metadata["strength"] == 1.0
