"""`connect`: the interface of a local `Amulet` over a server, and both integrations on it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import (
    Amulet,
    DecodeError,
    Event,
    Grammar,
    ModelError,
    OutOfMemoryError,
    PromptTooLongError,
    Reply,
    Request,
    RequestError,
)
from amulet.remote import connect
from amulet.remote.streams import AsyncRemoteStream, RemoteStream
from amulet.serve.app import create_app
from amulet.serve.limits import Limits
from amulet_integrations.langchain import ChatAmulet
from amulet_integrations.llama_index import AmuletLLM
from tests.models import ScriptedModel
from tests.serve.conftest import listening, saying, user
from tests.serve.test_chat import CALL, WEATHER
from tests.serve.test_clients import SlowModel, wait_for
from tests.templates import family_tokenizer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture
def remote(tiny_url: str) -> Amulet:
    return connect(tiny_url)


def test_a_request_of_the_wrong_form_is_told(remote: Any) -> None:
    for call in (remote.start, remote.prepare, remote.astart):
        with pytest.raises(RequestError, match=r"a request of type str: expected a Request, or"):
            call("hi")


async def test_what_is_no_list_of_requests_is_told(remote: Any) -> None:
    for given in (5, {"prompt": "hi"}):
        with pytest.raises(RequestError, match=r"requests of type \w+: expected a list of Request"):
            remote.batch(given)
        with pytest.raises(RequestError, match=r"requests of type \w+: expected a list of Request"):
            await remote.abatch(given)


REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"preference": "Be brief.", "strength": 1.5, "floor": 0.05, "placement": "user"},
    {"preference": "Be brief.", "strength": 1.5, "focus": 2.0, "loop_guard": 1},
    {"preference": "Be brief.", "strength": 1.5, "focus": 0.0, "loop_guard": 0},
    {"preference": [{"text": "Be brief."}, {"text": "Be rude.", "weight": -0.5}]},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "seed": 5},
    {"preference": "Be brief.", "repetition_penalty": 1.3, "stop": ["e", "z"]},
    {"grammar": Grammar.regex("[a-f]{6}"), "preference": "x", "steer_grammar": True},
)


@pytest.mark.parametrize("options", REQUESTS)
def test_a_reply_is_the_local_one(tiny: Amulet, remote: Amulet, options: dict[str, Any]) -> None:
    assert remote.chat(user("hi"), max_new_tokens=20, **options) == tiny.chat(
        user("hi"), max_new_tokens=20, **options
    )
    assert remote.complete("hi\n", max_new_tokens=20, **options) == tiny.complete(
        "hi\n", max_new_tokens=20, **options
    )


def test_the_pieces_of_a_stream_are_those_of_the_local_one(tiny: Amulet, remote: Amulet) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "preference": "Be brief."}
    expected = list(tiny.stream(user("hi"), **options))
    assert len(expected) > 5
    with remote.stream(user("hi"), **options) as stream:
        assert list(stream) == expected
    assert stream.reply == tiny.chat(user("hi"), **options)
    with remote.stream(user("hi"), **options) as stream:  # the rest can be read in another way
        pieces = [next(stream), next(stream), *(event.text for event in stream.events())]
    assert pieces == expected
    with remote.stream(user("hi"), **options) as stream:
        for _ in stream.events():
            break
        assert stream.read().text == "".join(expected)


def figures(events: list[Event]) -> list[float]:
    tokens = [token for event in events for token in event.tokens]
    likely = [logprob for token in tokens for _, _, logprob in token.top]
    return [p for token in tokens for p in (token.preferred, token.base, token.steered)] + likely


def words(events: list[Event]) -> list[Any]:
    return [
        (event.kind, event.text, [(token.token_id, token.text) for token in event.tokens])
        for event in events
    ]


def test_a_trace_is_the_local_one(tiny: Amulet, remote: Amulet) -> None:
    options: dict[str, Any] = {"preference": "Be brief.", "trace": True, "top_logprobs": 3}
    with remote.stream(user("hi"), max_new_tokens=8, **options) as stream:
        events = list(stream.events())
    ours = tiny.stream(user("hi"), max_new_tokens=8, **options)
    expected = list(ours.events())
    assert words(events) == words(expected)
    # Another batch, and a kept prefix, round the last digits another way.
    assert figures(events) == pytest.approx(figures(expected), abs=1e-4)
    assert stream.reply.token_ids == ours.reply.token_ids
    assert stream.trace == stream.reply.trace
    assert [token.text for token in stream.trace or ()] == [t.text for t in ours.trace or ()]


def test_events_of_reasoning_and_calls() -> None:
    tokenizer = family_tokenizer("qwen")
    bad = '<tool_call>\n{"name": "weather", "arguments": {"city"\n</tool_call>'
    amulet = saying(tokenizer, f"<think>\nhm\n</think>\n\nWait. {CALL}{bad}")
    options: dict[str, Any] = {"tools": [WEATHER]}
    ours = amulet.stream(user("Weather?"), **options)
    expected = list(ours.events())
    with listening(create_app(amulet, name="m")) as (url, _):
        stream = connect(url).stream(user("Weather?"), **options)
        events = list(stream.events())
    ids = {event.id: event.id and f"id{event.index}" for event in [*events, *expected]}

    def same(event: Event) -> Event:  # ids are drawn
        return replace(event, id=ids[event.id])

    def known(reply: Reply) -> Reply:
        return replace(
            reply,
            tool_calls=tuple(replace(call, id="") for call in reply.tool_calls),
            invalid_tool_calls=tuple(replace(call, id="") for call in reply.invalid_tool_calls),
        )

    assert [same(event) for event in events] == [same(event) for event in expected]
    assert known(stream.reply) == known(ours.reply)
    assert [call.arguments for call in stream.reply.tool_calls] == [{"city": "Rome"}]
    assert len(stream.reply.invalid_tool_calls) == 1


async def test_the_async_twins(tiny: Amulet, remote: Amulet) -> None:
    options: dict[str, Any] = {"preference": "Be brief.", "max_new_tokens": 12}
    ours = tiny.chat(user("hi"), **options)
    assert await remote.achat(user("hi"), **options) == ours
    stream = remote.astream(user("hi"), **options)
    assert "".join([piece async for piece in stream]) == ours.text
    assert stream.reply == ours
    requests: list[Any] = [
        {"messages": user(f"q{i}"), "preference": f"p{i}", "max_new_tokens": 4 + i}
        for i in range(6)
    ]
    assert await remote.abatch(requests) == tiny.batch(requests)


def test_many_loops_and_batches(tiny: Amulet, remote: Amulet) -> None:
    ours = tiny.chat(user("hi"), max_new_tokens=5)
    for _ in range(2):
        assert asyncio.run(remote.achat(user("hi"), max_new_tokens=5)) == ours
    requests = [Request(messages=user(f"q{i}"), max_new_tokens=3 + i) for i in range(5)]
    assert remote.batch(requests) == tiny.batch(requests)
    assert remote.batch([]) == []
    bad = remote.batch(
        [{"messages": user("x" * 600)}, {"messages": user("hi"), "max_new_tokens": 5}],
        return_exceptions=True,
    )
    assert isinstance(bad[0], PromptTooLongError)
    assert bad[1] == ours


def test_what_it_says_of_the_model(tiny: Amulet, remote: Amulet) -> None:
    assert remote.name == "tiny"
    assert remote.window == tiny.window == 512
    assert remote.steering == tiny.steering
    assert remote.end_ids == tiny.end_ids
    assert remote.count_tokens("héy") == 4
    assert remote.encode_chat(user("hi")) == tiny.encode_chat(user("hi"))
    assert isinstance(remote, Amulet)


async def test_prepared_answers_are_sent_when_they_are_read(tiny: Amulet, remote: Amulet) -> None:
    request = Request(messages=tuple(user("hi")), max_new_tokens=6, preference="Be brief.")
    ours = tiny.start(request).read()
    first, second = remote.prepare(request), remote.prepare(request)
    first.submit()
    assert (first.text, first.read(), first.text) == ("", ours, ours.text)
    assert await remote.astart(second).read() == ours
    second.cancel()
    assert second.reply.finish_reason == "cancelled"
    with pytest.raises(RequestError, match="belongs to another model"):
        remote.astart(tiny.prepare(request))
    assert remote.max_rows == tiny.max_rows == 64
    with pytest.raises(RequestError, match="see its /metrics"):
        remote.rows  # noqa: B018  (a property)
    with pytest.raises(RequestError, match="see its /metrics"):
        remote.cache_bytes  # noqa: B018


async def test_closing_ends_the_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(Amulet(SlowModel(tokenizer, "a" * 3000), tokenizer), name="m")
    traffic = app.state.service.traffic
    with listening(app) as (url, _):
        remote = await asyncio.to_thread(connect, url)

        def begin() -> None:
            with remote.stream(user("hi"), max_new_tokens=3000) as stream:
                assert next(stream) == "a"
            assert stream.reply.finish_reason == "cancelled"
            assert stream.reply.text == "a"

        await asyncio.to_thread(begin)
        await asyncio.to_thread(wait_for, lambda: len(traffic) == 0)
        task = asyncio.create_task(remote.achat(user("hi"), max_new_tokens=3000))
        await asyncio.to_thread(wait_for, lambda: len(traffic) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for, lambda: len(traffic) == 0)


def test_errors_are_those_of_a_local_model(
    tokenizer: PreTrainedTokenizerFast, remote: Amulet
) -> None:
    with pytest.raises(RequestError, match="temperature"):
        remote.stream(user("hi"), temperature=-1)  # checked here
    with pytest.raises(RequestError, match="has role 'x'"):
        remote.chat([{"role": "x", "content": "hi"}])
    with pytest.raises(PromptTooLongError, match="context window 512"):
        remote.chat(user("x" * 600))
    with pytest.raises(RequestError, match="logits_processor"):
        remote.chat(user("hi"), logits_processor=lambda ids, scores: scores)
    with pytest.raises(RequestError, match="not finished"):
        _ = remote.stream(user("hi")).reply
    model = ScriptedModel(tokenizer, "hello")
    app = create_app(Amulet(model, tokenizer), name="m", api_keys=["k"], limits=Limits(queue=0))
    with listening(app) as (url, _):
        with pytest.raises(RequestError, match="api_key: The API key is missing or wrong"):
            connect(url)
        with pytest.raises(ModelError, match="model='x': this server has 'm'"):
            connect(url, api_key="k", model="x")
        ours = connect(f"{url}/v1/", api_key="k", retries=0)
        model.fail_with = OutOfMemoryError("no room")
        with pytest.raises(OutOfMemoryError, match="no room"):
            ours.chat(user("hi"))
        model.fail_with = DecodeError("broke")
        with pytest.raises(DecodeError, match="broke"):
            ours.chat(user("hi"))
        patient = connect(url, api_key="k", retries=2)
        model.fail_with = OutOfMemoryError("no room")
        app.state.service.metrics.seconds.observe(0)
        assert patient.chat(user("hi")).text == "hello"  # asked again, as Retry-After says
    with pytest.raises(DecodeError, match="can't be reached"):
        ours.chat(user("hi"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ModelError, match=f"http://127.0.0.1:{port}: .* can't be reached"):
        connect(f"http://127.0.0.1:{port}", retries=0)
    hosts = ("http://1.2.3.400", "http://", "http://[::1", "http://a:x", "http://a:99999")
    for wrong in ("127.0.0.1:80", *hosts):
        with pytest.raises(RequestError, match="expected an address"):
            connect(wrong)
    for key in ("k\nb", "schl\u00fcssel"):
        with pytest.raises(RequestError, match="api_key: expected printable ASCII characters"):
            connect("http://127.0.0.1", api_key=key)
    with pytest.raises(RequestError, match="timeout=inf: expected seconds"):
        connect("http://127.0.0.1", timeout=float("inf"))


LISTED = '{"data": [{"id": "m"}]}'


@pytest.mark.parametrize(
    ("models", "model", "said"),
    [
        ("<html></html>", "", "does not list its models"),
        ("{}", "", "does not list its models"),
        ("null", "", "does not list its models"),
        ('{"data": []}', "", "does not list its models"),
        ('{"data": [1]}', "", "does not list its models"),
        ('{"data":', "", "does not list its models"),
        (LISTED, '{"id": "m"}', "it doesn't steer"),
        (LISTED, '{"id": "m", "steering": {}}', "it doesn't steer"),
    ],
)
def test_another_server_is_told(tiny: Amulet, models: str, model: str, said: str) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        body = models if scope["path"].endswith("/models") else model
        kind = b"text/html" if body.startswith("<") else b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})

    app = create_app(tiny, name="m")  # `other` answers in its place
    with listening(app, around=lambda _: other) as (url, _), pytest.raises(ModelError, match=said):
        connect(url, retries=0)
    for wrong in ({"timeout": "10"}, {"timeout": 0}, {"retries": -1}, {"retries": None}):
        ((name, value),) = wrong.items()
        with pytest.raises(RequestError, match=rf"^{name}={value!r}: expected .* (than 0|0 or)"):
            connect("http://127.0.0.1:80", **wrong)  # type: ignore[arg-type]


class Chunks:
    """What the package `openai` returns, of a server that sends one chunk."""

    def __init__(self, chunk: dict[str, Any]) -> None:
        self.left = [SimpleNamespace(model_dump=lambda warnings: chunk)]
        self.closed = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.left)

    def close(self) -> None:
        self.closed += 1


class AsyncChunks:
    """The same for `AsyncRemoteStream`."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks

    async def __aiter__(self) -> AsyncIterator[Any]:
        for chunk in self.chunks:
            yield chunk

    async def close(self) -> None:
        self.chunks.close()


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [5]},
        {"usage": {"total_tokens": 5}},
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {}}]}}]},
        {"choices": [{"delta": {"content": 5}}]},
    ],
)
async def test_a_chunk_that_is_none_of_ours_is_told(chunk: dict[str, Any]) -> None:
    sent, sent_async = Chunks(chunk), Chunks(chunk)
    stream = RemoteStream(lambda: sent, Request(prompt="hi"))

    async def send() -> AsyncChunks:
        return AsyncChunks(sent_async)

    for read in (lambda: asyncio.to_thread(stream.read), AsyncRemoteStream(send, False).read):
        with pytest.raises(DecodeError, match="is it an `amulet serve` of the same version"):
            await read()
    assert (sent.closed, sent_async.closed) == (1, 1)


