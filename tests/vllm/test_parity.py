"""Both backends, asked by unmodified clients: plain answers are Transformers', steered ones ours.

Float32 and greedy, on a random model whose answers are ASCII: equal texts are equal tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from amulet import Amulet
from tests.vllm.folders import save_model
from tests.vllm.serving import KEY, serving, wait_until_idle

OPTIONS = {
    "amulet": [],
    "vllm": [
        *("--backend", "vllm", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "24"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ],
}
RUNNING = {"amulet": "amulet_requests_in_flight", "vllm": "vllm:num_requests_running"}
TEXT = "What is the sea?"
STEERED: dict[str, Any] = {
    "preference": "Be brief.",
    "strength": 2.0,
    "floor": 0.1,
    "placement": "system",
}
TOKENS = 24
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # else vLLM doesn't hold the arguments to their schema
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Mood(BaseModel):
    """How it is."""

    mood: Literal["good", "bad"]


@dataclass(frozen=True)
class Served:
    """A running server; `running` is its metric of requests that are decoded."""

    url: str
    running: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("m"), "qwen2", window=1024, is_readable=True)


@pytest.fixture(scope="module", params=list(OPTIONS))
def server(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    log = tmp_path_factory.mktemp(request.param) / "log"
    names = ["--model", str(folder), "--served-model-name", "tiny"]
    with serving([*OPTIONS[request.param], *names], log) as url:
        yield Served(url, RUNNING[request.param])


@pytest.fixture(scope="module")
def ours(folder: Path) -> Amulet:
    return Amulet.from_pretrained(str(folder), dtype="float32", drafts=False)


@pytest.fixture(scope="module")
def plain(folder: Path) -> str:
    """What Transformers' own `generate` answers."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        user(TEXT), add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
    )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def steered(ours: Amulet, plain: str) -> str:
    text = ours.chat(user(TEXT), max_new_tokens=TOKENS, **STEERED).text
    assert text != plain
    assert (plain + text).isascii()
    return text


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(**options: Any) -> dict[str, Any]:
    given = {"messages": user(TEXT), "max_tokens": TOKENS, **options}
    return {"model": "tiny", "temperature": 0, **given}


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as made:
        yield made


def test_openai(client: openai.OpenAI, ours: Amulet, plain: str, steered: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    for extra, text in (({}, plain), (STEERED, steered)):
        whole: Any = client.chat.completions.create(**chat(extra_body=extra))
        assert whole.choices[0].message.content == text
        pieces: Any = list(
            client.chat.completions.create(
                **chat(extra_body=extra, stream=True, stream_options={"include_usage": True})
            )
        )
        said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
        assert "".join(said) == text
        reply = ours.chat(user(TEXT), max_new_tokens=TOKENS, **extra)
        for usage in (whole.usage, pieces[-1].usage):
            assert usage.prompt_tokens == reply.usage.prompt_tokens
            assert usage.completion_tokens == reply.usage.completion_tokens
        ended = [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1]
        assert whole.choices[0].finish_reason == ended == reply.finish_reason


def test_openai_text_completions(client: openai.OpenAI, ours: Amulet) -> None:
    for extra in ({}, STEERED):
        found: Any = client.completions.create(
            model="tiny", prompt="The sea", max_tokens=9, temperature=0, extra_body=extra
        )
        assert found.choices[0].text == ours.complete("The sea", max_new_tokens=9, **extra).text


async def test_openai_async(server: Served, steered: str) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        options = chat(extra_body=STEERED)
        whole, stream = await asyncio.gather(
            client.chat.completions.create(**options),
            client.chat.completions.create(**options, stream=True),
        )
        assert whole.choices[0].message.content == steered
        said = ""
        async for piece in stream:
            said += piece.choices[0].delta.content or ""
        assert said == steered


def test_openai_tools_and_structured_output(client: openai.OpenAI) -> None:
    """What a program reads has its form, steered or not; of the tokens each engine has its own."""
    forced = {"type": "function", "function": {"name": "weather"}}
    for extra in ({}, STEERED):
        given: Any = chat(tools=[TOOL], tool_choice=forced, max_tokens=120, extra_body=extra)
        found: Any = client.chat.completions.create(**given)
        call = found.choices[0].message.tool_calls[0].function
        assert call.name == "weather"
        assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
        given = chat(response_format=Mood, max_tokens=60, extra_body=extra)
        parsed = client.chat.completions.parse(**given)
        assert parsed.choices[0].message.parsed in (Mood(mood="good"), Mood(mood="bad"))


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({**STEERED, "strength": 1e6}, "strength"),
        ({**STEERED, "floor": 3}, "floor"),
        ({**STEERED, "placement": "top"}, "placement"),
        ({**STEERED, "preference": ["a"] * 5}, "preference"),
    ],
)
def test_openai_errors(client: openai.OpenAI, extra: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat(extra_body=extra))
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat(model="other", extra_body=STEERED))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**chat())


