"""The facade: streams, batches, closing, errors, threads, traces and options."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import (
    Amulet,
    DecodeError,
    ModelError,
    PromptTooLongError,
    Reply,
    Request,
    RequestError,
    Steering,
    TemplateError,
)
from tests.models import IM_END, IM_START, ScriptedModel, byte_tokenizer, random_model
from tests.output.test_detokenizer import llama_like


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def amulet_saying(tokenizer: PreTrainedTokenizerFast, answers: Any) -> Amulet:
    return Amulet(ScriptedModel(tokenizer, answers), tokenizer)  # type: ignore[arg-type]


def test_pieces_concatenate_to_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "naïve 😀 日本")
    stream = amulet.stream(user("hi"))
    assert list(stream) == list("naïve 😀 日本")
    reply = stream.reply
    assert (reply.text, reply.finish_reason) == ("naïve 😀 日本", "stop")
    assert reply.token_ids == (*"naïve 😀 日本".encode(), IM_END)
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert reply.usage.prompt_tokens == len(amulet.encode_chat(user("hi")))
    assert reply.usage.base_prompt_tokens == 0
    assert reply.steering is None
    assert str(reply) == reply.text == amulet.chat(user("hi")).text


def test_a_steered_answer_says_what_steered_it(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, {"Be brief.": "short", "": "long answer"})
    reply = amulet.chat(user("hi"), preference="Be brief.", strength=1.5)
    assert reply.text == "short"
    assert reply.steering == Steering(strength=1.5)
    base, alone = len(amulet.encode_chat(user("hi"))), len(amulet.encode_chat(user("Be brief.")))
    assert reply.usage.base_prompt_tokens == base + alone
    reply = amulet.chat(user("hi"), preference="Be brief.", strength=1.5, focus=0)
    assert reply.usage.base_prompt_tokens == base
    assert amulet.chat(user("hi"), preference="").text == "long answer"


async def test_a_request_may_be_a_dict_of_its_fields(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet: Any = amulet_saying(tokenizer, "hello")
    assert amulet.start({"messages": user("hi")}).read().text == "hello"
    assert (await amulet.astart({"messages": user("hi")}).read()).text == "hello"
    for given in ("hi", user("hi"), user("hi")[0], None):
        for call in (amulet.start, amulet.prepare):
            with pytest.raises(
                RequestError, match=r"a request of type \w+: expected a Request, or"
            ):
                call(given)


@pytest.mark.parametrize("given", [5, None, "hi", b"hi", user("hi")[0], Request(prompt="hi")])
async def test_what_is_no_list_of_requests_is_told_what_one_is(
    tokenizer: PreTrainedTokenizerFast, given: Any
) -> None:
    amulet = amulet_saying(tokenizer, "hello")
    told = rf"^requests of type {type(given).__name__}: expected a list of Request objects"
    for options in ({}, {"return_exceptions": True}):
        with pytest.raises(RequestError, match=told):
            amulet.batch(given, **options)
        with pytest.raises(RequestError, match=told):
            await amulet.abatch(given, **options)


@pytest.mark.parametrize("given", [5, None, "hi", user("hi")[0], ["hi"], [None]])
def test_what_is_no_chat_is_not_counted(tokenizer: PreTrainedTokenizerFast, given: Any) -> None:
    amulet = amulet_saying(tokenizer, "hello")
    with pytest.raises(RequestError, match=r"^(messages.*: expected a (list|dict)|.*either mess)"):
        amulet.count_chat(given)
    with pytest.raises(RequestError, match=r"^tools=5: expected a list of tools"):
        amulet.count_chat(user("hi"), tools=5)
    assert amulet.count_chat([]) == amulet.count_chat(()) == 0


def test_strength_0_takes_one_row(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, {"Be brief.": "short", "": "long"})
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    reply = amulet.chat(user("hi"), preference="Be brief.", strength=0)
    assert (reply.text, reply.usage.base_prompt_tokens) == ("short", 0)
    assert {shape[0] for shape in model.calls} == {1}


def test_a_prepared_answer_is_decoded_once_it_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "hello")
    model: Any = amulet.model
    first, second = (amulet.prepare(Request(messages=tuple(user("hi")))) for _ in range(2))
    assert model.calls == []
    assert first.read().text == "hello"
    assert second.usage.completion_tokens == 0  # nobody has asked for it
    second.submit()
    second.submit()
    third = amulet.prepare(Request(messages=tuple(user("hi"))))
    assert third.read().text == "hello"
    assert second.usage.completion_tokens == len(third.reply.token_ids)
    assert second.text == second.read().text == "hello"
    assert (amulet.rows, amulet.cache_bytes) == (0, 0)


def test_what_was_decoded_of_a_cancelled_answer_is_read(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = amulet_saying(tokenizer, "hello")
    stream = amulet.stream(user("hi"), preference="Be brief.")
    assert next(stream) == "h"
    assert amulet.rows == 3
    assert amulet.cache_bytes > 0
    stream.cancel()
    assert amulet.rows == 0
    assert stream.read().text == "h"
    assert stream.reply.finish_reason == "cancelled"


def test_stop_strings_are_cut_off_and_named(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "one two three")
    stream = amulet.stream(user("hi"), stop=["two", "x"])
    assert "".join(stream) == "one "
    assert stream.reply.stop_string == "two"
    assert stream.reply.finish_reason == "stop"
    assert amulet.chat(user("hi"), max_new_tokens=3).finish_reason == "length"


def test_events_carry_every_token_of_the_trace_once(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "añ end STOP")
    stream = amulet.stream(user("hi"), trace=True, stop="STOP")
    events = list(stream.events())
    reply = stream.reply
    assert [event.text for event in events] == ["a", "ñ", " ", "e", "n", "d", " ", ""]
    assert [len(event.tokens) for event in events] == [1, 2, 1, 1, 1, 1, 1, 4]
    assert reply.trace is not None
    assert tuple(token for event in events for token in event.tokens) == reply.trace
    assert [trace.token_id for trace in reply.trace] == list(reply.token_ids)
    assert amulet.chat(user("hi")).trace is None


def test_a_batch_answers_each_in_its_own_way(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, {"Be brief.": "short", "one": "first", "": "other"})
    replies = amulet.batch(
        [
            {"messages": user("one")},
            Request(messages=user("two"), preference="Be brief."),
            {"prompt": "three\n", "stop": "h"},
        ]
    )
    assert [str(reply) for reply in replies] == ["first", "short", "ot"]
    assert amulet.batch([]) == []


def test_a_batch_puts_errors_in_their_places(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "ok")
    good: dict[str, Any] = {"messages": user("x")}
    first, second, third = amulet.batch([good, {"messages": []}, good], return_exceptions=True)
    assert isinstance(first, Reply)
    assert isinstance(second, RequestError)
    assert isinstance(third, Reply)
    with pytest.raises(RequestError, match="expected a list of messages, such as"):
        amulet.batch([good, {"messages": []}])
    assert amulet._engine.running == []


@pytest.mark.parametrize("given", ["What is tea?", {"role": "user", "content": "x"}, 5, ()])
def test_what_is_no_list_of_messages_is_told_what_one_is(given: Any) -> None:
    with pytest.raises(RequestError, match=r'such as \[\{"role": "user", "content": "Hello"\}\]'):
        Request(messages=given)


def test_an_unfinished_answer_has_no_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = amulet_saying(tokenizer, "answer").stream(user("hi"))
    assert next(stream) == "a"
    with pytest.raises(RequestError, match="not finished"):
        _ = stream.reply
    assert stream.read().text == "answer"


@pytest.mark.parametrize("how", ["close", "with", "del"])
def test_closing_ends_the_decode_and_frees_its_memory(
    tokenizer: PreTrainedTokenizerFast, how: str
) -> None:
    model = ScriptedModel(tokenizer, "a long answer")
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    stream = amulet.stream(user("hi"))
    assert next(stream) == "a"
    if how == "close":
        stream.close()
        assert (stream.reply.text, stream.reply.finish_reason) == ("a", "cancelled")
        assert list(stream) == []
    elif how == "with":
        with stream:
            pass
        assert stream.reply.finish_reason == "cancelled"
    else:
        del stream
        gc.collect()
    assert (amulet._engine.running, amulet._engine.backend.nbytes) == ([], 0)
    assert len(model.calls) == 1
    assert amulet.chat(user("hi")).text == "a long answer"


def test_a_failed_step_reaches_all_it_concerns_and_the_next_call_works(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = ScriptedModel(tokenizer, "answer")
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    first, second = amulet.stream(user("hi")), amulet.stream(user("ho"))
    assert (next(first), next(second)) == ("a", "a")
    model.fail_with = ValueError("broken")
    with pytest.raises(DecodeError, match="ValueError: broken"):
        first.read()
    with pytest.raises(DecodeError, match="ValueError: broken"):
        second.read()
    assert amulet.chat(user("hi")).text == "answer"


def test_ctrl_c_leaves_a_usable_object_and_the_others_go_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = ScriptedModel(tokenizer, "answer")
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    first, second = amulet.stream(user("hi")), amulet.stream(user("ho"))
    assert (next(first), next(second)) == ("a", "a")
    model.fail_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        next(first)
    assert first.reply.finish_reason == "cancelled"
    assert second.read().text == "answer"
    assert amulet.chat(user("hi")).text == "answer"


def test_many_threads_share_one_object(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [f"word{i}" for i in range(8)]
    amulet = amulet_saying(tokenizer, {word: f"answer to {word}" for word in words})
    said: dict[str, str] = {}

    def ask(word: str) -> None:
        said[word] = amulet.chat(user(word)).text

    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert said == {word: f"answer to {word}" for word in words}
    assert amulet._engine.backend.nbytes == 0


def test_an_answer_is_cut_by_the_window_a_prompt_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = ScriptedModel(tokenizer, "answer")
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    size = len(amulet.encode_chat(user("hi")))
    model.config.max_position_embeddings = size + 2
    reply = amulet.chat(user("hi"))
    assert (reply.text, reply.finish_reason) == ("an", "length")
    model.config.max_position_embeddings = size
    with pytest.raises(PromptTooLongError, match=rf"has {size} tokens .* window {size}"):
        amulet.chat(user("hi"))
    assert len(model.calls) == 2


def test_template_options_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, {"THINKING": "yes", "": "no"})
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{%- if thinking %}THINKING{% endif -%}" + str(template)
    try:
        assert amulet.chat(user("hi"), template_options={"thinking": True}).text == "yes"
        assert amulet.chat(user("hi")).text == "no"
    finally:
        tokenizer.chat_template = template


def test_a_raw_prompt_needs_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "<think>raw</think>")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        assert amulet.complete("go on\n").text == "<think>raw</think>"
        assert list(amulet.stream_complete("go on\n", stop="raw")) == list("<think>")
        with pytest.raises(TemplateError, match=r"Amulet\.complete\(\)"):
            amulet.chat(user("hi"))
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "temprature: unknown option"),
        ({"tool_choice": "any"}, "tool_choice='any' requires tools"),
        ({"tools": "f"}, "expected a list of tools"),
        ({"grammar": "x"}, "grammar='x'"),
        ({"tools_prompt": "other"}, "tools_prompt='other'"),
    ],
)
def test_bad_options_are_named(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        amulet_saying(tokenizer, "x").chat(user("hi"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": None}, r"^max_rows=None: expected a number, 1 or more"),
        ({"max_rows": 0}, r"^max_rows=0: expected a number, 1 or more"),
        ({"prefix_cache_bytes": "1 GB"}, r"^prefix_cache_bytes='1 GB': expected a number, 0 or"),
        ({"prefix_cache_bytes": -1}, r"^prefix_cache_bytes=-1: expected a number, 0 or more"),
        ({"compile": "yes"}, r'^compile=\'yes\': expected True, False or "auto"'),
        ({"drafts": []}, r"^drafts=\[\]: expected True or False"),
        ({"drafts": "off"}, r"^drafts='off': expected True or False"),
    ],
)
def test_a_wrong_option_of_the_model_is_named(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str
) -> None:
    model: Any = ScriptedModel(tokenizer, "x")
    with pytest.raises(RequestError, match=message):
        Amulet(model, tokenizer, **options)


def test_only_a_text_is_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "x")
    for given in (5, None, b"hi", ["hi"]):
        for call in (amulet.encode, amulet.count_tokens):
            with pytest.raises(RequestError, match=rf"^a text of type {type(given).__name__}: exp"):
                call(given)  # type: ignore[operator]


def test_a_tokenizer_larger_than_the_embedding() -> None:
    """Only what no ordinary prompt has may lack a row: padding, placeholders of images."""
    tokenizer = byte_tokenizer()
    model = random_model("llama", vocab_size=259)
    model.generation_config.pad_token_id = None
    assert Amulet(model, tokenizer).chat(user("Hi"), max_new_tokens=2).token_ids
    changes: list[Any] = [
        lambda it: it.add_tokens(["<new>"]),
        lambda it: it.add_special_tokens({"additional_special_tokens": ["<new>"]}),
        lambda it: it.add_special_tokens({"bos_token": "<new>"}),
    ]
    for add in changes:
        larger = byte_tokenizer()
        add(larger)
        with pytest.raises(ModelError, match=r"260 tokens .* 259 rows; .* '<new>'.*resize"):
            Amulet(model, larger)
    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    amulet = Amulet(model, padded)
    assert amulet.chat(user("Hi"), max_new_tokens=2) == Amulet(model, tokenizer).chat(
        user("Hi"), max_new_tokens=2
    )
    with pytest.raises(RequestError, match="'<pad>'"):
        amulet.complete("Hi <pad>")
    model.resize_token_embeddings(260)
    assert Amulet(model, padded).complete("Hi <pad>", max_new_tokens=1).token_ids


def test_a_special_token_as_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = [*b"Yes. ", IM_START, *b"user\nNo", IM_END]
    amulet = amulet_saying(tokenizer, answer)
    for stop in ("<|im_start|>", "<|im_start|>user", ". <|im_start|>us"):
        reply = amulet.chat(user("hi"), stop=[stop], trace=True)
        assert (reply.stop_string, reply.finish_reason) == (stop, "stop")
        assert reply.text == "Yes. "[: 3 if stop[0] == "." else 5]
    for options in ({}, {"stop": ["<|im_start|>x"]}):
        assert amulet.chat(user("hi"), **options).text == "Yes. user\nNo"


def test_a_continued_text_keeps_its_first_space() -> None:
    tokenizer = llama_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content }}"
        "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    )
    ids = [*tokenizer.convert_tokens_to_ids(["▁a", "▁b"]), tokenizer.eos_token_id]
    amulet = Amulet(ScriptedModel(tokenizer, ids), tokenizer)  # type: ignore[arg-type]
    assert amulet.complete("ab").text == " a b"
    assert list(amulet.stream_complete("ab", preference="b a")) == [" a", " b"]
    assert amulet.chat([*user("b"), {"role": "assistant", "content": "ab"}]).text == " a b"
    assert amulet.chat(user("b")).text == "a b"
    assert amulet.chat([*user("b"), {"role": "assistant", "content": ""}]).text == "a b"
    assert amulet.complete("ab", stop=[" a"]).stop_string == " a"