async def test_the_integrations_work_on_it(tiny: Amulet, remote: Amulet) -> None:
    local = ChatAmulet(amulet=tiny, preference="Be brief.", max_tokens=10)
    chat = ChatAmulet(amulet=remote, preference="Be brief.", max_tokens=10)
    expected = local.invoke("hi")
    assert chat.invoke("hi").content == expected.content
    assert "".join(str(piece.content) for piece in chat.stream("hi")) == expected.content
    assert [answer.content for answer in chat.batch(["hi", "hi"])] == [expected.content] * 2
    assert (await chat.ainvoke("hi")).content == expected.content
    assert chat.get_num_tokens("héy") == 4
    assert chat.profile == local.profile
    schema = {"title": "mood", "type": "object", "properties": {"m": {"enum": ["a", "b"]}}}
    structured = ChatAmulet(amulet=remote, max_tokens=40).with_structured_output(
        {**schema, "required": ["m"]}
    )
    assert structured.invoke("hi") in ({"m": "a"}, {"m": "b"})
    llm = AmuletLLM(amulet=remote, preference="Be brief.", max_tokens=10)
    ours = AmuletLLM(amulet=tiny, preference="Be brief.", max_tokens=10)
    assert llm.complete("hi").text == ours.complete("hi").text
    assert (
        "".join(piece.delta or "" for piece in llm.stream_complete("hi")) == llm.complete("hi").text
    )
    assert (await llm.acomplete("hi")).text == ours.complete("hi").text
    assert llm.metadata.context_window == 512 - 64 - 9  # room for preferences
    assert llm.metadata.is_function_calling_model == ours.metadata.is_function_calling_model


def test_what_is_no_json_is_a_request_error(remote: Amulet) -> None:
    for options, words in (
        ({"messages": user("a\ud83d")}, "lone surrogate"),
        ({"messages": user("a"), "preference": "\udc00"}, "lone surrogate"),
        ({"messages": user("a"), "template_options": {"x": {1}}}, "can't be sent as JSON"),
        ({"messages": user("a"), "template_options": {"x": float("nan")}}, "can't be sent as JSON"),
    ):
        (error,) = remote.batch([options], return_exceptions=True)
        assert isinstance(error, RequestError)
        assert words in str(error)
    with pytest.raises(RequestError, match="lone surrogate"):
        remote.encode("\ud83d")
