"""One table of cases: messages and options in, what reaches the engine, what comes out."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

import llama_index.core
import pytest
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program import LLMTextCompletionProgram
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import BaseModel

import amulet_integrations.llama_index as package
from amulet import Preference
from amulet.errors import RequestError
from amulet.preference import DEFAULT_STEERING
from amulet_integrations.llama_index import AmuletLLM, preference, preference_message
from tests.llama_index.doubles import PLAIN, STEERED, WISH, calling, scripted
from tests.models import byte_tokenizer

USER = ChatMessage(role="user", content="Hi")


@dataclass
class Case:
    """What a user says, what must reach the engine, and the text that must come out."""

    name: str
    messages: list[ChatMessage] = field(default_factory=lambda: [USER])
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reaches: dict[str, Any] = field(default_factory=dict)
    says: str = PLAIN


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": messages}


CASES = [
    Case("plain", reaches={**chat({"role": "user", "content": "Hi"}), "preference": ()}),
    Case(
        "preference of the call",
        options={"preference": WISH},
        reaches={"preference": (Preference(WISH),)},
        says=STEERED,
    ),
    Case("preference of the model", model={"preference": WISH}, says=STEERED),
    Case("off for a call", model={"preference": WISH}, options={"preference": ""}),
    Case(
        "all of the steering",
        options={"preference": WISH, "strength": 1.5, "floor": 0.2, "placement": "user"},
        reaches={"strength": 1.5, "floor": 0.2, "placement": "user"},
        says=STEERED,
    ),
    Case("max_tokens", options={"max_tokens": 3}, reaches={"max_new_tokens": 3}, says=PLAIN[:3]),
    Case("max_new_tokens", options={"max_new_tokens": 2}, says=PLAIN[:2]),
    Case("max_tokens of the model", model={"max_new_tokens": 4}, says=PLAIN[:4]),
    Case("stop", options={"stop": ["wind"]}, reaches={"stop": ("wind",)}, says="A long and "),
    Case("stop of the model", model={"stop": "long"}, says="A "),
    Case("no stop for a call", model={"stop": "long"}, options={"stop": []}),
    Case(
        "sampling",
        options={"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7},
        reaches={"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7},
    ),
    Case("zero is an answer", model={"temperature": 0.7}, options={"temperature": 0},
         reaches={"temperature": 0.0}),
    Case("None inherits", model={"temperature": 0.7}, options={"temperature": None},
         reaches={"temperature": 0.7}),
    Case(
        "system prompt",
        model={"system_prompt": "You are kind."},
        reaches=chat(
            {"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hi"}
        ),
    ),
    Case(
        "system prompt is not doubled",
        model={"system_prompt": "You are kind."},
        messages=[ChatMessage(role="system", content="You are kind."), USER],
        reaches=chat(
            {"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hi"}
        ),
    ),
    Case(
        "text blocks",
        messages=[ChatMessage(role="user", blocks=[TextBlock(text="a"), TextBlock(text="b"),
                  CachePoint(cache_control=CacheControl(type="ephemeral"))])],
        reaches=chat({"role": "user", "content": "a\nb"}),
    ),
    Case(
        "roles",
        messages=[
            ChatMessage(role="developer", content="d"),
            USER,
            ChatMessage(role="chatbot", content="c"),
            ChatMessage(role="user", content="u"),
        ],
        reaches=chat(
            {"role": "system", "content": "d"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "u"},
        ),
    ),
    Case(
        "messages_to_prompt",
        model={"messages_to_prompt": lambda said: f"<{said[-1].content}>"},
        reaches={"prompt": "<Hi>", "messages": None},
    ),
    Case(
        "thinking off",
        options={"enable_thinking": False, "template_options": {"x": 1}},
        reaches={"template_options": {"x": 1, "enable_thinking": False}},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_contract(case: Case) -> None:
    llm = scripted(**case.model)

    def reached(text: str | None) -> None:
        request = llm.amulet.last
        assert {name: getattr(request, name) for name in case.reaches} == case.reaches
        assert text == case.says

    reached(llm.chat(case.messages, **case.options).message.content)
    reached((await llm.achat(case.messages, **case.options)).message.content)
    streamed = list(llm.stream_chat(case.messages, **case.options))
    reached(streamed[-1].message.content)
    assert "".join(piece.delta or "" for piece in streamed) == case.says
    streamed = [piece async for piece in await llm.astream_chat(case.messages, **case.options)]
    reached(streamed[-1].message.content)
    assert "".join(piece.delta or "" for piece in streamed) == case.says


async def test_completions() -> None:
    llm = scripted(preference=WISH)
    as_chat = ({"role": "user", "content": "Hi"},)
    assert llm.complete("Hi").text == STEERED
    assert llm.amulet.last.messages == as_chat
    assert (await llm.acomplete("Hi")).text == STEERED
    assert [piece.text for piece in llm.stream_complete("Hi")][-1] == STEERED
    pieces = [piece async for piece in await llm.astream_complete("Hi")]
    assert "".join(piece.delta or "" for piece in pieces) == STEERED
    assert pieces[-1].raw["usage"]["completion_tokens"] == len(STEERED) + 1
    assert llm.complete("Q: Hi\nA:", formatted=True).text == STEERED
    assert llm.amulet.last.prompt == "Q: Hi\nA:"
    own = scripted(completion_to_prompt=lambda prompt: f"Q: {prompt}\nA:")
    assert own.complete("Hi").text == PLAIN
    assert own.amulet.last.prompt == "Q: Hi\nA:"


def test_usage_finish_reason_and_source() -> None:
    response = scripted(preference=WISH).chat([USER])
    usage = {
        "prompt_tokens": 32,
        "completion_tokens": 7,
        "total_tokens": 39,
        "base_prompt_tokens": 49,  # those of focus among them
    }
    assert response.additional_kwargs == usage
    assert response.raw == {
        "model": "scripted",
        "stage": "answer",
        "preference_source": "constructor",
        "finish_reason": "stop",
        "stop_string": None,
        "usage": usage,
        "steering": DEFAULT_STEERING.model_dump(),
    }
    plain = scripted().chat([USER], max_tokens=2)
    assert plain.raw["finish_reason"] == "length"
    assert plain.raw["steering"] is None
    assert plain.additional_kwargs["base_prompt_tokens"] == 0


def test_logprobs() -> None:
    response = scripted().chat([USER], trace=True, top_logprobs=2)
    assert response.logprobs is not None
    assert [row[0].token for row in response.logprobs][:6] == list("A long")
    assert [len(row) for row in response.logprobs] == [3] * len(response.logprobs)


def test_metadata_is_true_to_the_model() -> None:
    llm = scripted(max_tokens=33, window=512)
    assert llm.metadata.model_dump() == {
        "context_window": 512 - 64,  # an eighth of it, for a preference to come
        "num_output": 33,
        "is_chat_model": True,
        "is_function_calling_model": False,
        "model_name": "scripted",
        "system_role": "system",
    }
    assert scripted(tools_prompt="fallback").metadata.is_function_calling_model
    assert calling("x").metadata.is_function_calling_model
    own = calling("x", messages_to_prompt=lambda said: "x")
    assert not own.metadata.is_function_calling_model


def test_a_model_calls_functions_only_where_its_calls_are_read() -> None:
    tokenizer = byte_tokenizer()
    # Tools are shown, in no dialect that is known.
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }} Write CALL name(args).{% endif %}"
        + tokenizer.chat_template
    )
    llm = scripted(tokenizer=tokenizer)
    assert not llm.metadata.is_function_calling_model
    assert isinstance(
        get_program_for_llm(Answer, PromptTemplate("?"), llm), LLMTextCompletionProgram
    )
    assert scripted(tokenizer=tokenizer, tools_prompt="fallback").metadata.is_function_calling_model


class Answer(BaseModel):
    text: str


# ---- the context window ----

LONG_WISH = "Answer as briefly as you can, and as if to a child, please, now."
MODES = [mode for mode in ResponseMode if mode not in ("no_text", "context_only")]


def test_the_window_leaves_room_for_the_preference_in_force() -> None:
    llm = scripted(window=4096)
    assert llm.metadata.context_window == 4096 - 256
    with preference(LONG_WISH):
        assert llm.metadata.context_window == 4096 - 256 - 64
        assert llm.with_preference("").metadata.context_window == 4096 - 256
    both = scripted(window=4096, preference=[LONG_WISH, WISH], placement="both")
    assert both.metadata.context_window == 4096 - 256 - 2 * 64
    assert scripted(window=8).metadata.context_window == 7


@pytest.mark.parametrize("mode", MODES)
async def test_what_llama_index_packs_leaves_room_for_a_wish(
    mode: ResponseMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = scripted({"": "word"}, window=2048, max_tokens=200)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", llm.amulet.tokenizer.encode)
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)
    nodes = [NodeWithScore(node=TextNode(text="Moss grows on the mill. " * 200))]
    with preference(LONG_WISH, placement="system"):
        await synthesizer.asynthesize("Where is moss?", nodes)
        assert "word" in str(synthesizer.synthesize("Where is moss?", nodes))
    for request in llm.amulet.requests:
        assert len(llm.amulet.encode_chat(request.messages)) + 64 + 200 <= 2048


def test_a_base_model_completes() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    llm = scripted(tokenizer=tokenizer, preference=WISH)
    assert not llm.metadata.is_chat_model
    assert llm.complete("Once").text == STEERED
    assert llm.amulet.last.prompt == "Once"
    assert llm.chat([USER]).message.content == STEERED
    assert llm.amulet.last.prompt == "user: Hi\nassistant: "


UNKNOWN = [
    ({"temprature": 1}, "did you mean temperature?"),
    ({"json_mode": True}, "use structured_predict() or as_structured_llm()."),
    ({"do_sample": True}, "use temperature: 0 is greedy, above 0 samples."),
    ({"n_predict": 3}, "use max_tokens."),
    ({"preferance": "x"}, "did you mean preference?"),
    ({"whatever": 3}, "leave it out."),
]


def test_a_misplaced_preference_of_a_message_is_told() -> None:
    message = ChatMessage(role="user", content="Hi", additional_kwargs={"preference": WISH})
    with pytest.warns(
        UserWarning, match=r"'preference' of its additional_kwargs is not used; .*_message\("
    ) as told:
        scripted().chat([message])
    assert [warning.filename for warning in told] == [__file__]  # not ours, nor LlamaIndex's
    told = ChatMessage(role="user", content="Hi", additional_kwargs={"reference": 1, "id": 2})
    assert scripted().chat([told]).message.content == PLAIN


def test_a_misspelt_setting_of_a_marked_message_is_refused() -> None:
    with pytest.raises(RequestError, match=r"option strenght=2: did you mean strength\?"):
        preference_message(WISH, strenght=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(("given", "hint"), UNKNOWN)
async def test_unknown_options_are_refused(given: dict[str, Any], hint: str) -> None:
    llm = scripted()
    (name, value), *_ = given.items()
    expected = f"AmuletLLM does not know the option {name}={value!r}: {hint}"
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError) as refused:
            call([USER], **given)
        assert str(refused.value) == expected
    for complete in (llm.complete, llm.stream_complete):
        with pytest.raises(RequestError, match="does not know"):
            complete("Hi", **given)
    with pytest.raises(RequestError, match="does not know"):
        await llm.achat([USER], **given)
    with pytest.raises(RequestError, match="does not know"):
        await llm.astream_chat([USER], **given)
    with pytest.raises(RequestError, match="does not know"):
        AmuletLLM(amulet=llm.amulet, **given)
    assert llm.amulet.requests == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seed": "five"}, "seed='five'"),
    ({"max_tokens": 2.5}, "max_new_tokens=2.5"),
    ({"max_tokens": 2, "max_new_tokens": 3}, "are one option"),
    ({"template_options": "x", "enable_thinking": True}, "template_options='x': expected a dict"),
    ({"enable_thinking": "no"}, "enable_thinking='no': expected True or False"),
    ({"tools": "x"}, "tools='x'"),
    ({"tool_choice": "any"}, "requires tools"),
    ({"preference": (wish for wish in [WISH])}, "can be read only once"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
async def test_options_of_a_wrong_type_are_refused(given: dict[str, Any], said: str) -> None:
    llm = scripted()
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError, match=re.escape(said)):
            call([USER], **given)
    for acall in (llm.achat, llm.astream_chat):
        with pytest.raises(RequestError, match=re.escape(said)):
            await acall([USER], **given)
    assert llm.amulet.steered == []


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(RequestError, match=r"messages\[0\] is a dict: expected a ChatMessage"):
        scripted().chat([{"role": "user", "content": "Hi"}])


def test_a_generator_of_preferences_holds_for_many_calls_or_is_refused() -> None:
    amulet = scripted().amulet
    with pytest.raises(RequestError, match="can be read only once"):
        AmuletLLM(amulet=amulet, preference=(wish for wish in [WISH]))
    pinned = AmuletLLM(amulet=amulet).with_preference(wish for wish in [WISH])
    with preference(wish for wish in [WISH]):
        for llm in (pinned, AmuletLLM(amulet=amulet)):
            assert [llm.complete("Hi").text for _ in range(2)] == [STEERED, STEERED]
    said = [preference_message(wish for wish in [WISH]), USER]
    assert [pinned.chat(said).message.content for _ in range(2)] == [STEERED, STEERED]


def test_ranges_are_checked_by_the_constructor() -> None:
    amulet = scripted().amulet
    with pytest.raises(RequestError, match=r"top_p=2"):
        AmuletLLM(amulet=amulet, top_p=2)
    with pytest.raises(RequestError, match="strength"):
        AmuletLLM(amulet=amulet, preference=WISH, strength=1e9)
    with pytest.raises(RequestError, match="No model given"):
        AmuletLLM()
    with pytest.raises(RequestError, match="one option"):
        AmuletLLM(amulet=amulet, max_tokens=1, max_new_tokens=2)


def test_a_block_that_a_text_model_cannot_read_is_an_error() -> None:
    image = ChatMessage(role="user", blocks=[ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(RequestError, match="an image, and llama takes none: llama reads text alon"):
        scripted().chat([image])
    sound = ChatMessage(role="user", blocks=[AudioBlock(url="http://localhost/x.mp3")])
    with pytest.raises(RequestError, match=r"messages\[0\] has a audio block: models here read on"):
        scripted().chat([sound])


def test_typed_blocks_reach_the_template() -> None:
    call = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"a": 1})
    said = [
        USER,
        ChatMessage(role="assistant", blocks=[ThinkingBlock(content="Hm."), call]),
        ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": "c1"}),
    ]
    llm = calling({"": "Three."})
    assert llm.chat(said).message.content == "Three."
    assert llm.amulet.last.messages[1:] == (
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1}'},
                }
            ],
            "reasoning_content": "Hm.",
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    )


async def test_thinking_comes_as_a_block() -> None:
    llm = calling({"": "<think>\nHm.\n</think>\n\nThree."})
    response = llm.chat([USER])
    assert [block.block_type for block in response.message.blocks] == ["thinking", "text"]
    assert response.message.blocks[0].content.strip() == "Hm."
    assert response.message.content.strip() == "Three."
    pieces = [piece async for piece in await llm.astream_chat([USER])]
    thought = "".join(piece.additional_kwargs.get("thinking_delta", "") for piece in pieces)
    assert thought.strip() == "Hm."
    assert "".join(piece.delta or "" for piece in pieces).strip() == "Three."


# ---- LlamaIndex's own machinery ----


def test_token_counts_reach_the_callbacks() -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 1000)  # must not be needed
    llm = scripted(callback_manager=CallbackManager([counter]))
    llm.chat([USER], preference=WISH)
    list(llm.stream_chat([USER]))
    llm.complete("Hi")
    used = [(e.prompt_token_count, e.completion_token_count) for e in counter.llm_token_counts]
    assert used == [(32, 7), (21, 27), (21, 27)]


class Listener(BaseEventHandler):
    seen: list[Any]

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(event)


async def test_instrumentation_events_carry_the_usage() -> None:
    listener = Listener(seen=[])
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(listener)
    try:
        scripted().chat([USER])
        async for _ in await scripted().astream_chat([USER]):
            pass
    finally:
        dispatcher.event_handlers.remove(listener)
    ends = [event for event in listener.seen if event.class_name() == "LLMChatEndEvent"]
    assert [event.response.raw["usage"]["completion_tokens"] for event in ends] == [27, 27]
    starts = [event for event in listener.seen if event.class_name() == "LLMChatStartEvent"]
    assert [event.model_dict["class_name"] for event in starts] == ["AmuletLLM"] * 2
    progress = [event for event in listener.seen if event.class_name() == "LLMChatInProgressEvent"]
    assert len(progress) == 27


def test_serialisation_leaves_the_model_out() -> None:
    llm = scripted(preference=Preference(WISH, 0.5), temperature=0.3, stop=["x"])
    data = json.loads(llm.to_json())
    assert data["class_name"] == "AmuletLLM"
    assert data["model"] == "scripted"
    assert data["preference"] == {"text": WISH, "weight": 0.5}
    assert not {"amulet", "dtype", "device", "callback_manager"} & set(data)
    again = AmuletLLM.from_dict(data, amulet=llm.amulet)
    assert again.to_dict() == {**llm.to_dict(), "preference": data["preference"]}
    assert issubclass(AmuletLLM, FunctionCallingLLM)


def test_payload_for_observers_has_no_preference() -> None:
    assert WISH not in json.dumps(scripted(preference=WISH).to_payload())


def test_public_names() -> None:
    assert package.__all__ == [
        "AmuletLLM",
        "PreferenceMemoryBlock",
        "forget_preference",
        "preference",
        "preference_message",
        "preference_of",
        "set_preference",
    ]


# ---- asyncio ----


async def test_the_first_piece_comes_before_the_last_is_decoded() -> None:
    llm = scripted()
    stream = await llm.astream_chat([USER])
    first = await anext(stream)
    assert first.delta == "A"
    await stream.aclose()
    steps = len(llm.amulet.model.calls)
    await asyncio.sleep(0.05)
    assert steps <= len(llm.amulet.model.calls) < len(PLAIN)  # closed: the decode has ended


async def test_the_loop_runs_on_while_an_answer_is_decoded() -> None:
    llm = scripted({"": "word " * 100})
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(turning())
    answer = await llm.achat([USER], max_tokens=300)
    task.cancel()
    assert answer.message.content == "word " * 60
    assert turns > 300


async def test_cancelling_ends_the_decode() -> None:
    llm = scripted({"": "word " * 1000})
    task = asyncio.create_task(llm.achat([USER], max_tokens=5000))
    while len(llm.amulet.model.calls) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.1)
    steps = len(llm.amulet.model.calls)
    await asyncio.sleep(0.1)
    assert len(llm.amulet.model.calls) == steps


def test_closing_a_stream_ends_the_decode() -> None:
    llm = scripted()
    stream = llm.stream_chat([USER])
    assert next(stream).delta == "A"
    stream.close()
    steps = len(llm.amulet.model.calls)
    assert llm.chat([USER], max_tokens=1).message.content == "A"
    assert len(llm.amulet.model.calls) == steps + 1
