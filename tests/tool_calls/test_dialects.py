"""Tool calls: every dialect read and forced, streamed, malformed, in histories and by fallback."""

from __future__ import annotations

import copy
import json
from datetime import date
from typing import Any

import pytest
from transformers import (
    AddedToken,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from amulet import Amulet, Grammar, RequestError, TemplateError
from amulet.output.sections import Calls, Spans
from amulet.tool_calls import (
    DIALECTS,
    find_dialect,
    forced_grammar,
    functions_of,
    gemma,
    glm,
    hermes,
    llama,
    mistral,
    pythonic,
    qwen_coder,
    tool_schemas,
)
from amulet.tool_calls.base import Dialect, Function, Piece
from tests.models import CHATML, IM_END, ScriptedModel
from tests.templates import family_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
PING = {"type": "function", "function": {"name": "ping", "parameters": {}}}
TOOLS = [WEATHER, PING]
NAMES = ("get_weather", "ping")
KNOWS_TOOLS = "{%- if tools %}{{ tools | tojson }}<tool_call>{% endif -%}" + CHATML


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def read(dialect: Dialect, text: str, size: int = 1000) -> tuple[str, list[tuple[Any, ...]]]:
    """Return the text for the reader and the calls: (name, arguments) or ("error", its words)."""
    spans = Spans(None, calls=Calls(dialect, NAMES, tuple(functions_of(TOOLS, "auto"))))
    pieces: list[Piece] = []
    for at in range(0, len(text), size):
        pieces += spans.push(text[at : at + size])
    pieces += spans.finish()
    said, calls, name, arguments = "", [], "", ""
    for piece in pieces:
        if piece.kind == "text":
            said += piece.text
        elif piece.kind == "name":
            name, arguments = piece.text, ""
        elif piece.kind == "arguments":
            arguments += piece.text
        elif piece.error is not None:
            calls.append(("error", piece.error.partition(":")[0]))
        else:
            calls.append((name, json.loads(arguments)))
    return said, calls


CASES: list[tuple[Dialect, str, str, list[tuple[Any, ...]]]] = [
    # Hermes
    (hermes, "Just text. ", "Just text. ", []),
    (
        hermes,
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
        "",
        [("ping", {})],
    ),
    (
        hermes,
        'One moment.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}'
        '</tool_call>\n<tool_call>{"arguments": {"a": {"b": [1, "}"]}}, "name": "ping"}'
        "</tool_call>",
        "One moment.",
        [("get_weather", {"city": "Köln"}), ("ping", {"a": {"b": [1, "}"]}})],
    ),
    (
        hermes,
        '<tool_call>{"name": "ping", "arguments": "{\\"a\\": \\"say \\\\\\"hi\\\\\\"\\"}"}'
        "</tool_call>!",
        "!",
        [("ping", {"a": 'say "hi"'})],
    ),
    (hermes, '<tool_call>{"name": "ping"}</tool_call>', "", [("ping", {})]),
    (
        hermes,
        '<tool_call>{"type": "function", "function": {"name": "ping", "arguments": null}}'
        "</tool_call>",
        "",
        [("ping", {})],
    ),
    (hermes, '<tool_call>{"name": "ping", "arguments": {"a": 1}</tool_call>', "",
     [("ping", {"a": 1})]),
    (hermes, '<tool_call>{"name": "ping", "arguments": {"a": 1', "",
     [("error", "the call is cut off")]),
    (hermes, "<tool_call>ping()</tool_call>ok", "ok", [("error", "expected a JSON object")]),
    (hermes, '<tool_call>{"nam": "ping"}</tool_call>', "", [("error", 'expected a "name"')]),
    (hermes, "a <tool and b <tool_cal", "a <tool and b <tool_cal", []),
    # Llama 3 JSON
    (llama, '{"name": "ping", "parameters": {"a": 1}}', "", [("ping", {"a": 1})]),
    (llama, ' {"type": "function", "name": "ping", "parameters": {}}', "", [("ping", {})]),
    (
        llama,
        '<|python_tag|>{"name": "ping", "parameters": {}}; '
        '{"name": "ping", "parameters": {"b": 2}}',
        "",
        [("ping", {}), ("ping", {"b": 2})],
    ),
    (llama, '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    (llama, '{"name', '{"name', []),
    (llama, "It is {this}.", "It is {this}.", []),
    # Mistral
    (
        mistral,
        '[TOOL_CALLS][{"name": "ping", "arguments": {}}, {"name": "ping", "arguments": {"b": 2}}]',
        "",
        [("ping", {}), ("ping", {"b": 2})],
    ),
    (
        mistral,
        'Ok.[TOOL_CALLS]ping[ARGS]{"a": "}"}[TOOL_CALLS]get_weather[CALL_ID]123456789'
        '[ARGS]{"city": "x"}',
        "Ok.",
        [("ping", {"a": "}"}), ("get_weather", {"city": "x"})],
    ),
    (mistral, '[TOOL_CALLS]ping{"a": {}}', "", [("ping", {"a": {}})]),
    (mistral, '[TOOL_CALLS]ping[ARGS]{"a": ', "", [("error", "the call is cut off")]),
    (mistral, "[TOOL_CALLS]ping", "", [("error", "expected a name and a JSON object")]),
    # Python
    (
        pythonic,
        "[get_weather(city='New \"York\"', days=3), ping(deep={'a': [True, None, -1.5]}, b=false)]",
        "",
        [
            ("get_weather", {"city": 'New "York"', "days": 3}),
            ("ping", {"deep": {"a": [True, None, -1.5]}, "b": False}),
        ],
    ),
    (pythonic, "Ok<|tool_call_start|>[ping()]<|tool_call_end|>", "Ok", [("ping", {})]),
    (pythonic, "[1] says so", "[1] says so", []),
    (pythonic, "[ping(a=", "", [("error", "expected [name(argument=value), ...]")]),
    (pythonic, "[ping(3)]", "", [("error", "expected [name(argument=value), ...]")]),
    (pythonic, "[ping(a=__import__('os'))]", "",
     [("error", "expected [name(argument=value), ...]")]),
    # Gemma
    (
        gemma,
        "<start_function_call>call:get_weather{city:<escape>São, {Paulo}<escape>,days:2,"
        "deep:{on:true,list:[1,<escape>b<escape>]}}<end_function_call>",
        "",
        [("get_weather", {"city": "São, {Paulo}", "days": 2,
                          "deep": {"on": True, "list": [1, "b"]}})],
    ),
    (gemma, 'Hm<|tool_call>call:ping{a:<|"|>x<|"|>}<tool_call|>', "Hm", [("ping", {"a": "x"})]),
    (gemma, "<start_function_call>call:ping{a:<escape>x", "",
     [("error", "a text has no closing quote")]),
    (gemma, "<start_function_call>ping<end_function_call>", "",
     [("error", "expected call")]),
    # Qwen3-Coder: values by the schema, several lines, tags within a value
    (
        qwen_coder,
        "Let me see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew York\n"
        "</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=ping>\n</function>\n</tool_call>Done.",
        "Let me see.Done.",
        [("get_weather", {"city": "New York", "days": 3}), ("ping", {})],
    ),
    (
        qwen_coder,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n\n a\n</parameter> </tool_call>\n\n"
        "</parameter>\n<parameter=days>\nmany\n</parameter>\n<parameter=more>\n7\n</parameter>\n"
        "</function>\n</tool_call>",
        "",
        [("get_weather", {"city": "\n a\n</parameter> </tool_call>\n", "days": "many",
                          "more": "7"})],
    ),
    (qwen_coder, "<tool_call>\n<function=ping></tool_call>", "", [("ping", {})]),
    (
        qwen_coder,  # a forgotten end of the function
        "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</parameter>\n</tool_call>\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nb\n</parameter>\n</function>\n"
        "</tool_call>",
        "",
        [("get_weather", {"city": "a"}), ("get_weather", {"city": "b"})],
    ),
    (qwen_coder, "<tool_call>\n<function=ping>\nx</function></tool_call>", "",
     [("error", "expected <function=name>...</function>")]),
    (qwen_coder, '<tool_call>{"name": "ping"}</tool_call>', "",
     [("error", "expected <function=name>...</function>")]),
    # GLM, in lines and in one
    (
        glm,
        "Ok.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>007</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>ping\n"
        "</tool_call>",
        "Ok.",
        [("get_weather", {"city": "007", "days": 3}), ("ping", {})],
    ),
    (glm, "<tool_call>ping</tool_call>", "", [("ping", {})]),
    (glm, "<tool_call>ping\n<arg_key>a</arg_key>\n</tool_call>!", "!",
     [("error", "expected <arg_key>key</arg_key> and <arg_value>...</arg_value>")]),
    (glm, '<tool_call>{"name": "ping"}</tool_call>', "", [("error", "expected a name")]),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("dialect", "text", "said", "calls"), CASES)
def test_calls_are_read(
    dialect: Dialect, text: str, said: str, calls: list[tuple[Any, ...]], size: int
) -> None:
    assert read(dialect, text, size) == (said, calls)


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("... <tool_call> ...", hermes),
        ('{"name": function name, "parameters": dictionary of argument name', llama),
        ("<|python_tag|>", llama),
        ("'[TOOL_CALLS]' + tool", mistral),
        ("[func_name1(params_name1=params_value1...)]", pythonic),
        ("<|tool_call_start|>", pythonic),
        ("<start_function_call>", gemma),
        ("<|tool_call>call:", gemma),
        ("<tool_call>\\n<function=example>\\n<parameter=key>\\nvalue", qwen_coder),
        ("<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>", glm),
        ("within <tool_call></tool_call> tags: <tool_call>\\n{", hermes),
        ("<tool_call>\\n<invoke name=", None),
        ("<tool_call>\n  <name>", None),
        (CHATML, None),
    ],
)
def test_the_dialect_is_found_in_the_template(template: str, dialect: Dialect | None) -> None:
    assert find_dialect(template) is dialect


FORCED = [
    (
        hermes,
        "",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "x", "units": "C"}}'
        '\n</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    ),
    (llama, "", '{"name": "get_weather", "parameters": {"city": "x", "units": "C"}}; '
     '{"name": "ping", "parameters": {}}'),
    (mistral, "", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "x", "units": "C"}}, '
     '{"name": "ping", "arguments": {}}]'),
    (mistral, "[ARGS]",
     '[TOOL_CALLS]get_weather[ARGS]{"city": "x", "units": "C"}[TOOL_CALLS]ping[ARGS]{}'),
    (pythonic, "", '[get_weather(city="x", units="C"), ping()]'),
    (pythonic, "<|tool_call_start|>",
     '<|tool_call_start|>[get_weather(city="x", units="C"), ping()]<|tool_call_end|>'),
    (gemma, "<start_function_call>",
     "<start_function_call>call:get_weather{city:<escape>x<escape>,units:<escape>C<escape>}"
     "<end_function_call><start_function_call>call:ping{}<end_function_call>"),
    (gemma, "<|tool_call>",
     '<|tool_call>call:get_weather{city:<|"|>x<|"|>,units:<|"|>C<|"|>}<tool_call|>'
     "<|tool_call>call:ping{}<tool_call|>"),
    (qwen_coder, "",
     "<tool_call>\n<function=get_weather>\n<parameter=city>\nx\n</parameter>\n<parameter=units>\nC"
     "\n</parameter>\n</function>\n</tool_call>\n"
     "<tool_call>\n<function=ping>\n</function>\n</tool_call>"),
    (glm, "</arg_key>\\n",
     "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>x</arg_value>\n"
     "<arg_key>units</arg_key>\n<arg_value>C</arg_value>\n</tool_call>\n"
     "<tool_call>ping\n</tool_call>"),
    (glm, "",
     "<tool_call>get_weather<arg_key>city</arg_key><arg_value>x</arg_value>"
     "<arg_key>units</arg_key><arg_value>C</arg_value></tool_call><tool_call>ping</tool_call>"),
]  # fmt: skip


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("dialect", "template", "text"), FORCED)
def test_a_forced_call_is_one_that_is_read(
    tokenizer: PreTrainedTokenizerFast, dialect: Dialect, template: str, text: str, special: bool
) -> None:
    own = copy.deepcopy(tokenizer)
    if special:
        markers = [m for span in dialect.SPANS for m in span if m] + list(dialect.EXTRA)
        own.add_tokens([AddedToken(m, special=True) for m in markers], special_tokens=True)
    functions = functions_of(TOOLS, "any")
    grammar = forced_grammar(own, dialect, functions, True, template=template)
    matcher = grammar.matcher(own, frozenset({IM_END}))
    for token_id in own.encode(text, add_special_tokens=False):
        assert not matcher.complete
        assert matcher.allowed()[token_id]
        matcher.consume(token_id)
    assert matcher.complete or matcher.allowed()[IM_END]
    expected = [("get_weather", {"city": "x", "units": "C"}), ("ping", {})]
    assert read(dialect, text) == ("", expected)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, " 5 ", " 5 "),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-1.5e3", -1500.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": "b"}', {"a": "b"}),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "x", "x"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"$ref": "#/$defs/point"}, '{"x": 1}', {"x": 1}),
        ({}, "[1]", [1]),
        ({}, "a word", "a word"),
        (None, "5", "5"),  # not declared
    ],
)
@pytest.mark.parametrize("dialect", [qwen_coder, glm])
def test_bare_values_have_the_types_of_the_schema(
    dialect: Dialect, schema: Any, text: str, value: Any
) -> None:
    parameters = {
        "$defs": {"point": {"type": "object"}},
        "properties": {} if schema is None else {"a": schema},
    }
    answer = {
        qwen_coder: f"<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n",
        glm: f"f\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n",
    }[dialect]
    spans = Spans(None, calls=Calls(dialect, ("f",), (Function("f", parameters),)))
    pieces = spans.push(f"<tool_call>{answer}</tool_call>") + spans.finish()
    (arguments,) = [json.loads(piece.text) for piece in pieces if piece.kind == "arguments"]
    assert arguments == {"a": value}
    assert type(arguments["a"]) is type(value)


