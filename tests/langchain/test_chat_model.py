"""ChatAmulet alone: options, precedence, metadata, streams, counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import (
    ConfigurableField,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)

from amulet import Amulet, Preference, PromptTooLongError, RequestError
from amulet_integrations.langchain import AmuletLLM, ChatAmulet
from tests.langchain.scripted import preferring, scripted_chat
from tests.models import ScriptedModel, byte_tokenizer

CONVERSATION = {"configurable": {"preference": "B"}}


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temprature": 1},
            "ChatAmulet does not know the option temprature=1: did you mean temperature?",
        ),
        ({"num_predict": 3}, "ChatAmulet does not know the option num_predict=3: use max_tokens."),
        ({"top_p": 3}, "ChatAmulet: top_p=3.0: input should be less than or equal to 1."),
        ({"strength": 1e6}, "ChatAmulet: strength=1000000.0: input should be less than or equal"),
        (
            {"max_tokens": 1, "max_new_tokens": 2},
            "max_tokens and max_new_tokens are one option: give one of them.",
        ),
    ],
)
def test_a_wrong_option_is_refused_at_the_constructor(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        scripted_chat("Hi", **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("method", ["invoke", "stream", "batch"])
def test_an_unknown_option_of_a_call_is_refused(method: str) -> None:
    chat = scripted_chat("Hi")
    with pytest.raises(RequestError, match=r"did you mean strength\?"):
        list(getattr(chat, method)(["x"] if method == "batch" else "x", strenght=2))


def test_no_model_is_an_error() -> None:
    with pytest.raises(RequestError, match="no model given: expected model='hub id or folder'"):
        ChatAmulet()


def test_models_of_one_amulet_share_it() -> None:
    chat = scripted_chat("Hi")
    assert chat.with_preference("A").amulet is chat.amulet
    assert ChatAmulet(amulet=chat.amulet).invoke("x").content == "Hi"


def test_max_tokens_by_either_name_at_call_and_constructor() -> None:
    assert scripted_chat("Hello", max_tokens=2).invoke("x").content == "He"
    chat = scripted_chat("Hello", max_new_tokens=3)
    assert chat.invoke("x").content == "Hel"
    assert chat.invoke("x", max_tokens=4).content == "Hell"
    assert chat.invoke("x", max_new_tokens=1).content == "H"
    assert chat.invoke("x", max_tokens=None).content == "Hel"
    assert chat.invoke("x", max_tokens=4).response_metadata["finish_reason"] == "length"


def test_stop_of_the_call_replaces_the_constructors() -> None:
    chat = scripted_chat("one two three", stop=["two"])
    assert chat.invoke("x").content == "one "
    assert chat.invoke("x", stop=["three"]).content == "one two "
    assert chat.invoke("x", stop=[]).content == "one two three"
    assert chat.bind(stop=["three"]).invoke("x").content == "one two "
    assert "".join(str(c.content) for c in chat.stream("x", stop=["ee"])) == "one two thr"


def test_a_seed_fixes_a_sampled_answer() -> None:
    chat = scripted_chat("Hello", temperature=30.0, max_tokens=8, seed=7)
    assert chat.invoke("x").content == chat.invoke("x").content
    assert chat.invoke("x", seed=8).content != chat.invoke("x").content


def test_n_gives_choices_of_which_the_first_is_the_one_alone() -> None:
    chat = scripted_chat("Hello", temperature=30.0, max_tokens=8, seed=7)
    result = chat.generate([[HumanMessage("x")]], n=3)
    texts = [generation.text for generation in result.generations[0]]
    assert len(set(texts)) == 3
    assert texts[0] == chat.invoke("x").content
    with pytest.raises(RequestError, match="n=2: a stream has one answer"):
        list(chat.stream("x", n=2))
    with pytest.raises(RequestError, match="n=0: expected a whole number, 1 or more"):
        chat.invoke("x", n=0)


def test_an_image_is_refused() -> None:
    block = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(RequestError, match="an image, and llama takes none: llama reads text alon"):
        scripted_chat("Hi").invoke([HumanMessage([block])])


# --- where the preference comes from


@pytest.mark.parametrize(
    ("constructor", "config", "call", "answer", "source"),
    [
        (None, {}, {}, "plain", None),
        ("A", {}, {}, "A!", "constructor"),
        ("A", CONVERSATION, {}, "B!", "conversation"),
        ("A", CONVERSATION, {"preference": "C"}, "C!", "call"),
        ("A", CONVERSATION, {"preference": None}, "B!", "conversation"),
        ("A", CONVERSATION, {"preference": ""}, "plain", "call"),
        ("A", {"configurable": {"preference": ""}}, {}, "plain", "conversation"),
        ("A", {}, {"preference": "C", "preference_source": "user"}, "C!", "user"),
        ("A", CONVERSATION, {"preference": "C", "preference_source": "user"}, "B!", "conversation"),
        (None, {}, {"preference": Preference("C")}, "C!", "call"),
        (None, {}, {"preference": {"text": "C", "weight": 1.0}}, "C!", "call"),
    ],
)
async def test_precedence(
    constructor: str | None,
    config: dict[str, Any],
    call: dict[str, Any],
    answer: str,
    source: str | None,
) -> None:
    chat = preferring("A", "B", "C", preference=constructor)
    settings: Any = config
    replies: list[Any] = [
        chat.invoke("x", settings, **call),
        await chat.ainvoke("x", settings, **call),
        chat.batch(["x"], settings, **call)[0],
        (await chat.abatch(["x"], settings, **call))[0],
        joined(list(chat.stream("x", settings, **call))),
        joined([piece async for piece in chat.astream("x", settings, **call)]),
    ]
    for reply in replies:
        assert reply.content == answer
        assert reply.response_metadata["preference_source"] == source
        assert reply.response_metadata["strength"] == (None if answer == "plain" else 2.0)


def routes(chat: Any) -> dict[str, Any]:
    """The same question through everything that a chain may put around a model."""
    prompt = ChatPromptTemplate.from_messages([("human", "{q}")])
    text = StrOutputParser()
    return {
        "chain": prompt | chat | text,
        "parallel": RunnableParallel(a=prompt | chat | text, b=RunnablePassthrough())
        | (lambda both: both["a"]),
        "lambda": prompt | RunnableLambda(lambda value: chat.invoke(value)) | text,
        "retry": prompt | chat.with_retry() | text,
        "fallback": prompt | chat.with_fallbacks([chat]) | text,
        "config": prompt | chat.with_config(tags=["t"]) | text,
    }


@pytest.mark.filterwarnings("ignore:astream_events version='v1'")
@pytest.mark.parametrize("route", list(routes(preferring("A"))))
async def test_the_configs_preference_reaches_the_model_by_every_route(route: str) -> None:
    chain = routes(preferring("A", "B", preference="A"))[route]
    question, config = {"q": "x"}, CONVERSATION
    assert chain.invoke(question) == "A!"
    assert chain.invoke(question, config) == "B!"
    assert await chain.ainvoke(question, config) == "B!"
    assert chain.batch([question, question], [config, {}]) == ["B!", "A!"]
    assert await chain.abatch([question, question], [config, {}]) == ["B!", "A!"]
    assert "".join(chain.stream(question, config)) == "B!"
    assert "".join([piece async for piece in chain.astream(question, config)]) == "B!"
    for version in ("v1", "v2"):
        events = [e async for e in chain.astream_events(question, config, version=version)]
        assert events[-1]["data"]["output"] in ("B!", ["B!"])


@pytest.mark.parametrize("route", list(routes(preferring("A"))))
def test_a_bound_preference_beats_the_configs_by_every_route(route: str) -> None:
    for chat in (
        preferring("B", "C").bind(preference="C"),
        preferring("B", "C").with_preference("C"),
    ):
        assert routes(chat)[route].invoke({"q": "x"}, CONVERSATION) == "C!"


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_events_v3_take_the_configs_preference() -> None:
    chat = preferring("A", "B", preference="A")
    stream = chat.stream_events("x", CONVERSATION, version="v3")
    assert str(stream.text) == "B!"
    astream = await chat.astream_events("x", CONVERSATION, version="v3")
    assert await astream.text == "B!"


def test_strength_floor_and_placement_follow_the_same_rule_each_on_its_own() -> None:
    chat = preferring("A", preference="A", strength=3.0, floor=0.2)
    config: Any = {"configurable": {"strength": 1.5}}
    told = chat.invoke("x", config, floor=0.0, placement="both").response_metadata
    assert (told["strength"], told["floor"], told["placement"]) == (1.5, 0.0, "both")
    assert told["preference_source"] == "constructor"


def test_a_preference_stated_in_a_message_stays_with_the_conversation() -> None:
    chat = preferring("A", "B", preference="A")
    history = [
        HumanMessage("Hi", additional_kwargs={"preference": "B"}),
        AIMessage("Hello"),
        HumanMessage("x"),
    ]
    reply = chat.invoke(history)
    assert reply.content == "B!"
    assert reply.response_metadata["preference_source"] == "conversation"
    assert chat.invoke(history, preference="").content == "plain"
    off = HumanMessage("Stop that", additional_kwargs={"preference": ""})
    assert chat.invoke([*history, off]).content == "plain"


def test_configurable_fields_and_alternatives() -> None:
    field = ConfigurableField(id="wish")
    chat = preferring("A", "B").configurable_fields(preference=field)
    assert chat.invoke("x", {"configurable": {"wish": "A"}}).content == "A!"
    other = scripted_chat("other")
    either = preferring("A").configurable_alternatives(ConfigurableField(id="llm"), other=other)
    assert either.invoke("x", {"configurable": {"llm": "other"}}).content == "other"
    config: Any = {"configurable": {"preference": "A"}}
    assert either.invoke("x", config).content == "A!"


# --- what comes back


def test_usage_tells_the_base_row_apart_and_streams_give_the_same() -> None:
    chat = preferring("A")
    plain, steered = chat.invoke("x"), chat.invoke("x", preference="A")
    assert plain.usage_metadata == {"input_tokens": 20, "output_tokens": 6, "total_tokens": 26}
    assert steered.usage_metadata == {
        "input_tokens": 31,
        "output_tokens": 3,
        "total_tokens": 34,
        "input_token_details": {"base_row": 40},  # that of focus among them
    }
    streamed = joined(list(chat.stream("x", preference="A")))
    assert streamed.usage_metadata == steered.usage_metadata
    assert streamed.response_metadata == steered.response_metadata
    with get_usage_metadata_callback() as counted:
        chat.invoke("x", preference="A")
    assert counted.usage_metadata == {"llama": steered.usage_metadata}


def test_response_metadata() -> None:
    chat = preferring("A", preference="A", strength=1.0, floor=0.3, placement="system")
    assert chat.invoke("x").response_metadata == {
        "model_name": "llama",
        "model_provider": "amulet",
        "finish_reason": "stop",
        "preference_source": "constructor",
        "strength": 1.0,
        "floor": 0.3,
        "placement": "system",
        "focus": 1.0,
        "loop_guard": 4,
        "base_prompt_tokens": 40,
    }


def test_logprobs_have_openais_shape_in_answers_and_streams() -> None:
    chat = scripted_chat("Hi")
    told = chat.invoke("x", logprobs=True, top_logprobs=2).response_metadata["logprobs"]
    assert [token["token"] for token in told["content"]] == ["H", "i", "<|im_end|>"]
    first = told["content"][0]
    assert first["bytes"] == [72]
    assert first["logprob"] == pytest.approx(0.0, abs=1e-5)
    assert len(first["top_logprobs"]) == 2
    assert first["top_logprobs"][0]["token"] == "H"
    streamed = joined(list(chat.stream("x", logprobs=True, top_logprobs=2)))
    assert streamed.response_metadata["logprobs"] == told
    assert "logprobs" not in chat.invoke("x").response_metadata


class Tokens(BaseCallbackHandler):
    """Keeps what the callbacks hear."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.ended: list[Any] = []

    def on_llm_new_token(self, token: Any, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: Any, **_: Any) -> None:
        self.ended.append(response.generations[0][0].message)


