"""Unmodified clients against a real server: openai, langchain-openai, LlamaIndex's OpenAILike."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet, OutOfMemoryError
from amulet.serve.app import create_app
from tests.models import ScriptedModel
from tests.serve.conftest import listening, saying, user
from tests.serve.test_chat import CALL, WEATHER
from tests.templates import family_tokenizer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


class Mood(BaseModel):
    """How it is."""

    mood: Literal["good", "bad"]


class SlowModel(ScriptedModel):
    """Takes ten milliseconds a step."""

    def _next(self, ids: list[int]) -> int:
        time.sleep(0.01)
        return super()._next(ids)


def weather(city: str) -> str:
    """Tells the weather."""
    return f"sun in {city}"


@contextlib.contextmanager
def sync_client(url: str, key: str = "k") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def caller_url() -> Iterator[str]:
    """A server whose model calls a tool, whatever it is asked."""
    answers = {"sun in": "Sunny.", "": CALL}
    with listening(create_app(saying(family_tokenizer("qwen"), answers), name="m")) as (url, _):
        yield url


def test_openai_chat_complete_and_stream(tiny: Amulet, tiny_url: str) -> None:
    ours = tiny.chat(user("hi"), preference="Be brief.", strength=1.0, max_new_tokens=12)
    extra = {"preference": "Be brief.", "strength": 1.0}
    with sync_client(tiny_url) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        chat: Any = client.chat.completions
        options = {"model": "tiny", "messages": user("hi"), "max_tokens": 12, "extra_body": extra}
        whole = chat.create(**options)
        assert whole.choices[0].message.content == ours.text
        assert whole.usage.completion_tokens == 12
        stream = chat.create(**options, stream=True, stream_options={"include_usage": True})
        pieces = list(stream)
        said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(said) == ours.text
        assert pieces[-1].usage.prompt_tokens == ours.usage.prompt_tokens
        text = client.completions.create(model="tiny", prompt="hi", max_tokens=6)
        assert text.choices[0].text == tiny.complete("hi", max_new_tokens=6).text


def test_openai_errors_are_of_their_class(tiny_url: str) -> None:
    with sync_client(tiny_url) as client:
        chat: Any = client.chat.completions
        with pytest.raises(openai.BadRequestError) as bad:
            chat.create(model="tiny", messages=user("hi"), temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as other:
            chat.create(model="gpt", messages=user("hi"))
        assert other.value.code == "model_not_found"


def test_openai_tools_and_structured_output(caller_url: str, tiny_url: str) -> None:
    with sync_client(caller_url) as client:
        chat: Any = client.chat.completions
        found = chat.create(model="m", messages=user("Weather?"), tools=[WEATHER])
        call = found.choices[0].message.tool_calls[0]
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
        with chat.stream(model="m", messages=user("Weather?"), tools=[WEATHER]) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    with sync_client(tiny_url) as client:
        parsed = client.chat.completions.parse(
            model="tiny", messages=user("hi"), response_format=Mood, max_tokens=60
        )
        assert parsed.choices[0].message.parsed in (Mood(mood="good"), Mood(mood="bad"))


async def test_openai_async(tiny: Amulet, tiny_url: str) -> None:
    ours = await tiny.achat(user("hi"), max_new_tokens=12)
    async with openai.AsyncOpenAI(base_url=f"{tiny_url}/v1", api_key="k") as client:
        chat: Any = client.chat.completions
        options = {"model": "tiny", "messages": user("hi"), "max_tokens": 12}
        whole = await chat.create(**options)
        assert whole.choices[0].message.content == ours.text
        said = ""
        async for piece in await chat.create(**options, stream=True):
            said += piece.choices[0].delta.content or ""
        assert said == ours.text


async def test_langchain_openai(tiny: Amulet, tiny_url: str, caller_url: str) -> None:
    ours = tiny.chat(user("hi"), preference="Be brief.", max_new_tokens=12)
    options: dict[str, Any] = {"api_key": "k", "max_retries": 0}
    chat = ChatOpenAI(
        model="tiny",
        base_url=f"{tiny_url}/v1",
        max_tokens=12,
        extra_body={"preference": "Be brief."},
        **options,
    )
    answer = chat.invoke("hi")
    assert answer.content == ours.text
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] == ours.usage.prompt_tokens
    assert "".join(str(piece.content) for piece in chat.stream("hi")) == ours.text
    assert (await chat.ainvoke("hi")).content == ours.text
    assert [found.content for found in chat.batch(["hi", "hi"])] == [ours.text] * 2
    by_name: Any = init_chat_model(
        "openai:tiny",
        base_url=f"{tiny_url}/v1",
        max_tokens=12,
        extra_body={"preference": "Be brief."},
        **options,
    )
    assert by_name.invoke("hi").content == ours.text
    longer = ChatOpenAI(model="tiny", base_url=f"{tiny_url}/v1", max_tokens=60, **options)
    mood = longer.with_structured_output(Mood).invoke("hi")
    assert mood in (Mood(mood="good"), Mood(mood="bad"))
    caller = ChatOpenAI(model="m", base_url=f"{caller_url}/v1", **options).bind_tools([weather])
    called = caller.invoke("Weather?")
    assert isinstance(called, AIMessage)
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [
        ("weather", {"city": "Rome"})
    ]


async def test_llama_index_openai_like(tiny: Amulet, tiny_url: str, caller_url: str) -> None:
    ours = tiny.chat(user("hi"), preference="Be brief.", max_new_tokens=12)
    common: dict[str, Any] = {"api_key": "k", "is_chat_model": True, "max_retries": 0}
    llm = OpenAILike(
        model="tiny",
        api_base=f"{tiny_url}/v1",
        max_tokens=12,
        temperature=0.0,
        additional_kwargs={"extra_body": {"preference": "Be brief."}},
        **common,
    )
    message = ChatMessage(role="user", content="hi")
    assert llm.chat([message]).message.content == ours.text
    assert "".join(piece.delta or "" for piece in llm.stream_chat([message])) == ours.text
    assert (await llm.achat([message])).message.content == ours.text
    caller = OpenAILike(
        model="m", api_base=f"{caller_url}/v1", is_function_calling_model=True, **common
    )
    tool = FunctionTool.from_defaults(weather)
    answer = caller.chat_with_tools([tool], "Weather?")
    calls = caller.get_tool_calls_from_response(answer)
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("weather", {"city": "Rome"})]


def test_a_client_that_goes_stops_the_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    model = SlowModel(tokenizer, "a" * 3000)
    app = create_app(Amulet(model, tokenizer), name="m")
    body = {"messages": user("hi"), "max_tokens": 3000}
    with listening(app) as (url, _):
        for streamed in (True, False):
            path = f"{url}/v1/chat/completions"
            if streamed:
                with httpx.stream("POST", path, json={**body, "stream": True}) as response:
                    lines = response.iter_lines()
                    assert next(lines).startswith("data: ")
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(path, json=body, timeout=0.3)
            wait_for(lambda: len(app.state.service.traffic) == 0)
            steps = len(model.calls)
            time.sleep(0.1)
            assert len(model.calls) <= steps + 1
        metrics = httpx.get(f"{url}/metrics").text
    assert 'amulet_answers_total{finish_reason="cancelled",steered="no"} 2.0' in metrics


class HeldModel(ScriptedModel):
    """Computes nothing until it is let go."""

    go = threading.Event()

    def forward(self, input_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
        self.go.wait(10)
        return super().forward(input_ids, past_key_values=past_key_values, **options)


def test_a_stream_begins_before_the_prompt_is_read(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers at once, then comments that keep proxies from giving up, which clients skip."""
    monkeypatch.setattr("amulet.serve.app.PING", 0.05)
    model = HeldModel(tokenizer, "hello")
    app = create_app(Amulet(model, tokenizer), name="m")
    body = {"messages": user("hi"), "stream": True}
    with listening(app) as (url, _):
        model.go.clear()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=5) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": the answer is not finished", ""] * 2
            model.go.set()
            said = [line for line in lines if line.startswith("data: {")]
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in said]
        assert "".join(delta.get("content", "") for delta in deltas) == "hello"
        model.go.clear()
        with sync_client(url) as client:
            chat: Any = client.chat.completions
            stream = chat.create(model="m", messages=user("ho"), stream=True)  # headers are here
            threading.Timer(0.3, model.go.set).start()
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == "hello"
        model.go.clear()  # whoever goes meanwhile leaves nothing behind
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=5) as response:
            assert response.status_code == 200
        wait_for(lambda: len(app.state.service.traffic) == 0)
        model.go.set()
        metrics = httpx.get(f"{url}/metrics").text
    assert "amulet_first_token_seconds_count 2.0" in metrics