def test_every_dialect_forces_a_call_of_any_schema(tokenizer: PreTrainedTokenizerFast) -> None:
    rich = {
        "type": "object",
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}}},
        "properties": {
            "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "b": {"type": "array", "items": {"$ref": "#/$defs/point"}},
            "c": {"type": ["boolean", "integer"]},
            "d": {"const": 'a "quoted" word'},
            "e": {"type": "object"},
            "f": {},
        },
        "required": ["b", "d"],
    }
    functions = functions_of(tool_schemas([{"name": "f", "parameters": rich}]), "any")
    for dialect in DIALECTS:
        forced_grammar(tokenizer, dialect, functions, False).matcher(tokenizer)


# ---- through the model ----


def amulet_saying(tokenizer: PreTrainedTokenizerFast, answers: Any, template: str) -> Amulet:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return Amulet(ScriptedModel(own, answers), own)  # type: ignore[arg-type]


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_a_call_is_streamed_and_ends_in_the_reply(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, f"Let me see.\n{CALL}", KNOWS_TOOLS)
    stream = amulet.stream(user("hi"), tools=TOOLS, trace=True)
    events = list(stream.events())
    reply = stream.reply
    assert (reply.text, reply.finish_reason) == ("Let me see.", "tool_calls")
    (call,) = reply.tool_calls
    assert (call.name, call.arguments, len(call.id)) == ("get_weather", {"city": "Rome"}, 9)
    first, *rest = [event for event in events if event.kind == "tool_call"]
    assert (first.name, first.id, first.index, first.text) == ("get_weather", call.id, 0, "")
    assert "".join(event.text for event in rest) == '{"city": "Rome"}'
    assert len(rest) == len('{"city": "Rome"}')
    assert {(event.name, event.id, event.index) for event in rest} == {(None, None, 0)}
    assert tuple(token for event in events for token in event.tokens) == reply.trace
    pieces = ["L", "e", "t", " m", "e", " s", "e", "e", "."]  # space may belong to a call
    assert list(amulet.stream(user("hi"), tools=TOOLS)) == pieces


