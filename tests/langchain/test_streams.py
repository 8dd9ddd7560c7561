"""A stream belongs to the run that asked for it, wherever it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from langchain_core.runnables import ConfigurableField, RunnableLambda

from amulet import Amulet
from amulet_integrations.langchain import AmuletLLM
from amulet_integrations.langchain.binding import unbound
from tests.langchain.scripted import preferring
from tests.models import ScriptedModel, byte_tokenizer

A, B = {"configurable": {"preference": "Anna"}}, {"configurable": {"preference": "Ben"}}


def llm() -> AmuletLLM:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"Anna": "Anna!", "Ben": "Ben!", "": "plain"})
    return AmuletLLM(amulet=Amulet(model, tokenizer))


FORMS: dict[str, Callable[[], Any]] = {
    "chat": lambda: preferring("Anna", "Ben"),
    "bound": lambda: preferring("Anna", "Ben").bind(max_tokens=50),
    "configured": lambda: preferring("Anna", "Ben").with_config(tags=["x"]),
    "configurable": lambda: preferring("Anna", "Ben").configurable_fields(
        max_tokens=ConfigurableField(id="max_tokens")
    ),
    "llm": llm,
    "bound llm": lambda: llm().bind(max_tokens=50),
}


def text(pieces: list[Any]) -> str:
    return "".join(getattr(piece, "content", piece) for piece in pieces)


def inside(config: Any, run: Callable[[], Any]) -> Any:
    """Run inside of a chain that was called with a config."""
    return RunnableLambda(lambda _: [run()]).invoke("x", config)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [A, None])
def test_it_keeps_the_config_of_the_run_around_it(form: str, config: Any) -> None:
    model = FORMS[form]()
    streams: list[Iterator[Any]] = []
    inside(config, lambda: streams.append(model.stream("hi")))
    said = inside(B, lambda: text(list(streams[0])))
    assert said == ("Anna!" if config else "plain")
    assert inside(B, lambda: text(list(model.stream("hi")))) == "Ben!"
    given = inside(A, lambda: model.stream("hi", B))
    assert inside(A, lambda: text(list(given))) == "Ben!"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [A, None])
async def test_an_asynchronous_one_too(form: str, config: Any) -> None:
    model = FORMS[form]()
    streams: list[AsyncIterator[Any]] = []
    inside(config, lambda: streams.append(model.astream("hi")))

    async def read(_: Any) -> str:
        return text([piece async for piece in streams[0]])

    said = await RunnableLambda(read).ainvoke("x", B)
    assert said == ("Anna!" if config else "plain")


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("form", FORMS)
async def test_transformed_and_told_in_events(form: str) -> None:
    model = FORMS[form]()
    pieces = inside(A, lambda: model.transform(iter(["hi"])))
    assert inside(B, lambda: text(list(pieces))) == "Anna!"

    async def inputs() -> AsyncIterator[str]:
        yield "hi"

    made = inside(
        A,
        lambda: [
            model.atransform(inputs()),
            model.astream_events("hi", version="v2"),
            model.astream_log("hi", diff=False),
        ],
    )

    async def read(_: Any) -> list[str]:
        said = [text([piece async for piece in made[0]])]
        said.append(str([event async for event in made[1]][-1]["data"]["output"]))
        said.append(text([log async for log in made[2]][-1].state["streamed_output"]))
        return said

    transformed, told, logged = await RunnableLambda(read).ainvoke("x", B)
    assert (transformed, logged) == ("Anna!", "Anna!")
    assert "Anna!" in told  # of an LLM it is a dict of generations


def test_a_batch_that_is_read_later() -> None:
    for model in (preferring("Anna", "Ben"), preferring("Anna", "Ben").bind(max_tokens=50)):
        answers = inside(A, lambda model=model: model.batch_as_completed(["hi", "you"]))
        said = inside(B, lambda answers=answers: [text([answer]) for _, answer in answers])
        assert said == ["Anna!", "Anna!"]


def test_a_stream_that_is_left_half_read_ends() -> None:
    chat = preferring("Anna", "Ben")
    stream = chat.stream("hi", A)
    assert next(stream).content == "A"
    stream.close()
    assert chat.invoke("hi").content == "plain"
    assert chat.engine.rows == 0


@pytest.mark.parametrize("form", FORMS)
def test_an_event_loop_closes_what_is_left_without_complaints(form: str, caplog: Any) -> None:
    model = FORMS[form]()
    left = []

    async def leave() -> None:
        for _ in range(4):
            left.append(model.astream("hi"))
            await anext(left[-1])

    asyncio.run(leave())
    assert [record.getMessage() for record in caplog.records] == []
    assert unbound(model)[0].engine.rows == 0
