"""Grammars: what they permit, when they end, and what a bad one says."""

from __future__ import annotations

import json
import sys
from typing import Any, cast

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amulet import Amulet, DecodeError, Grammar, MissingPackageError, Reply, RequestError
from amulet.grammar import closed, converted_tokenizer, fault_in
from tests.models import IM_END, ScriptedModel

END = frozenset({IM_END})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "kind": {"enum": ["adult", "child"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def follow(tokenizer: PreTrainedTokenizerFast, grammar: Grammar, text: str) -> tuple[bool, bool]:
    """Feed a text; return whether the answer may end after it, and whether it must."""
    matcher = grammar.matcher(tokenizer, END)
    for byte in text.encode():
        assert matcher.allowed()[byte], f"{chr(byte)!r} of {text!r} is not permitted"
        matcher.consume(byte)
    return (True, True) if matcher.complete else (bool(matcher.allowed()[IM_END]), False)


@pytest.mark.parametrize(
    ("grammar", "text", "may_end", "must_end"),
    [
        (Grammar.choice(["yes", "no", 'a "b"']), "no", True, True),
        (Grammar.choice(["yes", "no", 'a "b"']), 'a "b"', True, True),
        (Grammar.choice(["yes", "yesterday"]), "yes", True, False),
        (Grammar.regex("[0-9]+"), "12", True, False),
        (Grammar.regex("[0-9]{2}"), "1", False, False),
        (Grammar.lark('start: "a" (";" "a")*'), "a;a", True, False),
        (Grammar.json_object(), '{"a": [1, {"b": null}]}', True, True),
        (Grammar.json_schema(PERSON), '{"name": "Ö", "age": 3, "kind": "child"}', True, True),
        (Grammar.either(Grammar.regex("a+"), Grammar.json_object()), "{}", True, True),
        (Grammar.either(Grammar.regex("a+"), Grammar.json_object()), "aa", True, False),
    ],
)
def test_what_a_grammar_permits(
    tokenizer: PreTrainedTokenizerFast,
    grammar: Grammar,
    text: str,
    may_end: bool,
    must_end: bool,
) -> None:
    assert follow(tokenizer, grammar, text) == (may_end, must_end)


def test_json_has_one_spacing(tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = Grammar.json_schema(PERSON).matcher(tokenizer, END)
    for byte in b'{"name":':
        matcher.consume(byte)
    assert matcher.allowed().nonzero()[:, 0].tolist() == [ord(" ")]
    matcher.consume(ord(" "))
    assert matcher.allowed().nonzero()[:, 0].tolist() == [ord('"')]


def test_a_forbidden_token_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    matcher = Grammar.choice(["yes"]).matcher(tokenizer, END)
    with pytest.raises(DecodeError, match="could not be followed"):
        matcher.consume(ord("n"))
    with pytest.raises(DecodeError, match="could not be followed"):
        matcher.allowed()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema("{}"), "a JSON schema of type str: expected a dict"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "can't be written as JSON"),
        (lambda: Grammar.choice([]), r"choice\(\[\]\): expected one or more"),
        (lambda: Grammar.choice(["a", ""]), "expected one or more non-empty texts"),
        (lambda: Grammar.choice(cast(Any, 5)), r"^choice\(5\): expected one or more.*choice\(\["),
        (lambda: Grammar.choice(cast(Any, [b"x" * 200])), r"choice\(<list>\): expected"),
        (
            lambda: Grammar("json_schema", {}),
            r"Grammar\('json_schema', {}\): expected.*json_schema\(",
        ),  # type: ignore[arg-type]
        (lambda: Grammar("json", "{}"), r"Grammar\('json', '{}'\): expected a kind of grammar"),  # type: ignore[arg-type]
        (lambda: Grammar.either("a", Grammar.regex("a")), r"either\('a'\): expected two"),  # type: ignore[arg-type]
        (lambda: Grammar.regex(""), "expected non-empty text"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"type": "strin"}), r"grammar \(json_schema\): .*strin"),
        (Grammar.json_schema({"uniqueItems": True}), "uniqueItems"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.lark("start: nothing"), "unknown name"),
        (Grammar("json_schema", "{"), r"grammar \(json_schema\): EOF while parsing an object"),
        (Grammar("regex", "\ud800"), r"grammar \(regex\): .*surrogates not allowed"),
    ],
)
def test_an_invalid_grammar_is_refused_before_the_prefill(
    tokenizer: PreTrainedTokenizerFast, grammar: Grammar, message: str
) -> None:
    model = ScriptedModel(tokenizer, "x")
    with pytest.raises(RequestError, match=message):
        Amulet(model, tokenizer).chat(user("hi"), grammar=grammar)  # type: ignore[arg-type]
    assert model.calls == []


def test_the_tokenizer_is_converted_once(tokenizer: PreTrainedTokenizerFast) -> None:
    assert converted_tokenizer(tokenizer, END) is converted_tokenizer(tokenizer, END)
    assert converted_tokenizer(tokenizer, END) is not converted_tokenizer(tokenizer, frozenset())


def test_a_missing_package_names_the_command(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingPackageError, match=r'pip install "amulet-integrations\[grammar\]"'):
        Grammar.regex("a").matcher(tokenizer)