def test_special_markers_reach_the_reader(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = KNOWS_TOOLS.replace("<tool_call>", "[TOOL_CALLS][ARGS]")
    own.add_tokens([AddedToken("[TOOL_CALLS]", special=True), AddedToken("[ARGS]", special=True)],
                   special_tokens=True)  # fmt: skip
    model = ScriptedModel(own, 'Ok[TOOL_CALLS]ping[ARGS]{"a": 1}')
    reply = Amulet(model, own).chat(user("hi"), tools=TOOLS)  # type: ignore[arg-type]
    assert reply.text == "Ok"
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("ping", {"a": 1})]


def test_parallel_calls_and_the_switch(tokenizer: PreTrainedTokenizerFast) -> None:
    second = CALL.replace("Rome", "Oslo")
    amulet = amulet_saying(tokenizer, f"{CALL}\n{second}", KNOWS_TOOLS)
    reply = amulet.chat(user("hi"), tools=TOOLS)
    assert [call.arguments["city"] for call in reply.tool_calls] == ["Rome", "Oslo"]
    assert reply.text == ""
    assert len({call.id for call in reply.tool_calls}) == 2
    one = amulet.chat(user("hi"), tools=TOOLS, parallel_tool_calls=False)
    assert [call.arguments["city"] for call in one.tool_calls] == ["Rome"]
    assert one.finish_reason == "tool_calls"
    loop = amulet_saying(tokenizer, "\n".join([CALL] * 9), KNOWS_TOOLS)
    assert len(loop.chat(user("hi"), tools=TOOLS).tool_calls) == 2, "a repeated call ends a loop"


