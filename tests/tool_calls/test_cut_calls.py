"""Calls cut at every point, split at every point, and repeated: no part passes for a call."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Event, Reply
from amulet.output.sections import Calls, Spans
from amulet.tool_calls import gemma, glm, hermes, llama, mistral, pythonic, qwen_coder
from amulet.tool_calls.base import CUT, Dialect, Function, Piece
from tests.tool_calls.test_dialects import CALL, KNOWS_TOOLS, PING, TOOLS, amulet_saying, user

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "n": {"type": "integer"}},
}
FUNCTIONS = (Function("write", PARAMETERS), Function("ping", {}))
NAMES = ("write", "ping")
TRICKY = 'é "q" \\ {[</tool_call>\n😀'

# Two calls after a text, with a value that looks like the end of the call.
ANSWERS: list[tuple[Dialect, str, str]] = [
    (
        hermes,
        "Hm. ",
        f"<tool_call>\n{json.dumps({'name': 'write', 'arguments': {'path': TRICKY, 'n': 12}})}\n"
        '</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    ),
    (
        llama,
        "",
        f"{json.dumps({'name': 'write', 'parameters': {'path': TRICKY, 'n': 12}})}; "
        '{"name": "ping", "parameters": {}}',
    ),
    (
        mistral,
        "Hm. ",
        "[TOOL_CALLS]"
        + json.dumps(
            [
                {"name": "write", "arguments": {"path": TRICKY, "n": 12}},
                {"name": "ping", "arguments": {}},
            ]
        ),
    ),
    (
        mistral,
        "Hm. ",
        f"[TOOL_CALLS]write[ARGS]{json.dumps({'path': TRICKY, 'n': 12})}[TOOL_CALLS]ping[ARGS]{{}}",
    ),
    (
        pythonic,
        "Hm. ",
        f"<|tool_call_start|>[write(path={TRICKY!r}, n=12), ping()]<|tool_call_end|>",
    ),
    (pythonic, "", f"[write(path={TRICKY!r}, n=12), ping()]"),
    (
        gemma,
        "Hm. ",
        f"<start_function_call>call:write{{path:<escape>{TRICKY}<escape>,n:12}}"
        "<end_function_call><start_function_call>call:ping{}<end_function_call>",
    ),
    (
        qwen_coder,
        "Hm. ",
        f"<tool_call>\n<function=write>\n<parameter=path>\n{TRICKY}\n</parameter>\n"
        "<parameter=n>\n12\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=ping>\n</function>\n</tool_call>",
    ),
    (
        glm,
        "Hm. ",
        f"<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>{TRICKY}</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>12</arg_value>\n</tool_call>\n"
        "<tool_call>ping\n</tool_call>",
    ),
]
IDS = [f"{dialect.NAME}-{i}" for i, (dialect, _, _) in enumerate(ANSWERS)]
WHOLE = [("write", {"path": TRICKY, "n": 12}), ("ping", {})]


def pieces_of(dialect: Dialect, parts: Sequence[str], cut: bool = False) -> list[Piece]:
    spans = Spans(None, calls=Calls(dialect, NAMES, FUNCTIONS))
    pieces = [piece for part in parts for piece in spans.push(part)]
    return pieces + spans.finish(cut)


def read(pieces: Sequence[Piece]) -> tuple[str, list[Any], list[str]]:
    """Return text, calls (their arguments as text where they are no JSON) and errors."""
    said, calls, errors, name, written = "", [], [], "", ""
    for piece in pieces:
        if piece.kind == "text":
            said += piece.text
        elif piece.kind == "name":
            name = piece.text
        elif piece.kind == "arguments":
            written += piece.text
        else:
            arguments: Any = written
            with contextlib.suppress(ValueError):
                arguments = json.loads(written, strict=False)
            if piece.error is None:
                calls.append((name, arguments))
            else:
                errors.append(piece.error)
            name = written = ""
    return said, calls, errors


@pytest.mark.parametrize(("dialect", "text", "calls"), ANSWERS, ids=IDS)
def test_calls_do_not_depend_on_how_the_text_is_split(
    dialect: Dialect, text: str, calls: str
) -> None:
    answer = text + calls
    assert read(pieces_of(dialect, [answer])) == (text.strip(), WHOLE, [])
    assert read(pieces_of(dialect, list(answer))) == (text.strip(), WHOLE, [])
    for at in range(len(answer)):
        assert read(pieces_of(dialect, [answer[:at], answer[at:]])) == (text.strip(), WHOLE, [])


@pytest.mark.parametrize(("dialect", "text", "calls"), ANSWERS, ids=IDS)
def test_a_cut_call_is_never_a_call_wherever_it_is_cut(
    dialect: Dialect, text: str, calls: str
) -> None:
    answer = text + calls
    most = 0
    for at in range(len(answer)):
        said, found, errors = read(pieces_of(dialect, list(answer[:at]), cut=True))
        assert said == text[: len(said)], "no part of a call is text"
        assert found == WHOLE[: len(found)], "no call has other arguments than the whole answer's"
        assert len(found) >= most, "what was a call before stays one"
        assert errors in ([], [CUT])
        assert len(found) + len(errors) <= 2
        assert said.strip() == text[:at].strip()
        most = len(found)
        assert (said, found, errors) == read(pieces_of(dialect, [answer[:at]], cut=True))


BITS = [
    *'"\\{}[]():,=<x \n', "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=",
    "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]",
    "[ARGS]", "call:", "<escape>", "<end_function_call>", "<|tool_call_start|>",
    "<|tool_call_end|>", "; ",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_malformed_calls_are_read_the_same_in_all_pieces() -> None:
    chance = random.Random(0)
    for _ in range(400):
        dialect, text, calls = chance.choice(ANSWERS)
        written = list(text + calls)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(written))
            written[at : at + chance.randint(0, 5)] = chance.choice([[], [chance.choice(BITS)]])
        answer = "".join(written)
        at = chance.randrange(len(answer))
        for cut in (False, True):
            expected = read(pieces_of(dialect, [answer], cut))
            assert read(pieces_of(dialect, list(answer), cut)) == expected
            assert read(pieces_of(dialect, [answer[:at], answer[at:]], cut)) == expected


# ---- through the model: events, and the reply at their end ----


def streamed(events: Sequence[Event]) -> tuple[str, list[Any], list[Any]]:
    calls: dict[int, list[Any]] = {}
    invalid = []
    for event in events:
        if event.kind == "tool_call" and event.error is not None:
            invalid.append((event.name, event.text, event.error, event.id))
        elif event.kind == "tool_call":
            known = calls.setdefault(event.index, [event.id, event.name, ""])
            known[2] += event.text
    text = "".join(event.text for event in events if event.kind == "text")
    return text, [(name, json.loads(args), id_) for id_, name, args in calls.values()], invalid


def whole(reply: Reply) -> tuple[str, list[Any], list[Any]]:
    return (
        reply.text,
        [(call.name, call.arguments, call.id) for call in reply.tool_calls],
        [(call.name, call.raw, call.error, call.id) for call in reply.invalid_tool_calls],
    )


@pytest.mark.parametrize("trace", [False, True])
def test_events_are_the_reply_wherever_it_is_cut(
    tokenizer: PreTrainedTokenizerFast, trace: bool
) -> None:
    amulet = amulet_saying(tokenizer, f"Hm. {CALL}", KNOWS_TOOLS)
    length = len(f"Hm. {CALL}")
    for tokens in range(1, length + 1, 3 if trace else 2):
        stream = amulet.stream(user("hi"), tools=TOOLS, max_new_tokens=tokens, trace=trace)
        events = list(stream.events())
        reply = stream.reply
        assert streamed(events) == whole(reply)
        assert tuple(token for event in events for token in event.tokens) == (reply.trace or ())
        is_whole = tokens >= CALL.rindex("}") + len("Hm. ") + 1
        assert [call.arguments for call in reply.tool_calls] == [{"city": "Rome"}] * is_whole
        begun = tokens > len("Hm. ") and not is_whole
        assert [call.error for call in reply.invalid_tool_calls] == [CUT] * begun
        assert reply.finish_reason == "length"


def test_a_call_that_cancel_cuts_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, f"Hm. {CALL}", KNOWS_TOOLS)
    length = len(amulet.encode_chat(user("hi"), tools=TOOLS)) + len(f"Hm. {CALL}") - 20
    is_there, may_go_on = threading.Event(), threading.Event()

    def wait(ids: Any, scores: Any) -> Any:
        if ids.shape[1] == length:
            is_there.set()
            assert may_go_on.wait(30)
        return scores

    stream = amulet.stream(user("hi"), tools=TOOLS, logits_processor=wait)
    stream.submit()
    reader = threading.Thread(target=lambda: events.extend(stream.events()))
    events: list[Event] = []
    reader.start()
    assert is_there.wait(30)
    stream.cancel()
    may_go_on.set()
    reader.join(30)
    assert streamed(events) == whole(stream.reply)
    assert stream.reply.tool_calls == ()
    assert [call.error for call in stream.reply.invalid_tool_calls] == [CUT]
    assert stream.reply.finish_reason == "cancelled"


def test_a_call_that_the_window_cuts_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, CALL, KNOWS_TOOLS)
    prompt = len(amulet.encode_chat(user("hi"), tools=TOOLS))
    amulet.model.config.max_position_embeddings = prompt + 50
    narrow = Amulet(amulet.model, amulet.tokenizer)
    reply = narrow.chat(user("hi"), tools=TOOLS)
    assert (reply.tool_calls, reply.finish_reason) == ((), "length")
    assert [(call.name, call.error) for call in reply.invalid_tool_calls] == [("get_weather", CUT)]


def test_a_stop_string_reaches_over_no_call(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, f"a {CALL}b", KNOWS_TOOLS)
    stream = amulet.stream(user("hi"), tools=TOOLS, stop=["ab", '"Rome"'])
    events = list(stream.events())
    assert [event.kind for event in events if event.text][:1] == ["text"]
    assert stream.reply.text == "ab"
    assert [call.arguments for call in stream.reply.tool_calls] == [{"city": "Rome"}]
    assert stream.reply.stop_string is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"a": NaN}', "the arguments are not JSON"),
        ('{"a": 1e999}', "the arguments are not JSON"),
        ('{"a": "\\ud83d"}', "the arguments are not JSON"),
        ('{"a": 1,}', "the arguments are not JSON"),
        ("[1]", "expected the arguments to be a JSON object"),
        ("3", "expected the arguments to be a JSON object"),
        ('"no"', "the arguments are not JSON"),
    ],
)
def test_what_is_no_json_object_is_no_call(
    tokenizer: PreTrainedTokenizerFast, arguments: str, error: str
) -> None:
    answer = f'<tool_call>{{"name": "ping", "arguments": {arguments}}}</tool_call>'
    stream = amulet_saying(tokenizer, answer, KNOWS_TOOLS).stream(user("hi"), tools=TOOLS)
    events = list(stream.events())
    assert streamed(events) == whole(stream.reply)
    (call,) = stream.reply.invalid_tool_calls
    assert (call.name, call.raw) == ("ping", answer[11:-12])
    assert call.error.startswith(error)
    assert stream.reply.tool_calls == ()


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a": "\\ud83d\\ude00 \\u00e9"}', {"a": "😀 é"}),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ('{"a": "two\nlines\tand a tab"}', {"a": "two\nlines\tand a tab"}),
        ('"{\\"a\\": {\\"b\\": [null, true, -1.5e3]}}"', {"a": {"b": [None, True, -1500.0]}}),
        ("null", {}),
        ('{"a": "</tool_call>"}', {"a": "</tool_call>"}),
        ('{"a": "</tool_call>\\n<tool_call>{\\"name\\": \\"ping\\"}</tool_call>"}',
         {"a": '</tool_call>\n<tool_call>{"name": "ping"}</tool_call>'}),
    ],
)  # fmt: skip
def test_arguments_are_streamed_as_strict_json(
    tokenizer: PreTrainedTokenizerFast, arguments: str, value: Any
) -> None:
    answer = f'<tool_call>{{"name": "ping", "arguments": {arguments}}}</tool_call>ok'
    stream = amulet_saying(tokenizer, answer, KNOWS_TOOLS).stream(user("hi"), tools=TOOLS)
    events = list(stream.events())
    assert streamed(events) == whole(stream.reply)
    assert [call.arguments for call in stream.reply.tool_calls] == [value]
    assert json.loads(stream.reply.tool_calls[0].written) == value
    assert stream.reply.text == "ok"


def test_a_text_that_is_never_closed_does_not_swallow_what_follows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    broken = '<tool_call>{"name": "ping", "arguments": {"a": "x}}</tool_call>'
    reply = amulet_saying(tokenizer, f"{broken}Sorry.\n{CALL}Done.", KNOWS_TOOLS).chat(
        user("hi"), tools=TOOLS
    )
    assert reply.text == "Sorry.Done."
    assert [call.name for call in reply.invalid_tool_calls] == ["ping"]
    assert [call.name for call in reply.tool_calls] == ["get_weather"]


def test_a_closing_marker_in_a_text_and_none_at_the_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    answer = '<tool_call>{"name": "ping", "arguments": {"a": "</tool_call>"}}'
    reply = amulet_saying(tokenizer, answer, KNOWS_TOOLS).chat(user("hi"), tools=TOOLS)
    assert [call.arguments for call in reply.tool_calls] == [{"a": "</tool_call>"}]
    assert (reply.text, reply.invalid_tool_calls) == ("", ())


def test_equal_calls_do_not_end_the_answer_and_a_loop_does(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    oslo = CALL.replace("Rome", "Oslo")
    answer = "\n".join([CALL, CALL, CALL, oslo])
    stream = amulet_saying(tokenizer, answer, KNOWS_TOOLS).stream(
        user("hi"), tools=TOOLS, max_new_tokens=1000, trace=True
    )
    events = list(stream.events())
    assert streamed(events) == whole(stream.reply)
    assert tuple(token for event in events for token in event.tokens) == stream.reply.trace
    cities = [call.arguments["city"] for call in stream.reply.tool_calls]
    assert cities == ["Rome", "Rome", "Oslo"]
    for loop in (f"{CALL}\n" * 20, f"{CALL}\n{oslo}\n" * 10):
        reply = amulet_saying(tokenizer, loop, KNOWS_TOOLS).chat(
            user("hi"), tools=TOOLS, max_new_tokens=2000
        )
        assert reply.finish_reason == "tool_calls"
        assert 2 <= len(reply.tool_calls) <= 4
        assert reply.usage.completion_tokens < 7 * len(CALL)


def test_a_call_in_a_thinking_span_is_a_thought(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{%- set marker = '</think>' -%}" + KNOWS_TOOLS
    answer = f"<think>I could say {CALL}.</think>Hm. {CALL}"
    reply = amulet_saying(tokenizer, answer, template).chat(user("hi"), tools=TOOLS)
    assert reply.reasoning == f"I could say {CALL}."
    assert reply.text == "Hm."
    assert len(reply.tool_calls) == 1


def test_a_name_that_no_tool_has_is_still_a_call(tokenizer: PreTrainedTokenizerFast) -> None:
    """The frameworks answer it with an error that the model can read."""
    name = 'ns.tool-1 "x" </tool_call> 天'
    answer = f"<tool_call>{json.dumps({'name': name, 'arguments': {}})}</tool_call>"
    reply = amulet_saying(tokenizer, answer, KNOWS_TOOLS).chat(user("hi"), tools=[PING])
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [(name, {})]


# ---- templates whose calls are written otherwise ----

UNKNOWN = [
    "<tool_call>\\n<invoke><n>' ~ call.function.name ~ '</n>' ~ (a | tojson) ~ '</invoke>",
    "<tool_call>' ~ call.function.name ~ '\\n```json\\n' ~ (a | tojson) ~ '\\n```",
]


@pytest.mark.parametrize("syntax", UNKNOWN)
def test_calls_of_an_unknown_syntax_stay_text(
    tokenizer: PreTrainedTokenizerFast, syntax: str
) -> None:
    template = (
        "{%- if tools %}{{ tools | tojson }}{% endif -%}{%- for m in messages %}"
        "{{- '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
        "{%- for call in m.tool_calls or [] %}{%- set a = call.function.arguments %}"
        f"{{{{- '{syntax}</tool_call>' }}}}{{%- endfor %}}{{{{- '<|im_end|>\\n' }}}}"
        "{%- endfor %}{{- '<|im_start|>assistant\\n' }}"
    )
    answer = "Hm. <tool_call>\n<invoke><n>ping</n>{}</invoke></tool_call> ok"
    amulet = amulet_saying(tokenizer, answer, template)
    reply = amulet.chat(user("hi"), tools=TOOLS)
    assert (reply.text, reply.tool_calls, reply.invalid_tool_calls) == (answer, (), ())
    described = amulet_saying(tokenizer, CALL, template).chat(
        user("hi"), tools=TOOLS, tools_prompt="fallback"
    )
    assert [call.name for call in described.tool_calls] == ["get_weather"]


def test_a_response_template_takes_no_cut_call(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    own.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "defaults": {"role": "assistant"},
        "fields": {
            "content": {"content": "text"},
            "tool_calls": {
                "open": "(call)", "close": "(end)", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }  # fmt: skip
    template = "{{ tools | tojson if tools }}" + KNOWS_TOOLS
    good = '(call){"name": "ping", "arguments": {"a": 12}}(end)'
    amulet = amulet_saying(own, f"Ok. {good}", template)
    for tokens in range(1, len(f"Ok. {good}")):
        stream = amulet.stream(user("hi"), tools=TOOLS, max_new_tokens=tokens)
        events = list(stream.events())
        assert streamed(events) == whole(stream.reply)
        assert stream.reply.tool_calls == ()
        assert "(call" not in stream.reply.text
    bad = '(call){"name": "ping", "arguments": {"a": nope}}(end)'
    reply = amulet_saying(own, f"Ok.{bad}Sorry.{good}", template).chat(user("hi"), tools=TOOLS)
    assert reply.text == "Ok.Sorry."
    assert [call.raw for call in reply.invalid_tool_calls] == [bad[6:-5]]
    assert [call.arguments for call in reply.tool_calls] == [{"a": 12}]
