"""POST /v1/chat/completions and /v1/completions: what is answered, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Grammar
from amulet.serve.app import create_app
from tests.serve.conftest import asking, saying, user
from tests.templates import family_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def post(amulet: Amulet, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    async with asking(create_app(amulet, name="m")) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def chunks(amulet: Amulet, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
    async with asking(create_app(amulet, name="m")) as client:
        response = await client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def about(figures: list[float]) -> Any:
    return pytest.approx(figures, abs=1e-4)


async def test_a_plain_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    found = await post(saying(tokenizer, "hello"), model="m", messages=user("hi"))
    assert found["object"] == "chat.completion"
    assert found["model"] == "m"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert found["usage"] == {
        "prompt_tokens": 21,
        "completion_tokens": 6,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 0},
        "base_prompt_tokens": 0,
    }


async def test_prompt_tokens_that_were_reused_are_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = saying(tokenizer, "hello")
    first = user("a question of some length")
    again = [*first, {"role": "assistant", "content": "hello"}, *user("and?")]
    for options in ({}, {"preference": "Be brief.", "placement": "user"}):
        details = []
        for messages in (first, again):
            found = await post(amulet, messages=messages, **options)
            details.append(found["usage"]["prompt_tokens_details"])
        shared = len(amulet.encode_chat(first)) + len("hello")
        if options:  # the next turn has the preference elsewhere, but the base row's chat is kept
            shared = details[1]["cached_tokens"]
            assert 0 < shared < found["usage"]["prompt_tokens"]
        else:
            assert details[0] == {"cached_tokens": 0}
        assert details[1] == {"cached_tokens": shared}
    usage = (await chunks(amulet, messages=again, stream_options={"include_usage": True}))[-1]
    whole = usage["usage"]["prompt_tokens"]
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": whole - 1}
    reply = amulet.chat(again)
    assert reply.usage.cached_tokens == whole - 1


async def test_completions_count_them_too(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet, path = saying(tokenizer, "hello"), "/v1/completions"
    asked = {"prompt": "a text of some length\n", "stream_options": {"include_usage": True}}
    for cached in (0, 21):  # all but the last token, from which the next one follows
        found = (await chunks(amulet, path, **asked))[-1]
        assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
    found = await post(amulet, path, prompt=asked["prompt"])
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 21}


async def test_a_stream_says_the_same_in_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"include_usage": True}
    found = await chunks(
        saying(tokenizer, "héy"), messages=user("hi"), stream_options=options, max_tokens=50
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in found[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "h"},
        {"content": "é"},
        {"content": "y"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found[:-1]]
    assert reasons == [None, None, None, None, "stop"]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 5
    assert len({chunk["id"] for chunk in found}) == 1


async def test_the_preference_steers_as_in_the_process(tiny: Amulet) -> None:
    wishes: list[Any] = [
        "Be brief.",
        {"text": "Be brief.", "weight": 0.5},
        ["Be brief.", {"text": "Be rude.", "weight": -1.0}],
        "",
    ]
    for wish in wishes:
        options = {"preference": wish, "strength": 1.5, "floor": 0.05, "placement": "user"}
        options |= {"focus": 0.5, "loop_guard": 1}
        ours = tiny.chat(user("hi"), max_new_tokens=12, **options)
        found = await post(tiny, messages=user("hi"), max_tokens=12, return_details=True, **options)
        choice = found["choices"][0]
        assert choice["message"]["content"] == ours.text
        assert choice["details"]["token_ids"] == list(ours.token_ids)
        steering = ours.steering.model_dump() if ours.steering else None
        assert choice["details"]["steering"] == steering
        assert found["usage"]["base_prompt_tokens"] == ours.usage.base_prompt_tokens


async def test_choices_have_seeds_of_their_own(tiny: Amulet) -> None:
    sampled = {"temperature": 1.0, "top_p": 0.9}
    seeds = (7, 8, 9)
    ours = [tiny.chat(user("hi"), max_new_tokens=8, seed=seed, **sampled) for seed in seeds]
    found = await post(tiny, messages=user("hi"), max_tokens=8, seed=7, n=3, **sampled)
    assert [choice["message"]["content"] for choice in found["choices"]] == [r.text for r in ours]
    assert found["usage"]["prompt_tokens"] == 21
    assert found["usage"]["completion_tokens"] == 24
    streamed = await chunks(tiny, messages=user("hi"), max_tokens=8, seed=7, n=3, **sampled)
    texts = ["", "", ""]
    for chunk in streamed:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [reply.text for reply in ours]


async def test_stop_strings_and_limits(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = saying(tokenizer, "one two three")
    for options, text, reason in (
        ({"stop": " three"}, "one two", "stop"),
        ({"stop": ["x", "two"]}, "one ", "stop"),
        ({"max_tokens": 3}, "one", "length"),
        ({"max_completion_tokens": 5, "max_tokens": 9}, "one t", "length"),
    ):
        found = await post(amulet, messages=user("hi"), **options)
        choice = found["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


async def test_logprobs_and_trace(tiny: Amulet) -> None:
    options: dict[str, Any] = {"preference": "Be brief."}
    ours = tiny.chat(user("hi"), max_new_tokens=4, trace=True, top_logprobs=2, **options).trace
    assert ours is not None
    found = await post(
        tiny,
        messages=user("hi"),
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        trace=True,
        **options,
    )
    choice = found["choices"][0]
    content = choice["logprobs"]["content"]
    # Another batch, and a kept prefix, round the last digits another way.
    assert [entry["logprob"] for entry in content] == about([token.steered for token in ours])
    for entry, token in zip(content, ours, strict=True):
        likely = [logprob for _, _, logprob in token.top]
        assert [top["logprob"] for top in entry["top_logprobs"]] == about(likely)
    assert [entry["base"] for entry in choice["trace"]] == about([token.base for token in ours])
    assert [entry["unsteered_id"] for entry in choice["trace"]] == [t.unsteered_id for t in ours]
    streamed = await chunks(
        tiny, messages=user("hi"), max_tokens=4, logprobs=True, top_logprobs=2, **options
    )
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    pieces = [entry for part in parts if part for entry in part["content"]]
    assert [entry["token"] for entry in pieces] == [entry["token"] for entry in content]
    assert [entry["logprob"] for entry in pieces] == about([entry["logprob"] for entry in content])


async def test_tools_and_what_they_say() -> None:
    tokenizer = family_tokenizer("qwen")
    amulet = saying(tokenizer, f"<think>\nhm\n</think>\n\nWait. {CALL}")
    options = {"messages": user("Weather in Rome?"), "tools": [WEATHER]}
    found = await post(amulet, **options)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Wait."
    assert choice["message"]["reasoning_content"].strip() == "hm"
    call = choice["message"]["tool_calls"][0]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    deltas = [chunk["choices"][0]["delta"] for chunk in await chunks(amulet, **options)]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "weather"
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city": "Rome"}'
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).strip() == "hm"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_a_forced_call_is_one(choice: Any) -> None:
    amulet = saying(family_tokenizer("qwen"), CALL)
    found = await post(
        amulet, messages=user("hi"), tools=[WEATHER], tool_choice=choice, max_tokens=90
    )
    call = found["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert found["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
async def test_a_forced_call_goes_before_a_response_format(choice: Any) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "m", "schema": {"type": "object"}}}
    options: dict[str, Any] = {"messages": user("hi"), "tools": [WEATHER], "max_tokens": 90}
    for form in (wrapped, {"type": "json_object"}):
        forced = {**options, "tool_choice": choice, "response_format": form}
        amulet = saying(family_tokenizer("qwen"), CALL)
        found = (await post(amulet, **forced))["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
        deltas = [chunk["choices"][0]["delta"] for chunk in await chunks(amulet, **forced)]
        parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
        said = "".join(part["function"]["arguments"] for part in parts)
        assert said == '{"city": "Rome"}'
    for kind in ("auto", "none"):
        amulet = saying(family_tokenizer("qwen"), '{"a": 1}')
        found = await post(amulet, **options, tool_choice=kind, response_format=wrapped)
        assert found["choices"][0]["message"]["content"] == '{"a": 1}'


async def test_the_history_of_calls_comes_as_openai_has_it() -> None:
    amulet = saying(family_tokenizer("qwen"), {'"city": "Rome"': "Sunny.", "": "lost"})
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abc",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    }
    result = {"role": "tool", "tool_call_id": "abc", "content": "sun"}
    found = await post(
        amulet, messages=[*user("Weather?"), called, result], tools=[WEATHER], max_tokens=20
    )
    assert found["choices"][0]["message"]["content"] == "Sunny."


async def test_parts_that_clients_send_back(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = saying(tokenizer, "ok")
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    asked = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"role": "assistant", "content": [thought, {"type": "output_text", "text": "yes"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "an"}, {"type": "text", "text": "d?"}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't."}]},
        *user("why?"),
        {"role": "assistant", "content": None, "refusal": "No."},
        *user("oh"),
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        *user("so?"),
    ]
    said = ["hi", "yes", "and?", "I won't.", "why?", "No.", "oh", "", "so?"]
    roles = ["user", "assistant"] * 5
    plain = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    for tools in (None, [WEATHER]):
        async with asking(create_app(amulet, name="m")) as client:
            options = {"tools": tools}
            one = await client.post("/tokenize", json={"messages": asked, **options})
            other = await client.post("/tokenize", json={"messages": plain, **options})
        assert one.json() == other.json()
    found = await post(amulet, messages=asked)
    assert found["choices"][0]["message"]["content"] == "ok"


async def test_reasoning_parts_are_the_templates_reasoning() -> None:
    tokenizer = family_tokenizer("qwen")
    shown = "{%- for m in messages %}{{ m.role }}: {{ m.reasoning_content }} {{ m.content }}|"
    tokenizer.chat_template = shown + "{%- endfor %}{%- if add_generation_prompt %}>{%- endif %}"
    amulet = saying(tokenizer, "ok")
    for part in (
        {"type": "reasoning", "text": "hm"},
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "reasoning", "reasoning": "hm"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
    ):
        one = {"role": "assistant", "content": [part, {"type": "text", "text": "Wait."}]}
        ids = amulet.encode_chat([*user("hi"), one, *user("and?")])
        assert "assistant: hm Wait.|" in amulet.tokenizer.decode(ids)


async def test_response_formats_are_grammars(tiny: Amulet) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
    }
    wrapped = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    found = await post(tiny, messages=user("hi"), max_tokens=40, response_format=wrapped)
    ours = tiny.chat(
        user("hi"),
        max_new_tokens=40,
        grammar=Grammar.json_schema({**schema, "additionalProperties": False}),
    )
    assert found["choices"][0]["message"]["content"] == ours.text
    assert json.loads(ours.text) in ({"mood": "good"}, {"mood": "bad"})
    # As llama.cpp, Together and others have it: the schema beside the type.
    for beside in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "schema": schema},
        {"type": "json_object", "schema": {**schema, "type": "object"}, "json_schema": None},
    ):
        found = await post(tiny, messages=user("hi"), max_tokens=40, response_format=beside)
        assert found["choices"][0]["message"]["content"] == ours.text
    text = await post(tiny, messages=user("hi"), max_tokens=4, response_format={"type": "text"})
    assert text["choices"][0]["finish_reason"] == "length"


async def test_completions(tiny: Amulet) -> None:
    path = "/v1/completions"
    ours = [tiny.complete(prompt, max_new_tokens=16, trace=True) for prompt in ("hi", "ho")]
    found = await post(tiny, path, prompt=["hi", "ho"], logprobs=0)
    assert [choice["text"] for choice in found["choices"]] == [reply.text for reply in ours]
    for choice, reply in zip(found["choices"], ours, strict=True):
        figures = [token.steered for token in reply.trace or ()]
        assert choice["logprobs"]["token_logprobs"] == about(figures)
    assert found["usage"]["prompt_tokens"] == 4
    assert found["usage"]["completion_tokens"] == 32
    streamed = await chunks(tiny, path, prompt="hi")
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == ours[0].text
    assert streamed[0]["object"] == "text_completion"


async def test_what_changes_nothing_is_accepted(tokenizer: PreTrainedTokenizerFast) -> None:
    found = await post(
        saying(tokenizer, "ok"),
        messages=user("hi"),
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        reasoning_effort="low",
        verbosity="low",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
        functions=[],
        user="u" * 300,
    )
    assert found["choices"][0]["message"]["content"] == "ok"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_null_is_not_asked_for(tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Clients send null for what they leave out, in names that no server need know."""
    names = ["stream", "stream_options", "temperature", "top_p", "n", "stop", "seed", "logprobs"]
    names += ["max_tokens", "trace", "return_details", "steer_grammar", "audio", "preference"]
    names += ["tools", "tools_prompt", "parallel_tool_calls", "response_format", "what_is_to_come"]
    source = {"messages": user("hi")} if "chat" in path else {"prompt": "hi\n"}
    nulls = dict.fromkeys(names)
    found = await post(saying(tokenizer, "ok"), path, **source, **nulls)
    choice = found["choices"][0]
    assert (choice["message"]["content"] if "chat" in path else choice["text"]) == "ok"


