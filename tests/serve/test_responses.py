"""POST /v1/responses: read by openai's own types and client, and the same answers as a chat's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, DecodeError
from amulet.serve.app import create_app
from tests.models import ScriptedModel
from tests.serve.conftest import asking, listening, saying, user
from tests.serve.test_chat import CALL, WEATHER
from tests.serve.test_chat import post as post_chat
from tests.templates import family_tokenizer

PATH = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"], "strict": False}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THOUGHTFUL = f"<think>\nhm\n</think>\n\nWait. {CALL}"


class Mood(BaseModel):
    """How it is."""

    mood: Literal["good", "bad"]


async def post(amulet: Amulet, **body: Any) -> dict[str, Any]:
    """Return a response that openai's type of it takes."""
    found = await post_chat(amulet, PATH, **body)
    Response.model_validate(found, strict=True)
    return found


async def events(amulet: Amulet, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each of one of openai's types, numbered from 0."""
    async with asking(create_app(amulet, name="m")) as client:
        response = await client.post(PATH, json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert type(EVENT.validate_python(event)).model_fields["type"].annotation is not str
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    drawn = ("id", "call_id")
    return [{key: item[key] for key in item if key not in drawn} for item in items]


async def test_a_plain_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = {"model": "m", "input": "hi", "metadata": {"a": "b"}, "store": True, "user": "ann"}
    found = await post(saying(tokenizer, "hello"), **asked)
    assert found["id"].startswith("resp_")
    assert without_ids(found["output"]) == [
        {
            "status": "completed",
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
            ],
        }
    ]
    assert found["usage"] == {
        "input_tokens": 21,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 27,
        "base_prompt_tokens": 0,
    }
    for name, value in {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "m",
        "metadata": {"a": "b"},
        "store": False,
        "temperature": 0.0,
        "top_p": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "user": "ann",
    }.items():
        assert found[name] == value


async def test_prompt_tokens_that_were_reused_are_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = saying(tokenizer, "hello")
    first = await post(amulet, input="a question of some length")
    items: list[Any] = [*user("a question of some length"), *first["output"], *user("and?")]
    shared = first["usage"]["input_tokens"] + len("hello")
    for found in (await post(amulet, input=items), (await events(amulet, input=items))[-1]):
        usage = found.get("response", found)["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] == shared
        shared = usage["input_tokens"] - 1  # the same once more


async def test_a_stream_is_openais_events_in_their_order(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = saying(tokenizer, "hé")
    found = await events(amulet, input="hi")
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert found[2]["item"]["content"] == []
    assert found[3]["part"]["text"] == ""
    assert [event["delta"] for event in found[4:6]] == ["h", "é"]
    assert found[6]["text"] == found[7]["part"]["text"] == "hé"
    final = found[-1]["response"]
    assert final["output"] == [found[8]["item"]]
    assert {event["item_id"] for event in found[3:8]} == {final["output"][0]["id"]}
    whole = await post(amulet, input="hi")
    assert without_ids(final["output"]) == without_ids(whole["output"])
    assert final["usage"] | {"input_tokens_details": {}} == (
        whole["usage"] | {"input_tokens_details": {}}
    )


async def test_it_is_the_chat_that_it_says(tiny: Amulet) -> None:
    """Settings reach the engine as they do by chat completions, and the user's stored ones too."""
    body: dict[str, Any] = {"preference": ["Be brief.", {"text": "Be rude.", "weight": -1.0}]}
    body |= {"strength": 1.5, "floor": 0.05, "placement": "user", "focus": 0.5, "loop_guard": 1}
    body |= {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 7, "return_details": True}
    chat = await post_chat(
        tiny,
        messages=[{"role": "system", "content": "Be kind."}, *user("hi")],
        max_tokens=12,
        **body,
    )
    found = await post(
        tiny, instructions="Be kind.", input=user("hi"), max_output_tokens=12, **body
    )
    assert found["details"] == chat["choices"][0]["details"]
    text = found["output"][0]["content"][0]["text"]
    assert text == chat["choices"][0]["message"]["content"]
    assert found["usage"]["base_prompt_tokens"] == chat["usage"]["base_prompt_tokens"]
    assert (found["status"], found["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert found["output"][0]["status"] == "incomplete"
    assert (found["temperature"], found["top_p"]) == (0.9, 0.8)
    streamed = await events(tiny, input="hi", max_output_tokens=3)
    assert streamed[-1]["type"] == "response.incomplete"


async def test_a_users_stored_preference(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    amulet = saying(tokenizer, {"Be brief.": "Yo", "": "Hello"})
    app = create_app(amulet, name="m", api_keys=["k"], preferences=tmp_path / "p.sqlite")
    async with asking(app, "k") as client:
        await client.put("/v1/preferences/ann", json={"preference": "Be brief.", "strength": 3.0})
        said = []
        for options in ({"user": "ann"}, {"user": "bob"}, {"user": "ann", "preference": ""}):
            response = await client.post(PATH, json={"input": "hi", **options})
            said.append(response.json()["output"][0]["content"][0]["text"])
    assert said == ["Yo", "Hello", "Hello"]


async def test_thinking_text_and_calls_are_items() -> None:
    amulet = saying(family_tokenizer("qwen"), THOUGHTFUL)
    asked: dict[str, Any] = {"input": "Weather in Rome?", "tools": [TOOL]}
    whole = await post(amulet, **asked)
    reasoning, message, call = whole["output"]
    assert reasoning["content"][0]["text"].strip() == "hm"
    assert message["content"][0]["text"].strip() == "Wait."
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert call["arguments"] == '{"city": "Rome"}'
    assert whole["status"] == "completed"
    assert whole["tools"] == [TOOL]
    thought = amulet.encode(reasoning["content"][0]["text"], special=False)
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": len(thought)}
    found = await events(amulet, **asked)
    assert without_ids(found[-1]["response"]["output"]) == without_ids(whole["output"])
    names = [event["type"].removeprefix("response.") for event in found]
    once = [name for place, name in enumerate(names) if name not in names[place - 1 : place]]
    assert once == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    # The same chat, once its items come back.
    call_id = call["call_id"]
    back = [*user("Weather in Rome?"), *whole["output"]]
    back += [{"type": "function_call_output", "call_id": call_id, "output": "sun"}]
    function = {"name": "weather", "arguments": call["arguments"]}
    said = {
        "role": "assistant",
        "content": message["content"][0]["text"],
        "reasoning_content": reasoning["content"][0]["text"],
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": call_id, "content": "sun"}
    ids = amulet.encode_chat([*user("Weather in Rome?"), said, result], tools=[WEATHER])
    again = await post(amulet, input=back, tools=[TOOL])
    assert again["usage"]["input_tokens"] == len(ids)


async def test_items_of_other_forms() -> None:
    amulet = saying(family_tokenizer("qwen"), "ok")
    call = {"type": "function_call", "call_id": "c", "name": "w", "arguments": "{}"}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", **user("hi")[0]},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {**call, "status": "completed", "id": "fc_1"},
        {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {
            "type": "function_call_output",
            "call_id": "d",
            "output": [{"type": "input_text", "text": "2"}],
        },
        *user("and?"),
    ]
    function = {"name": "w", "arguments": {}}
    messages = [
        {"role": "system", "content": "Be kind."},
        *user("hi"),
        {"role": "assistant", "content": "one"},
        {
            "role": "assistant",
            "content": "two",
            "reasoning_content": "hm",
            "tool_calls": [{"id": id_, "type": "function", "function": function} for id_ in "cd"],
        },
        *({"role": "tool", "tool_call_id": i, "content": t} for i, t in (("c", "1"), ("d", "2"))),
        *user("and?"),
    ]
    found = await post(amulet, input=items)
    assert found["usage"]["input_tokens"] == len(amulet.encode_chat(messages))


async def test_a_call_that_was_cut_is_no_item() -> None:
    amulet = saying(family_tokenizer("qwen"), CALL)
    found = await post(amulet, input="Weather?", tools=[TOOL], max_output_tokens=len(CALL) - 40)
    assert [item["type"] for item in found["output"]] == ["message"]
    assert found["status"] == "incomplete"
    assert found["invalid_tool_calls"][0]["raw"].startswith('{"name": "weather"')
    streamed = await events(
        amulet, input="Weather?", tools=[TOOL], max_output_tokens=len(CALL) - 40
    )
    assert without_ids(streamed[-1]["response"]["output"]) == without_ids(found["output"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_a_forced_call(choice: Any) -> None:
    amulet = saying(family_tokenizer("qwen"), CALL)
    found = await post(amulet, input="hi", tools=[TOOL], tool_choice=choice, max_output_tokens=90)
    assert found["output"][0]["arguments"] == '{"city": "Rome"}'
    assert found["tool_choice"] == choice


async def test_text_formats_are_grammars(tiny: Amulet) -> None:
    schema = Mood.model_json_schema()
    format_ = {"type": "json_schema", "name": "mood", "schema": schema, "strict": True}
    found = await post(tiny, input="hi", text={"format": format_}, max_output_tokens=60)
    Mood.model_validate_json(found["output"][0]["content"][0]["text"])
    assert found["text"]["format"] == format_
    free = await post(tiny, input="hi", text={"format": {"type": "json_object"}})
    assert free["output"][0]["content"][0]["text"].startswith("{")


async def test_logprobs_and_trace(tiny: Amulet) -> None:
    include = ["message.output_text.logprobs"]
    asked: dict[str, Any] = {"input": "hi", "max_output_tokens": 4, "include": include}
    found = await post(tiny, **asked, top_logprobs=2, trace=True)
    chat = await post_chat(
        tiny, messages=user("hi"), max_tokens=4, logprobs=True, top_logprobs=2, trace=True
    )
    choice = chat["choices"][0]
    tokens = found["output"][0]["content"][0]["logprobs"]
    expected = choice["logprobs"]["content"]
    assert [token["bytes"] for token in tokens] == [token["bytes"] for token in expected]
    assert [token["logprob"] for token in tokens] == pytest.approx(
        [token["logprob"] for token in expected], abs=1e-4
    )
    assert [len(token["top_logprobs"]) for token in tokens] == [2] * len(tokens)
    assert [t["token_id"] for t in found["trace"]] == [t["token_id"] for t in choice["trace"]]
    streamed = await events(tiny, **asked)
    deltas = [e["logprobs"] for e in streamed if e["type"] == "response.output_text.delta"]
    done = streamed[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert [t for delta in deltas for t in delta] == done[: sum(map(len, deltas))]
    assert [token["bytes"] for token in done] == [token["bytes"] for token in expected]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send its messages"),
        ({"conversation": "conv_1"}, "conversation", "send its items in input"),
        ({"background": True}, "background", "use stream=true"),
        ({"prompt": {"id": "p"}}, "prompt", "stores no prompts"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "shorter input"),
        ({"truncation": "auto"}, "truncation", "'disabled'"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": None}, "input", "field required"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "send the item itself"),
        ({"input": [{"type": "computer_call"}]}, "input", "input[0] has type 'computer_call'"),
        ({"input": [{"content": "hi"}]}, "input", "read as a chat: messages[0]"),
        ({"input": [{"role": "x", "content": "hi"}]}, "input", "has role 'x'"),
        ({"input": "x" * 600}, "input", "context window 512"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            "an image, and qwen2 takes none: qwen2 reads text alone",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools", "this server runs no tools"),
        ({"tools": [WEATHER]}, "tools", '"name": ..., "parameters"'),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "of type 'mcp'"),
        ({"tool_choice": "required"}, "tool_choice", "requires tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "text.format: expected"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens=5000: this server"),
        ({"max_tokens": 5}, "max_tokens", "it is called max_output_tokens here"),
        ({"preference": {"text": " "}}, "preference", "is empty"),
        ({"strength": 2000}, "strength", "less than or equal to 1000"),
        ({"metadata": {"a": 1}}, "metadata", "valid string"),
        ({"n": 2}, "n", "unknown option"),
    ],
)
async def test_refusals_name_the_field(
    tiny: Amulet, body: dict[str, Any], param: str, words: str
) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        for streamed in ({}, {"stream": True}):
            response = await client.post(PATH, json={"input": "hi", **body, **streamed})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param)
            assert words in error["message"]


async def test_nothing_is_stored(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        for method in ("GET", "DELETE"):
            response = await client.request(method, f"{PATH}/resp_1")
            assert response.status_code == 404
            assert "stores no responses" in response.json()["error"]["message"]


async def test_a_failure_in_a_stream_is_its_last_event(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    class Failing(ScriptedModel):
        def _next(self, ids: list[int]) -> int:
            if ids[-1] == ord("l"):
                raise DecodeError("broke")
            return super()._next(ids)

    amulet = Amulet(Failing(tokenizer, "hello"), tokenizer)
    last = (await events(amulet, input="x"))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "broke"}


@pytest.mark.allow_hosts(["127.0.0.1"])
async def test_openais_client(tiny: Amulet, tiny_url: str) -> None:
    extra = {"preference": "Be brief.", "strength": 1.0}
    ours = tiny.chat(user("hi"), max_new_tokens=12, **extra)
    asked: dict[str, Any] = {"model": "tiny", "input": "hi", "max_output_tokens": 12}
    asked |= {"extra_body": extra}
    with openai.OpenAI(base_url=f"{tiny_url}/v1", api_key="k", max_retries=0) as client:
        assert client.responses.create(**asked).output_text == ours.text
        pieces = list(client.responses.create(**asked, stream=True))
        deltas = [piece.delta for piece in pieces if piece.type == "response.output_text.delta"]
        assert "".join(deltas) == ours.text
        parsed = client.responses.parse(
            model="tiny", input="hi", text_format=Mood, max_output_tokens=60
        )
        assert parsed.output_parsed in (Mood(mood="good"), Mood(mood="bad"))
        with client.responses.stream(
            model="tiny", input="hi", text_format=Mood, max_output_tokens=60
        ) as stream:
            assert stream.get_final_response().output_parsed == parsed.output_parsed
        with pytest.raises(openai.BadRequestError, match="stores no conversation") as bad:
            client.responses.create(**asked, previous_response_id="resp_1")
        assert bad.value.param == "previous_response_id"
    async with openai.AsyncOpenAI(base_url=f"{tiny_url}/v1", api_key="k") as aclient:
        assert (await aclient.responses.create(**asked)).output_text == ours.text
        said = ""
        async for piece in await aclient.responses.create(**asked, stream=True):
            said += piece.delta if piece.type == "response.output_text.delta" else ""
        assert said == ours.text


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_openais_client_calls_tools() -> None:
    amulet = saying(family_tokenizer("qwen"), {"sun in": "Sunny.", "": THOUGHTFUL})
    with (
        listening(create_app(amulet, name="m")) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        responses: Any = client.responses
        with responses.stream(model="m", input="Weather?", tools=[TOOL]) as stream:
            first = stream.get_final_response()
        (call,) = (item for item in first.output if item.type == "function_call")
        assert (call.name, call.arguments) == ("weather", '{"city": "Rome"}')
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun in Rome"}
        items = [*user("Weather?"), *first.output, result]
        assert responses.create(model="m", input=items, tools=[TOOL]).output_text == "Sunny."
