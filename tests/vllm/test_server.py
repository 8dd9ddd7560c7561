"""`amulet serve --backend vllm` with the embedded model, asked by the `openai` client."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from amulet import Amulet
from tests.vllm.serving import KEY, serving, wait_until_idle

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WISH = "Answer like a pirate."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's address."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--backend", "vllm", "--enforce-eager", "--max-model-len", "1024"]
    with serving([*options, "--max-num-seqs", "16"], log) as url:
        yield url
    told = log.read_text()
    assert WISH not in told  # neither prompts nor preferences are logged
    assert QUESTION[0]["content"] not in told


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet.embedded(dtype="float32")


def ask(client: openai.OpenAI, *, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    given = {"max_tokens": 20, "temperature": 0, "messages": QUESTION, **options}
    return client.chat.completions.create(model=MODEL, extra_body=extra, **given)


def test_a_plain_chat_is_the_plain_model(client: openai.OpenAI, amulet: Amulet) -> None:
    reply = amulet.chat(QUESTION, max_new_tokens=20)
    answer = ask(client)
    assert answer.choices[0].message.content == reply.text
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens


def test_a_steered_chat_is_amulets_own(client: openai.OpenAI, amulet: Amulet) -> None:
    reply = amulet.chat(QUESTION, preference=WISH, max_new_tokens=20)
    answer = ask(client, extra={"preference": WISH})
    assert answer.choices[0].message.content == reply.text
    assert answer.choices[0].finish_reason == reply.finish_reason
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens
    assert answer.usage.completion_tokens == reply.usage.completion_tokens
    assert reply.text != amulet.chat(QUESTION, max_new_tokens=20).text


def test_all_settings_reach_the_engine(client: openai.OpenAI, amulet: Amulet) -> None:
    settings: dict[str, Any] = {
        "preference": [WISH, {"text": "Be brief.", "weight": 0.5}],
        "strength": 4.0,
        "floor": 0.05,
        "placement": "user",
    }
    reply = amulet.chat(QUESTION, max_new_tokens=20, **settings)
    assert ask(client, extra=settings).choices[0].message.content == reply.text


def test_streaming(client: openai.OpenAI, amulet: Amulet) -> None:
    stream = ask(
        client, extra={"preference": WISH}, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reply = amulet.chat(QUESTION, preference=WISH, max_new_tokens=20)
    assert text == reply.text
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens
    assert len(chunks) > 5


def test_a_text_completion(client: openai.OpenAI, amulet: Amulet) -> None:
    options = {"preference": WISH, "strength": 3.0}
    answer = client.completions.create(
        model=MODEL, prompt="The sea is", max_tokens=16, temperature=0, extra_body=options
    )
    wanted = amulet.complete("The sea is", max_new_tokens=16, **options)
    assert answer.choices[0].text == wanted.text


def test_a_stop_string_ends_all_rows(client: openai.OpenAI, amulet: Amulet) -> None:
    text = amulet.chat(QUESTION, preference=WISH, max_new_tokens=20).text
    stop = text[8:12]
    answer = ask(client, extra={"preference": WISH}, stop=[stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_several_choices_each_with_a_pair(client: openai.OpenAI, amulet: Amulet) -> None:
    answer = ask(client, extra={"preference": WISH}, n=2, seed=7, temperature=0.8)
    for choice in answer.choices:
        wanted = amulet.chat(
            QUESTION, preference=WISH, max_new_tokens=20, seed=7 + choice.index, temperature=0.8
        )
        assert choice.message.content == wanted.text


def test_what_a_machine_reads_is_not_steered(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    plain = ask(client, response_format=form, max_tokens=40)
    steered = ask(client, response_format=form, max_tokens=40, extra={"preference": WISH})
    assert '"city"' in plain.choices[0].message.content
    assert steered.choices[0].message.content == plain.choices[0].message.content


def test_many_clients_at_once(client: openai.OpenAI, amulet: Amulet) -> None:
    wishes = [None, WISH, "Be brief.", "Answer in French."]
    questions = [[{"role": "user", "content": f"Name {n} animals."}] for n in range(2, 5)]
    jobs = [(question, wish) for question in questions for wish in wishes]
    requests = [
        {"messages": question, "preference": wish, "max_new_tokens": 16} for question, wish in jobs
    ]

    def one(job: tuple[Any, Any]) -> str:
        question, wish = job
        extra = {"preference": wish} if wish else None
        answer = ask(client, messages=question, extra=extra, max_tokens=16)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(one, jobs))
    assert texts == [reply.text for reply in amulet.batch(requests)]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"preference": WISH, "strength": 1e6}, "strength"),
        ({"preference": WISH, "placement": "top"}, "placement"),
        ({"preference": 5}, None),
        ({"preference": [WISH] * 5}, "preference"),
        ({"preference": WISH, "prompt_logprobs": 1}, None),
        ({"preference": WISH, "vllm_xargs": {"amulet": "x"}}, None),
        ({"vllm_xargs": {"amulet": "x"}}, None),
        ({"preference": WISH, "trace": True}, "trace"),
        ({"grammar": {"kind": "regex", "source": "a+"}}, "grammar"),
    ],
)
def test_what_is_wrong_is_status_400(
    client: openai.OpenAI, extra: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra=extra)
    assert caught.value.status_code == 400
    if param is not None:
        assert caught.value.param == param


def test_a_text_completion_refuses_what_vllm_would_drop(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="own engine"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"return_details": True})


def test_too_long_with_the_preference(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context window"):
        ask(client, extra={"preference": "Be brief. " * 400})


def test_a_client_that_goes_leaves_nothing(client: openai.OpenAI, server: str) -> None:
    for _ in range(3):
        stream = ask(client, extra={"preference": WISH}, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    wait_until_idle(server, "vllm:num_requests_running")


def test_responses_refuse_a_preference(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat/completions"):
        client.responses.create(model=MODEL, input="Hi", extra_body={"preference": WISH})


def test_the_key_is_asked_for(server: str) -> None:
    with (
        openai.OpenAI(base_url=server, api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        ask(other, extra={"preference": WISH})


def test_the_page_of_routes_loads_no_scripts_from_elsewhere(server: str) -> None:
    with urllib.request.urlopen(server.removesuffix("v1") + "docs") as answer:
        page = answer.read().decode()
    scripts = re.findall(r'<script[^>]* src="([^"]*)"', page)
    assert scripts
    assert all(script.startswith("/") for script in scripts)