@pytest.mark.parametrize(
    ("path", "asked", "early"),
    [
        ("/v1/completions", {"prompt": "hi\n"}, []),
        ("/v1/responses", {"input": "hi"}, ["response.created", "response.in_progress"]),
    ],
)
def test_the_other_streams_begin_as_early(
    path: str,
    asked: dict[str, Any],
    early: list[str],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("amulet.serve.app.PING", 0.05)
    model = HeldModel(tokenizer, "hello")
    model.go.clear()
    body = {**asked, "stream": True}
    with (
        listening(create_app(Amulet(model, tokenizer), name="m")) as (url, _),
        httpx.stream("POST", url + path, json=body, timeout=5) as response,
    ):
        found = []
        for line in response.iter_lines():
            found.append(line)
            if found.count(": the answer is not finished") == 2:
                model.go.set()
    events = [json.loads(line[6:]) for line in found if line.startswith("data: {")]
    names = [event["type"] for event in events if "type" in event]
    assert names[: len(early)] == early
    first = found.index(": the answer is not finished")
    assert sum(line.startswith("data: ") for line in found[:first]) == len(early)
    said = [event.get("delta") or event.get("choices", [{}])[0].get("text", "") for event in events]
    assert "".join(said) == "hello"


def test_what_fails_late_in_a_prompt_is_an_event(tokenizer: PreTrainedTokenizerFast) -> None:
    model = HeldModel(tokenizer, "hello")

    def read(chat: Any) -> None:
        stream = chat.create(model="m", messages=user("ho"), stream=True)
        model.go.set()  # the headers are here
        list(stream)

    with listening(create_app(Amulet(model, tokenizer), name="m")) as (url, _):
        for held in (False, True):
            model.go.set()
            model.fail_with = OutOfMemoryError("no room")
            if held:
                model.go.clear()
            raised = pytest.raises(openai.APIError, match="no room")
            with sync_client(url) as client, raised as caught:
                read(client.chat.completions)
            assert caught.value.code == "out_of_memory"
            # Once the headers are out there is no other status.
            assert getattr(caught.value, "status_code", 200) == (200 if held else 503)


def test_a_signal_drains(tokenizer: PreTrainedTokenizerFast) -> None:
    app = create_app(Amulet(SlowModel(tokenizer, "a" * 60), tokenizer), name="m")
    body = {"messages": user("hi")}
    with listening(app, keep_alive=True) as (url, server), httpx.Client(base_url=url) as kept:
        assert kept.get("/health").status_code == 200
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/chat/completions", json=body))
        )
        asking.start()
        wait_for(lambda: len(app.state.service.traffic) == 1)
        server.handle_exit(15, None)
        assert kept.get("/health").status_code == 503
        refused = kept.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        asking.join(10)
        assert answers[0].json()["choices"][0]["message"]["content"] == "a" * 60
        wait_for(lambda: server.should_exit)
        assert not server.force_exit