def test_a_malformed_call_is_reported_not_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = '<tool_call>{"name": "ping", "arguments": {"a": nope}}</tool_call>Sorry.'
    reply = amulet_saying(tokenizer, answer, KNOWS_TOOLS).chat(user("hi"), tools=TOOLS)
    (call,) = reply.invalid_tool_calls
    assert (call.name, call.raw) == ("ping", '{"name": "ping", "arguments": {"a": nope}}')
    assert call.error.startswith("the arguments are not JSON: ")
    assert (reply.text, reply.tool_calls, reply.finish_reason) == ("Sorry.", (), "stop")
    reply = amulet_saying(tokenizer, "<tool_call>?</tool_call>", KNOWS_TOOLS).chat(
        user("hi"), tools=TOOLS
    )
    (call,) = reply.invalid_tool_calls
    assert (call.name, call.raw, call.error) == (None, "?", "expected a JSON object")


def test_calls_are_not_steered_and_the_text_is(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(
        tokenizer,
        {"Shout.": f"OH! {CALL.replace('Rome', 'LOUD')}", "": f"OH! {CALL}"},
        KNOWS_TOOLS,
    )
    stream = amulet.stream(
        user("hi"), tools=TOOLS, preference="Shout.", strength=1, floor=0.2,
        parallel_tool_calls=False,
    )  # fmt: skip
    seen = []
    for event in stream.events():
        seen.append((event.kind, tuple(stream.generation.weights), stream.generation.floor))
    assert stream.reply.text == "OH!"
    assert stream.reply.tool_calls[0].arguments == {"city": "Rome"}
    assert set(seen) == {("text", (3.0, -1.0), 0.2), ("tool_call", (0.0, 0.0), 0.0)}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("any", "get_weather"), ("ping", "ping"), ("get_weather", "get_weather")],
)
def test_a_forced_choice_is_enforced(
    tokenizer: PreTrainedTokenizerFast, choice: str, expected: str
) -> None:
    # The model would rather say g... than call anything.
    amulet = amulet_saying(tokenizer, "go away", KNOWS_TOOLS)
    reply = amulet.chat(
        user("hi"), tools=TOOLS, tool_choice=choice, preference="Shout.", max_new_tokens=150,
        parallel_tool_calls=False, logits_processor=_prefers('"}g'),
    )  # fmt: skip
    assert [call.name for call in reply.tool_calls] == [expected]
    assert (reply.text, reply.finish_reason, reply.steering) == ("", "tool_calls", None)


