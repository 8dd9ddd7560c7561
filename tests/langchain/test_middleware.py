"""`PreferenceMiddleware` and `remember_preference` in agents, over a scripted model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware, wrap_model_call
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.store.memory import InMemoryStore
from langgraph.store.sqlite import AsyncSqliteStore
from pydantic import BaseModel

from amulet import Preference, RequestError
from amulet_integrations.langchain.memory import PreferenceMemory
from amulet_integrations.langchain.middleware import (
    PreferenceMiddleware,
    remember_preference,
    state_settings,
)
from tests.langchain.scripted import preferring, scripted_chat, tool_call_text


@dataclass
class DataContext:
    user_id: str | None = None
    preference: str | None = None
    strength: float | None = None


class PydanticContext(BaseModel):
    user_id: str | None = None
    preference: str | None = None
    strength: float | None = None


def last(result: dict[str, Any]) -> AIMessage:
    message = result["messages"][-1]
    assert isinstance(message, AIMessage)
    return message


def told(message: AIMessage) -> tuple[str, Any, Any]:
    """The answer, whose preference it followed, and how strongly."""
    metadata = message.response_metadata
    return str(message.content), metadata["preference_source"], metadata["strength"]


def agent(*args: Any, middleware: Any = None, **options: Any) -> Any:
    model = preferring("call", "thread", "user", "middleware", "model", preference="model")
    return create_agent(
        *(args or (model,)), middleware=[middleware or PreferenceMiddleware()], **options
    )


@pytest.mark.parametrize("kind", [dict, DataContext, PydanticContext])
def test_the_context_gives_settings_and_the_user(kind: Any) -> None:
    store = InMemoryStore()
    PreferenceMemory(store).set("user", user_id="anna", strength=3.0)
    answering = agent(store=store, context_schema=kind if kind is not dict else None)

    def ask(**context: Any) -> tuple[str, Any, Any]:
        return told(last(answering.invoke({"messages": "Hi"}, context=kind(**context))))

    assert ask() == ("model!", "constructor", 2.0)
    assert ask(user_id="ben") == ("model!", "constructor", 2.0)
    assert ask(user_id="anna") == ("user!", "user", 3.0)
    assert ask(user_id="anna", preference="call") == ("call!", "call", 3.0)
    assert ask(user_id="anna", preference="") == ("plain", "call", None)


LEVELS = ("call", "configurable", "state", "message", "thread", "user", "middleware")
SAID = {"configurable": "thread", "state": "thread", "message": "thread"}
SOURCE = {"call": "call", "user": "user", "middleware": "call"}


@pytest.mark.parametrize("nearest", range(len(LEVELS)))
@pytest.mark.parametrize("off", [False, True])
def test_the_nearest_level_wins(nearest: int, off: bool) -> None:
    """Every level from `nearest` outwards says something; `off`: the nearest says "off"."""
    given = dict.fromkeys(LEVELS[nearest:], "wrong")
    level = LEVELS[nearest]
    given[level] = "" if off else SAID.get(level, level)
    memory = PreferenceMemory(InMemoryStore())
    for name, ids in [("user", {"user_id": "anna"}), ("thread", {"thread_id": "t"})]:
        if name in given:
            memory.set(given[name], **ids)
    answering = agent(store=memory.store, middleware=PreferenceMiddleware(given.get("middleware")))
    stated = {"preference": given["message"]} if "message" in given else {}
    inputs = {"messages": [HumanMessage("Hi", additional_kwargs=stated)]}
    if "state" in given:
        inputs["preference"] = given["state"]
    config = {"configurable": {"thread_id": "t"}}
    if "configurable" in given:
        config["configurable"]["preference"] = given["configurable"]
    context = {"user_id": "anna", "preference": given.get("call")}

    answer = last(answering.invoke(inputs, config, context=context))
    content, source, _ = told(answer)
    assert content == ("plain" if off else f"{given[level]}!")
    assert source == SOURCE.get(level, "conversation")


def test_each_setting_comes_from_its_own_nearest_level() -> None:
    store = InMemoryStore()
    PreferenceMemory(store).set("user", user_id="anna", strength=1.0, floor=0.2)
    answering = agent(store=store, middleware=PreferenceMiddleware(placement="user"))
    config = {"configurable": {"user_id": "anna", "strength": 5.0}}
    metadata = last(
        answering.invoke({"messages": "Hi", "floor": 0.3}, config, context={"strength": 4.0})
    ).response_metadata
    assert [metadata[name] for name in ("strength", "floor", "placement")] == [4.0, 0.3, "user"]


def test_without_a_preference_anywhere_nothing_is_changed() -> None:
    seen = []

    @wrap_model_call
    def look(request: Any, handler: Any) -> Any:
        seen.append(request.model_settings)
        return handler(request)

    plain = create_agent(
        FakeListChatModel(responses=["hi"]), middleware=[PreferenceMiddleware(), look]
    )
    assert last(plain.invoke({"messages": "Hi"})).content == "hi"
    assert seen == [{}]


def test_a_model_that_cannot_be_steered_is_an_error() -> None:
    other = create_agent(FakeListChatModel(responses=["hi"]), middleware=[PreferenceMiddleware()])
    with pytest.raises(
        RequestError, match=r"FakeListChatModel, which can't be steered.*ChatAmulet"
    ):
        other.invoke({"messages": "Hi"}, context={"preference": "Be brief."})
    with pytest.raises(RequestError, match="strength is in force"):
        other.invoke({"messages": "Hi", "strength": 1.0})


def test_a_setting_of_an_outer_middleware_is_the_calls() -> None:
    @wrap_model_call
    def outer(request: Any, handler: Any) -> Any:
        return handler(request.override(model_settings={"preference": "call", "max_tokens": 2}))

    model = preferring("call", "user")
    answering = create_agent(model, middleware=[outer, PreferenceMiddleware("user")])
    assert told(last(answering.invoke({"messages": "Hi"}))) == ("ca", "call", 2.0)


def test_an_empty_user_id_is_refused() -> None:
    answering = agent(store=InMemoryStore())
    with pytest.raises(RequestError, match="user_id=''"):
        answering.invoke({"messages": "Hi"}, context={"user_id": ""})


@pytest.mark.parametrize("wrong", [{"strength": 5000.0}, {"preference": 7}])
def test_a_wrong_setting_is_refused_before_decoding(wrong: Any) -> None:
    with pytest.raises(RequestError):
        agent().invoke({"messages": "Hi"}, context=wrong)
    if "preference" in wrong:
        with pytest.raises(RequestError, match="a preference of type int"):
            PreferenceMiddleware(**wrong)


async def test_users_at_the_same_time_get_their_own() -> None:
    names = [f"user{number}" for number in range(8)]
    store = InMemoryStore()
    for name in names:
        PreferenceMemory(store).set(name, user_id=name)
    answering = create_agent(
        preferring(*reversed(names)), middleware=[PreferenceMiddleware()], store=store
    )
    results = await asyncio.gather(
        *(answering.ainvoke({"messages": "Hi"}, context={"user_id": name}) for name in names)
    )
    assert [last(result).content for result in results] == [f"{name}!" for name in names]


async def test_an_async_store() -> None:
    async with AsyncSqliteStore.from_conn_string(":memory:") as store:
        await store.setup()
        await PreferenceMemory(store).aset("user", user_id="anna")
        answering = agent(store=store)
        result = await answering.ainvoke({"messages": "Hi"}, context={"user_id": "anna"})
    assert told(last(result)) == ("user!", "user", 2.0)


def test_what_is_stated_in_a_thread_stays_there() -> None:
    answering = agent(checkpointer=InMemorySaver())

    def ask(thread: str, **state: Any) -> tuple[str, Any]:
        result = answering.invoke(
            {"messages": "Hi", **state}, {"configurable": {"thread_id": thread}}
        )
        return str(last(result).content), result["preference"]

    wish = Preference("thread", 1.0)
    assert ask("one", preference=[wish]) == ("thread!", ["thread"])
    assert ask("one") == ("thread!", ["thread"])
    assert ask("two") == ("model!", [])
    assert ask("one", preference="") == ("plain", "")
    assert ask("one") == ("plain", "")
    assert ask("one", preference=None) == ("model!", [])


def remembering(
    scope: Any, *, replace: bool = False, wish: str = "user wish", **options: Any
) -> Any:
    """An agent whose model calls the tool once and then answers by what is in force."""
    call = tool_call_text("remember_preference", preference=wish, replace=replace)
    model = scripted_chat(
        {
            "system\nUser wish.": "user!",
            "Remembered.": "plain",
            "Forgotten.": "plain",
            "too long": "plain",
            "from now on": call,
            "": "plain",
        },
        max_tokens=1000,
    )
    return create_agent(
        model, [remember_preference(scope)], middleware=[PreferenceMiddleware()], **options
    )


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_remembering_for_the_user_holds_at_once_and_everywhere(asynchronous: bool) -> None:
    store = InMemoryStore()
    answering = remembering("user", store=store, checkpointer=InMemorySaver())

    async def ask(text: str, thread: str, user: str) -> dict[str, Any]:
        config = {"configurable": {"thread_id": thread}}
        options = {"config": config, "context": {"user_id": user}}
        if asynchronous:
            return await answering.ainvoke({"messages": text}, **options)
        return answering.invoke({"messages": text}, **options)

    first = await ask("So from now on", "t1", "anna")
    kinds = [message.type for message in first["messages"]]
    assert kinds == ["human", "ai", "tool", "ai"]
    assert first["messages"][1].tool_calls[0]["args"] == {
        "preference": "user wish",
        "replace": False,
    }
    assert told(last(first)) == ("user!", "user", 2.0)
    assert first["preference"] == []
    assert PreferenceMemory(store).list(user_id="anna") == {None: {"preference": ["User wish."]}}

    assert last(await ask("Hi", "t2", "anna")).content == "user!"
    assert last(await ask("Hi", "t3", "ben")).content == "plain"


def test_remembering_for_the_thread_holds_at_once_and_only_there() -> None:
    store = InMemoryStore()
    answering = remembering("thread", store=store, checkpointer=InMemorySaver())

    def ask(text: str, thread: str) -> dict[str, Any]:
        return answering.invoke({"messages": text}, {"configurable": {"thread_id": thread}})

    first = ask("So from now on", "t1")
    assert told(last(first)) == ("user!", "conversation", 2.0)
    assert first["preference"] == ["User wish."]
    assert last(ask("Hi", "t1")).content == "user!"
    assert last(ask("Hi", "t2")).content == "plain"
    assert PreferenceMemory(store).list() == {}


@pytest.mark.parametrize(
    ("scope", "replace", "wish", "kept"),
    [
        ("user", False, "user wish", ["old", "User wish."]),
        ("user", True, "user wish", ["User wish."]),
        ("user", False, "", ""),
        ("thread", False, "user wish", ["old", "User wish."]),
        ("thread", True, "user wish", ["User wish."]),
        ("thread", False, "  ", ""),
    ],
)
def test_remembering_adds_replaces_or_forgets(
    scope: Any, replace: bool, wish: str, kept: Any
) -> None:
    memory = PreferenceMemory(InMemoryStore())
    memory.set("old", user_id="anna")
    answering = remembering(scope, replace=replace, wish=wish, store=memory.store)
    inputs: dict[str, Any] = {"messages": "So from now on", "preference": "old"}
    result = answering.invoke(inputs, context={"user_id": "anna"})
    assert result["preference"] == kept  # also with scope "user": it would hide the new wish
    expected = kept if scope == "user" else ["old"]
    assert memory.get(user_id="anna") == {"preference": expected}


def test_two_wishes_in_one_step_are_both_kept() -> None:
    calls = "\n".join(
        tool_call_text("remember_preference", preference=wish) for wish in ("one", "two")
    )
    model = scripted_chat({"Remembered.": "ok", "": calls})
    for scope in ("user", "thread"):
        store = InMemoryStore()
        answering = create_agent(
            model, [remember_preference(scope)], middleware=[PreferenceMiddleware()], store=store
        )
        result = answering.invoke({"messages": "Hi"}, context={"user_id": "anna"})
        kept = {
            "user": PreferenceMemory(store).get(user_id="anna").get("preference", []),
            "thread": result["preference"],
        }
        assert sorted(kept.pop(scope)) == ["One.", "Two."]
        assert list(kept.values()) == [[]]


def test_a_document_is_not_remembered() -> None:
    result = remembering("thread", wish="x" * 501).invoke({"messages": "So from now on"})
    tool = result["messages"][2]
    assert tool.status == "error"
    assert tool.content.startswith("A preference of 501 characters is too long")
    assert result["preference"] == []


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({}, {"user_id": "anna"}, "has no store"),
        ({"store": InMemoryStore()}, None, "no user_id: give"),
        ({"store": InMemoryStore()}, {"user_id": " "}, "user_id=' '"),
    ],
)
def test_remembering_without_store_or_user_is_an_error(
    options: Any, context: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        remembering("user", **options).invoke({"messages": "So from now on"}, context=context)
    with pytest.raises(RequestError, match="scope='world'"):
        remember_preference("world")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["Be brief.", None, PydanticContext(preference="Be brief.")])
def test_what_is_no_state_is_told(state: Any) -> None:
    with pytest.raises(
        RequestError, match=rf"a state of type {type(state).__name__}: expected the"
    ):
        state_settings(state)
    if isinstance(state, BaseModel):
        assert state_settings(vars(state)) == {"preference": "Be brief."}


def test_the_tool_asks_the_model_for_two_things_only() -> None:
    schema = remember_preference().tool_call_schema.model_json_schema()
    assert sorted(schema["properties"]) == ["preference", "replace"]
    assert schema["required"] == ["preference"]


@pytest.mark.parametrize("source", ["state", "configurable"])
def test_summarising_is_not_steered(source: str) -> None:
    """The summary is an internal call: the preference is for the answers that the user reads."""
    model = scripted_chat({"system\nPirate": "Pirate!", "Messages to summarize": "summary"})
    summariser = SummarizationMiddleware(
        # the state reaches only the agent's own model; the config reaches everything
        model if source == "state" else model.with_preference(""),
        trigger=("messages", 3),
        keep=("messages", 1),
    )
    answering = create_agent(model, middleware=[summariser, PreferenceMiddleware()])
    messages = [HumanMessage("One"), AIMessage("Two"), HumanMessage("Three")]
    if source == "state":
        result = answering.invoke({"messages": messages, "preference": "Pirate"})
    else:
        result = answering.invoke(
            {"messages": messages}, {"configurable": {"preference": "Pirate"}}
        )
    assert result["messages"][0].content.endswith("summary")
    assert last(result).content == "Pirate!"


async def test_a_history_too_long_to_summarise_is_cut() -> None:
    """LangChain's middleware does so when the model raises LangChain's error."""
    model = scripted_chat({"Messages to summarize": "summary", "": "answer"})
    window = model.engine.window
    assert window is not None
    summariser = SummarizationMiddleware(
        *(model,),
        trigger=("messages", 3),
        keep=("messages", 1),
        trim_tokens_to_summarize=None,
        summary_prompt="Messages to summarize: {messages}",
    )
    answering: Any = create_agent(model, middleware=[summariser])
    long = {"messages": [HumanMessage("One " * (window // 3)), AIMessage("Two"), HumanMessage("3")]}
    for result in (answering.invoke(long), await answering.ainvoke(long)):
        assert result["messages"][0].content.endswith("summary")
        assert last(result).content == "answer"


@pytest.mark.parametrize("pinned", ["call", ""])
@pytest.mark.parametrize("form", ["model", "bound", "retried"])
def test_what_is_pinned_to_the_model_counts_like_the_call(pinned: str, form: str) -> None:
    chat = preferring("call", "thread", "middleware").with_preference(pinned)
    model = {"model": chat, "bound": chat.bind(max_tokens=50), "retried": chat.with_retry()}[form]
    answering = agent(model, middleware=PreferenceMiddleware("middleware"))
    for inputs in ({"messages": "Hi"}, {"messages": "Hi", "preference": "thread"}):
        content, source, _ = told(last(answering.invoke(inputs)))
        assert (content, source) == (f"{pinned}!" if pinned else "plain", "call")
    context = {"preference": "thread"}
    assert last(answering.invoke({"messages": "Hi"}, context=context)).content == "thread!"