def test_callbacks_hear_every_token_and_the_end() -> None:
    heard = Tokens()
    list(scripted_chat("Hey").stream("x", {"callbacks": [heard]}))
    assert heard.tokens == ["H", "e", "y", ""]
    assert heard.ended[0].content == "Hey"
    assert heard.ended[0].usage_metadata["output_tokens"] == 4


def test_pieces_come_one_by_one() -> None:
    chat = scripted_chat("Hello")
    model: Any = chat.engine.model
    stream = chat.stream("x")
    assert next(stream).content == "H"
    assert len(model.calls) <= 2
    stream.close()
    assert len(model.calls) <= 2


def test_token_counts_are_the_models_own() -> None:
    chat = scripted_chat("Hi")
    assert chat.get_num_tokens("héllo") == 6
    assert chat.get_token_ids("ab") == chat.engine.tokenizer.encode("ab")
    messages = [SystemMessage("s"), HumanMessage("x")]
    counted = chat.get_num_tokens_from_messages(messages)
    usage = chat.invoke(messages).usage_metadata
    assert usage is not None
    assert counted == usage["input_tokens"]


def test_profile_and_tracing_parameters() -> None:
    chat = scripted_chat("Hi", temperature=0.5, max_tokens=9, stop=["z"])
    assert chat.profile is not None
    assert chat.profile["max_input_tokens"] == 4096
    assert chat.profile["structured_output"] is True
    assert chat.profile["tool_calling"] is True
    assert chat._get_ls_params() == {
        "ls_provider": "amulet",
        "ls_model_type": "chat",
        "ls_model_name": "llama",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["z"],
    }