def _prefers(characters: str) -> Any:
    def process(ids: Any, scores: Any) -> Any:
        for rank, character in enumerate(reversed(characters)):
            scores[:, ord(character)] += 1 + rank
        return scores

    return process


def test_choice_none_calls_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, {"get_weather": "seen", "": "unseen"}, KNOWS_TOOLS)
    assert amulet.chat(user("hi"), tools=TOOLS).text == "seen"
    assert amulet.chat(user("hi"), tools=TOOLS, tool_choice="none").text == "unseen"


def test_tools_and_a_grammar_permit_either(tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = Grammar.json_schema({"type": "object", "properties": {}})
    options: dict[str, Any] = {"tools": TOOLS, "grammar": grammar}
    assert amulet_saying(tokenizer, "{}", KNOWS_TOOLS).chat(user("hi"), **options).text == "{}"
    reply = amulet_saying(tokenizer, CALL, KNOWS_TOOLS).chat(user("hi"), **options)
    assert [call.name for call in reply.tool_calls] == ["get_weather"]
    with pytest.raises(RequestError, match="the answer can't be both"):
        amulet_saying(tokenizer, "", KNOWS_TOOLS).chat(user("hi"), tool_choice="any", **options)


def test_a_template_without_tools_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, "x", CHATML)
    with pytest.raises(TemplateError, match=r'ignores tools.*tools_prompt="fallback"'):
        amulet.chat(user("hi"), tools=TOOLS)
    assert amulet.chat(user("hi"), tools=TOOLS, tool_choice="none").text == "x"
    strange = amulet_saying(tokenizer, "x", "{{ tools | tojson if tools }}" + CHATML)
    with pytest.raises(TemplateError, match="does not show how the model writes"):
        strange.chat(user("hi"), tools=TOOLS)