async def test_langchain_openai(server: Served, plain: str, steered: str) -> None:
    options: dict[str, Any] = {"base_url": server.url, "api_key": KEY, "max_retries": 0}
    common: dict[str, Any] = {"model": "tiny", "temperature": 0, **options}
    assert ChatOpenAI(max_tokens=TOKENS, **common).invoke(TEXT).content == plain
    model = ChatOpenAI(max_tokens=TOKENS, extra_body=STEERED, **common)
    assert model.invoke(TEXT).content == steered
    assert "".join(str(piece.content) for piece in model.stream(TEXT)) == steered
    assert (await model.ainvoke(TEXT)).content == steered
    assert [found.content for found in model.batch([TEXT, TEXT])] == [steered] * 2
    longer = ChatOpenAI(max_tokens=60, extra_body=STEERED, **common)
    mood = longer.with_structured_output(Mood, method="json_schema").invoke(TEXT)
    assert mood in (Mood(mood="good"), Mood(mood="bad"))


async def test_llama_index_openai_like(server: Served, plain: str, steered: str) -> None:
    def model(**extra: Any) -> OpenAILike:
        return OpenAILike(
            model="tiny",
            api_base=server.url,
            api_key=KEY,
            is_chat_model=True,
            max_tokens=TOKENS,
            temperature=0.0,
            max_retries=0,
            additional_kwargs={"extra_body": extra},
        )

    message = ChatMessage(role="user", content=TEXT)
    assert model().chat([message]).message.content == plain
    llm = model(**STEERED)
    assert llm.chat([message]).message.content == steered
    assert llm.complete(TEXT).text == steered
    assert "".join(piece.delta or "" for piece in llm.stream_chat([message])) == steered
    assert (await llm.achat([message])).message.content == steered


async def test_many_clients_at_once(server: Served, ours: Amulet) -> None:
    """32 of them, with 16 preferences and prompts and answers of other lengths; some go early."""
    requests = [
        {
            "messages": user(f"Question {i} of " + "x" * (9 * i % 70)),
            "preference": f"Be like {i % 16}, " + "very " * (i % 4) + "much." if i % 5 else None,
            "strength": 0.5 + i % 3,
            "floor": 0.05,
            "placement": ("system", "user")[i % 2],
            "max_new_tokens": 5 + 7 * i % 40,
        }
        for i in range(32)
    ]
    wanted = [reply.text for reply in ours.batch(requests)]
    assert len(set(wanted)) == 32
    leaves = [i % 4 == 3 for i in range(32)]

    async def ask(i: int) -> str | None:
        given = dict(requests[i])
        given.pop("messages")
        limit = given.pop("max_new_tokens")
        said = ""
        stream = await client.chat.completions.create(
            **chat(messages=requests[i]["messages"], max_tokens=limit, extra_body=given),
            stream=True,
        )
        async for piece in stream:
            said += piece.choices[0].delta.content or ""
            if leaves[i] and said:
                await stream.close()
                return None
        return said

    async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        found = await asyncio.gather(*(ask(i) for i in range(32)))
    assert found == [None if gone else text for gone, text in zip(leaves, wanted, strict=True)]
    wait_until_idle(server.url, server.running)