def test_an_answer_follows_its_grammar_and_ends_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    # The model wants to say "no way"; it may only say one of two words.
    amulet = Amulet(ScriptedModel(tokenizer, "no way"), tokenizer)  # type: ignore[arg-type]
    reply = amulet.chat(user("hi"), grammar=Grammar.choice(["yes", "no"]))
    assert (reply.text, reply.finish_reason, reply.token_ids) == ("no", "stop", (*b"no",))
    assert amulet.chat(user("hi"), grammar=Grammar.regex("no.*")).text == "no way"
    cut = amulet.chat(user("hi"), grammar=Grammar.regex("[a-z]{9}"), max_new_tokens=4)
    assert cut.finish_reason == "length"


def test_a_grammar_is_decoded_plainly_unless_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, {"Be rude.": '"grr"', "": '"yes"'})
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    grammar = Grammar.json_schema({"type": "string"})
    plain = amulet.chat(user("hi"), preference="Be rude.", grammar=grammar)
    assert (plain.text, plain.steering, plain.usage.base_prompt_tokens) == ('"yes"', None, 0)
    steered = amulet.chat(user("hi"), preference="Be rude.", grammar=grammar, steer_grammar=True)
    assert steered.text == '"grr"'
    assert steered.steering is not None
    # An enum is no free text: it stays the plain model's choice.
    enum = Grammar.json_schema({"enum": ["grr", "yes"]})
    asked = amulet.chat(user("hi"), preference="Be rude.", grammar=enum, steer_grammar=True)
    assert asked.text == '"yes"'


def test_a_grammar_in_a_batch_is_its_own_rows_affair(tokenizer: PreTrainedTokenizerFast) -> None:
    amulet = Amulet(ScriptedModel(tokenizer, "no way"), tokenizer)  # type: ignore[arg-type]

    def breaks(ids: Any, scores: Any) -> Any:
        scores[:] = float("-inf")
        scores[:, ord("z")] = 0.0
        return scores

    asked: dict[str, Any] = {"messages": user("hi"), "grammar": Grammar.choice(["yes", "no"])}
    replies = amulet.batch(
        [{"messages": user("hi")}, asked, {**asked, "logits_processor": breaks}],
        return_exceptions=True,
    )
    assert [str(reply) for reply in replies[:2]] == ["no way", "no"]
    assert isinstance(replies[2], DecodeError)


@pytest.mark.slow
def test_a_small_model_writes_valid_json(
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    amulet = Amulet(*packed_smollm)
    questions = ("Describe Ada Lovelace.", "Who is Tom Sawyer?", "Invent a person.")
    replies = amulet.batch(
        {
            "messages": user(question),
            "grammar": Grammar.json_schema(PERSON),
            "max_new_tokens": 60,
            "temperature": temperature,
            "seed": 0,
        }
        for question in questions
        for temperature in (0.0, 1.5)
    )
    for reply in replies:
        assert isinstance(reply, Reply)
        assert reply.finish_reason == "stop"
        person = json.loads(reply.text)
        assert list(person) == ["name", "age", "kind"]
        assert isinstance(person["name"], str)
        assert isinstance(person["age"], int)
        assert person["kind"] in ("adult", "child")


def test_closed_schemas_permit_no_further_keys_unless_they_say_so() -> None:
    schema = {
        "type": "object",
        "properties": {
            "inner": {"type": "object", "properties": {"a": {"type": "integer"}}},
            "open": {"type": "object", "properties": {}, "additionalProperties": True},
            "any": {"type": "object"},
        },
    }
    shut = closed(schema)
    assert shut["additionalProperties"] is False
    assert shut["properties"]["inner"]["additionalProperties"] is False
    assert shut["properties"]["open"]["additionalProperties"] is True
    assert shut["properties"]["any"] == {"type": "object"}
    assert "additionalProperties" not in schema, "the given schema is left alone"


def test_json_like_leaves_out_what_a_grammar_can_not_say(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    entry = {"type": "string", "pattern": "^(?=a)a+$", "format": "colour"}
    listed = {"type": "array", "items": entry, "uniqueItems": True, "not": {"maxItems": 0}}
    schema = {
        "$schema": "https://example.com/own",
        "type": "object",
        "properties": {"pattern": listed},
    }
    with pytest.raises(RequestError, match=r"grammar \(json_schema\)"):
        Grammar.json_schema(schema).matcher(tokenizer)
    matcher = Grammar.json_like(schema).matcher(tokenizer)
    for token_id in tokenizer.encode('{"pattern": ["a", "b"]}', add_special_tokens=False):
        matcher.consume(token_id)
    assert matcher.complete
    with pytest.raises(DecodeError):
        Grammar.json_like(schema).matcher(tokenizer).consume(ord("["))


@pytest.mark.parametrize("make", [Grammar.json_schema, Grammar.json_like])
def test_the_field_that_has_no_grammar_is_named(
    tokenizer: PreTrainedTokenizerFast, make: Any
) -> None:
    inner = {"type": "object", "properties": {"b": {"type": "strin"}}}
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/inner"}},
        "$defs": {"inner": inner},
    }
    with pytest.raises(RequestError, match=r"field 'a\.b': Invalid type: strin"):
        make(schema).matcher(tokenizer)


def test_a_number_that_json_lacks_is_told_with_its_field() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number", "minimum": float("nan")}}}
    assert str(fault_in(schema)).startswith("field 'x': ")


def test_a_schema_that_holds_itself_is_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"self": schema}
    with pytest.raises(RequestError, match="can't be written as JSON"):
        Grammar.json_like(schema)