def test_the_fallback_describes_the_tools_and_writes_the_history_as_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    amulet = amulet_saying(tokenizer, CALL, CHATML)
    asked = {"id": "1", "type": "function",
             "function": {"name": "ping", "arguments": '{"a": 1}'}}  # fmt: skip
    chat = [
        {"role": "system", "content": "Be kind."},
        *user("hi"),
        {"role": "assistant", "content": "Hm.", "tool_calls": [asked, asked]},
        {"role": "tool", "tool_call_id": "1", "content": "pong"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "again"}]},
    ]
    prompt = amulet.tokenizer.decode(amulet.encode_chat(chat, tools=TOOLS, tools_prompt="fallback"))
    assert prompt.startswith("<|im_start|>system\nBe kind.\n\nYou can use these tools")
    assert json.dumps(WEATHER) in prompt
    block = '<tool_call>\n{"name": "ping", "arguments": {"a": 1}}\n</tool_call>'
    assert prompt.endswith(
        f"<|im_start|>assistant\nHm.\n{block}\n{block}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\npong\n</tool_response>\n"
        "<tool_response>\nagain\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    reply = amulet.chat(chat, tools=TOOLS, tools_prompt="fallback")
    assert [call.name for call in reply.tool_calls] == ["get_weather"]
    without = amulet.tokenizer.decode(amulet.encode_chat(chat, tools_prompt="fallback"))
    assert "You can use" not in without
    assert "<tool_response>\npong" in without


@pytest.mark.parametrize("text", [None, ["a", "b"]])
def test_the_fallback_writes_nothing_that_is_no_text(
    tokenizer: PreTrainedTokenizerFast, text: Any
) -> None:
    amulet = amulet_saying(tokenizer, "x", CHATML)
    for role in ("system", "user", "tool"):
        chat = [{"role": role, "content": [{"type": "text", "text": text}]}, *user("hi")]
        for tools in (TOOLS, None):
            with pytest.raises(RequestError, match=r"messages\[0\].*expected a string"):
                amulet.encode_chat(chat, tools=tools, tools_prompt="fallback")


def test_a_template_that_knows_tools_needs_no_fallback(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(tokenizer, CALL, KNOWS_TOOLS)
    one = amulet.encode_chat(user("hi"), tools=TOOLS)
    assert amulet.encode_chat(user("hi"), tools=TOOLS, tools_prompt="fallback") == one


def test_tools_in_all_forms(tokenizer: PreTrainedTokenizerFast) -> None:
    def ping(host: str) -> str:
        """Ping a host.

        Args:
            host: its name.
        """
        return host

    schemas = tool_schemas([WEATHER, WEATHER["function"], ping])
    assert [schema["function"]["name"] for schema in schemas] == [
        "get_weather", "get_weather", "ping",
    ]  # fmt: skip
    assert schemas[2]["function"]["parameters"]["properties"]["host"]["type"] == "string"
    with pytest.raises(RequestError, match="two share a name"):
        functions_of(schemas, "auto")
    with pytest.raises(RequestError, match=r"tool_choice='fly'.*\(get_weather, ping\)"):
        functions_of(TOOLS, "fly")
    with pytest.raises(RequestError, match=r"tools\[0\]=3"):
        tool_schemas([3])
    with pytest.raises(RequestError, match="no readable schema"):
        tool_schemas([lambda x: x])
    late = {"type": "string", "default": date(2026, 1, 1)}
    with pytest.raises(RequestError, match=r"^tools\[0\] \(f\) can't be written as JSON: .*date"):
        tool_schemas([{"name": "f", "parameters": {"properties": {"day": late}}}])


def test_a_tokenizers_own_response_template_is_used(tokenizer: PreTrainedTokenizerFast) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ tools | tojson if tools }}" + CHATML
    own.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "defaults": {"role": "assistant"},
        "fields": {
            "content": {"content": "text"},
            "thinking": {"open": "(think)", "close": "(done)", "content": "text"},
            "tool_calls": {
                "open": "(call)", "close": "(end)", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }  # fmt: skip
    answer = '(think)Hm.(done)Ok. (call){"name": "ping", "arguments": {"a": 1}}(end)'
    model = ScriptedModel(own, answer)
    reply = Amulet(model, own).chat(user("hi"), tools=TOOLS)  # type: ignore[arg-type]
    assert (reply.reasoning, reply.text.strip()) == ("Hm.", "Ok.")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("ping", {"a": 1})]


@pytest.mark.slow
def test_a_small_model_makes_valid_calls(
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    amulet = Amulet(*packed_smollm)
    options: dict[str, Any] = {"tools": TOOLS, "tools_prompt": "fallback", "max_new_tokens": 80}
    named = amulet.chat(user("How warm is Paris?"), tool_choice="get_weather", **options)
    assert named.tool_calls[0].arguments["city"] == "Paris"
    any_ = amulet.chat(user("Tell me a joke."), tool_choice="any", **options)
    (call,) = any_.tool_calls
    assert call.name in NAMES
    assert (any_.invalid_tool_calls, any_.text) == ((), "")


def test_the_fallback_continues_no_call() -> None:
    amulet = Amulet(ScriptedModel(family_tokenizer("chatml"), "x"), family_tokenizer("chatml"))
    call = {"function": {"name": "w", "arguments": "{}"}}
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(RequestError, match="The last message calls tools"):
        amulet.chat(chat, tools=[{"name": "w"}], tools_prompt="fallback")