def test_a_rate_limiter_is_asked() -> None:
    limiter = InMemoryRateLimiter(requests_per_second=5, check_every_n_seconds=0.01)
    chat = scripted_chat("Hi", rate_limiter=limiter)
    start = time.monotonic()
    chat.invoke("x")
    chat.invoke("x")
    assert time.monotonic() - start >= 0.2


def test_a_failed_step_can_be_retried_and_fallen_back_from() -> None:
    chat = preferring("A")
    model: Any = chat.engine.model
    model.fail_with = RuntimeError("out of luck")
    retrying = chat.with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    assert retrying.invoke("x", preference="A").content == "A!"
    model.fail_with = RuntimeError("out of luck")
    assert chat.with_fallbacks([scripted_chat("other")]).invoke("x").content == "other"


def test_output_version_v1_gives_content_blocks() -> None:
    chat = scripted_chat("Hi", output_version="v1")
    assert chat.invoke("x").content == [{"type": "text", "text": "Hi"}]


def test_from_pipeline_takes_a_pipeline_and_its_langchain_wrapper() -> None:
    class Pipeline:  # what of a Transformers pipeline is read
        tokenizer: Any = byte_tokenizer()
        model: Any = ScriptedModel(tokenizer, "piped")

    class Wrapper:
        pipeline = Pipeline()

    class Chat:
        llm = Wrapper()

    for pipeline in (Pipeline(), Wrapper(), Chat()):
        assert ChatAmulet.from_pipeline(pipeline, max_tokens=5).invoke("x").content == "piped"
    with pytest.raises(RequestError, match="from_pipeline got int"):
        ChatAmulet.from_pipeline(3)