async def test_a_message_that_came_from_a_client_goes_back_as_it_came(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    said = {"role": "assistant", "content": "yes", "refusal": None, "audio": None}
    said |= {"function_call": None, "tool_calls": None, "annotations": []}
    amulet = saying(tokenizer, "ok")
    asked = [*user("hi"), said, *user("and?")]
    found = await post(amulet, messages=asked)
    assert found["choices"][0]["message"]["content"] == "ok"
    plain = [*user("hi"), {"role": "assistant", "content": "yes"}, *user("and?")]
    assert found["usage"]["prompt_tokens"] == len(amulet.encode_chat(plain))


async def test_any_integer_is_a_seed(tiny: Amulet) -> None:
    sampled = {"temperature": 1.0, "max_tokens": 8, "messages": user("hi")}
    for asked, seed in ((-1, 2**63 - 1), (2**63 - 1, 2**63 - 1), (2**64 + 7, 7), (-(2**63), 0)):
        found = await post(tiny, seed=asked, **sampled)
        ours = tiny.chat(user("hi"), temperature=1.0, max_new_tokens=8, seed=seed)
        assert found["choices"][0]["message"]["content"] == ours.text
    both = await post(tiny, seed=2**63 - 1, n=2, **sampled)
    first = tiny.chat(user("hi"), temperature=1.0, max_new_tokens=8, seed=0)
    assert both["choices"][1]["message"]["content"] == first.text


async def test_how_other_servers_say_off_and_greedy(tiny: Amulet) -> None:
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    off = await post(tiny, messages=user("hi"), max_tokens=8, top_k=-1, **sampled)
    ours = tiny.chat(user("hi"), max_new_tokens=8, **sampled)
    assert off["choices"][0]["message"]["content"] == ours.text
    greedy = await post(tiny, messages=user("hi"), max_tokens=8, top_p=0, **sampled)
    ours = tiny.chat(user("hi"), max_new_tokens=8)
    assert greedy["choices"][0]["message"]["content"] == ours.text


async def test_tokens_are_those_of_the_engine(tiny: Amulet) -> None:
    async with asking(create_app(tiny, name="m")) as client:
        text = await client.post("/tokenize", json={"prompt": "héy"})
        chat = await client.post("/tokenize", json={"messages": user("hi")})
    ids = list("héy".encode())
    assert text.json() == {"count": 4, "max_model_len": 512, "tokens": ids}
    assert chat.json()["tokens"] == tiny.encode_chat(user("hi"))


async def test_line_ends_of_unicode_end_no_event(tokenizer: PreTrainedTokenizerFast) -> None:
    said = "a\u2028b\x85c\u2029d"
    amulet = saying(tokenizer, said)
    async with asking(create_app(amulet, name="m")) as client:
        body = {"messages": user("hi"), "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    found = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(found) == said