def test_what_smollm_says(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = smollm
    amulet = Amulet(model, tokenizer)
    messages = user("Name three colours.")
    wish = "Answer in one short sentence."
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    peer: Any = model
    generated = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10
    )
    steered = amulet.chat(messages, preference=wish, max_new_tokens=10)
    with listening(create_app(amulet, name="smol")) as (url, _), sync_client(url) as client:
        chat: Any = client.chat.completions
        found = [
            chat.create(
                model="smol",
                messages=messages,
                max_tokens=10,
                extra_body={"return_details": True, **extra},
            )
            for extra in ({}, {"preference": wish})
        ]
    ids_of = [answer.choices[0].model_extra["details"]["token_ids"] for answer in found]
    assert ids_of[0] == generated[0, ids.shape[1] :].tolist()
    assert ids_of[1] == list(steered.token_ids)
    assert ids_of[0] != ids_of[1]


async def test_many_clients_get_what_each_gets_alone(tiny: Amulet, tiny_url: str) -> None:
    """32 at once, 16 preferences, other lengths, seeds and sampling; every fourth one goes."""
    requests = [
        {
            "messages": user(f"question {i} " + "x" * (7 * i % 40)),
            "preference": f"Be like {i % 16}." if i % 5 else None,
            "strength": 0.5 + i % 3,
            "max_tokens": 5 + 3 * i % 40,
            "temperature": 0.8 if i % 3 == 0 else 0.0,
            "seed": i,
        }
        for i in range(32)
    ]

    def alone(request: dict[str, Any]) -> str:
        options = dict(request)
        limit = options.pop("max_tokens")
        return tiny.chat(options.pop("messages"), max_new_tokens=limit, **options).text

    expected = [alone(request) for request in requests]

    async def ask(i: int) -> str | None:
        body = {**requests[i], "stream": True}
        said = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    said += delta.get("content", "")
                    if i % 4 == 3 and said:
                        return None
        return said

    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=tiny_url, limits=limits, timeout=60) as client:
        found = await asyncio.gather(*(ask(i) for i in range(32)))
        metrics = (await client.get("/metrics")).text
    assert found == [None if i % 4 == 3 else text for i, text in enumerate(expected)]
    assert "amulet_requests_waiting 0.0" in metrics


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within five seconds"
        time.sleep(0.01)