def test_an_amulet_with_its_own_default_steering() -> None:
    from amulet import Steering

    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, "Hi")
    chat = ChatAmulet(amulet=Amulet(model, tokenizer, steering=Steering.paper()), preference="A")
    told = chat.invoke("x").response_metadata
    assert (round(told["strength"], 4), told["floor"]) == (4.6487, 0.0)


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk  # type: ignore[assignment]
    return whole


def test_a_model_given_by_its_folder_is_loaded_once_and_can_be_configured(tmp_path: Path) -> None:
    from tests.models import random_model

    folders = [str(tmp_path / name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        random_model("qwen2", seed=seed).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    chat = ChatAmulet(model=folders[0], max_tokens=8, dtype="float32", device="cpu")
    again = ChatAmulet(model=folders[0], dtype="float32", device="cpu")
    assert again.amulet is chat.amulet
    other = ChatAmulet(model=folders[1], max_tokens=8, dtype="float32", device="cpu")
    switched = chat.configurable_fields(model=ConfigurableField(id="model"))
    config: Any = {"configurable": {"model": folders[1]}}
    assert switched.invoke("x").content == chat.invoke("x").content
    assert switched.invoke("x", config).content == other.invoke("x").content
    assert chat.invoke("x").content != other.invoke("x").content
    assert switched.invoke("x", config).response_metadata["model_name"] == folders[1]


def test_a_preference_that_claims_to_be_the_constructors_is_the_farthest() -> None:
    chat = preferring("Wish.")
    farthest = {"preference": "Wish.", "preference_source": "constructor"}
    assert chat.invoke("Say.", **farthest).content == "Wish.!"
    off = {"configurable": {"preference": ""}}
    assert chat.invoke("Say.", off, **farthest).content == "plain"


@pytest.mark.parametrize("kind", [ChatAmulet, AmuletLLM])
async def test_a_prompt_that_is_too_long_is_an_error_of_both_libraries(kind: Any) -> None:
    model = kind(amulet=scripted_chat("Hi").amulet)
    long = "x" * model.engine.window
    asked = [
        lambda: model.invoke(long),
        lambda: list(model.stream(long)),
        lambda: model.batch([long, long]),
        lambda: model.generate_prompt([ChatPromptTemplate.from_template(long).invoke({})]),
    ]
    for ask in asked:
        with pytest.raises(ContextOverflowError, match="shorten the prompt") as caught:
            ask()
        assert isinstance(caught.value, PromptTooLongError)
        assert caught.value.help_page == PromptTooLongError.help_page
    with pytest.raises(ContextOverflowError):
        await model.ainvoke(long)
    with pytest.raises(ContextOverflowError):
        await model.abatch([long])
    with pytest.raises(ContextOverflowError):
        await anext(model.astream(long))
