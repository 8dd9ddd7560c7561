"""Thinking spans: found, kept out of the text, and not steered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from amulet import Amulet, Grammar
from amulet.output.sections import Spans, find_thinking
from tests.models import CHATML, ScriptedModel

THINK = ("<think>", "</think>")
# It cuts thinking from earlier answers, as reasoning models' templates do.
THINKING_CHATML = "{%- set marker = '</think>' -%}" + CHATML


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(params=["text", "token", "special"])
def thinker(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tokenizer whose thinking markers are plain text, tokens, or special tokens."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = THINKING_CHATML
    if request.param != "text":
        special = request.param == "special"
        own.add_tokens([AddedToken(marker, special=special) for marker in THINK], special)
    return own


def amulet_saying(tokenizer: PreTrainedTokenizerFast, answers: Any) -> Amulet:
    return Amulet(ScriptedModel(tokenizer, answers), tokenizer)  # type: ignore[arg-type]


def scan(text: str, size: int, **options: Any) -> tuple[str, str]:
    spans = Spans(THINK, **options)
    pieces = [p for at in range(0, len(text), size) for p in spans.push(text[at : at + size])]
    pieces += spans.finish()
    said = "".join(piece.text for piece in pieces if piece.kind == "text")
    return "".join(piece.text for piece in pieces if piece.kind == "reasoning"), said


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "said"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        (" \n<think>a < b\n\nso</think>Yes. ", False, "a < b\n\nso", "Yes. "),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>never closed </thi", False, "never closed </thi", ""),
        ("never closed", True, "never closed", ""),
        ("<think></think>Yes", False, "", "Yes"),
        ("  plain <think>not</think> <", False, "", "  plain <think>not</think> <"),
        ("<thin", False, "", "<thin"),
        ("<think>a</think>\n", False, "a", ""),
        ("", True, "", ""),
    ],
)
def test_cutting_does_not_depend_on_the_pieces(
    text: str, opened: bool, reasoning: str, said: str, size: int
) -> None:
    assert scan(text, size, opened=opened) == (reasoning, said)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "said"),
    [
        ("<thin", False, "", ""),
        ("<think>a </thi", False, "a", ""),
        ("a</think>b <", True, "a", "b <"),
        ("b <", False, "", "b <"),
    ],
)
def test_a_marker_that_a_limit_cuts_is_no_text(
    text: str, opened: bool, reasoning: str, said: str
) -> None:
    spans = Spans(THINK, opened=opened)
    pieces = [*spans.push(text), *spans.finish(cut=True)]
    found = {
        kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "text")
    }
    assert found == {"reasoning": reasoning, "text": said}


def test_the_markers_are_those_of_the_template() -> None:
    assert find_thinking("... '</think>' ...") == THINK
    assert find_thinking("[THINK] x [/THINK]") == ("[THINK]", "[/THINK]")
    assert find_thinking(CHATML) is None


def test_reasoning_is_told_apart_and_events_say_which(thinker: PreTrainedTokenizerFast) -> None:
    stream = amulet_saying(thinker, "<think>\nHm, so.\n</think>\n\nYes!").stream(
        user("hi"), trace=True
    )
    events = list(stream.events())
    reply = stream.reply
    assert (reply.reasoning, reply.text) == ("Hm, so.", "Yes!")
    for kind, text in (("reasoning", reply.reasoning), ("text", reply.text)):
        assert "".join(event.text for event in events if event.kind == kind) == text
    assert tuple(token for event in events for token in event.tokens) == reply.trace
    assert list(amulet_saying(thinker, "<think>Hm</think>Yes!").stream(user("hi"))) == list("Yes!")


def test_stop_strings_are_for_the_text(thinker: PreTrainedTokenizerFast) -> None:
    reply = amulet_saying(thinker, "<think>a. b.</think>c. d").chat(user("hi"), stop=". ")
    assert (reply.reasoning, reply.text, reply.stop_string) == ("a. b.", "c", ". ")


def test_a_span_that_is_never_closed_leaves_no_text(thinker: PreTrainedTokenizerFast) -> None:
    reply = amulet_saying(thinker, "<think>on and on").chat(user("hi"), max_new_tokens=300)
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("on and on", "", "stop")


def test_a_prompt_that_opens_the_span(thinker: PreTrainedTokenizerFast) -> None:
    thinker.chat_template = f"{THINKING_CHATML}<think>\n"
    reply = amulet_saying(thinker, "Hm.</think>Yes.").chat(user("hi"))
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes.")


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_is_not_steered(thinker: PreTrainedTokenizerFast, opened: bool) -> None:
    """The plain model's thoughts, then the preferred answer: weights and floor come and go."""
    start = "" if opened else "<think>"
    if opened:
        thinker.chat_template = f"{THINKING_CHATML}<think>\n"
    # The preferred row wants "loud" thoughts; its answer is in capitals.
    amulet = amulet_saying(
        thinker, {"Shout.": f"{start}calm</think>LOUD", "": f"{start}calm</think>soft"}
    )
    stream = amulet.stream(user("hi"), preference="Shout.", strength=2, floor=0.1)
    seen = []
    for event in stream.events():
        seen.append((event.kind, tuple(stream.generation.weights), stream.generation.floor))
    assert (stream.reply.reasoning, stream.reply.text) == ("calm", "LOUD")
    assert set(seen) == {("reasoning", (0.0, 0.0), 0.0), ("text", (5.0, -2.0), 0.1)}
    # Without it, the preferred row alone (which thinks otherwise) must not decide inside the span.
    other = amulet_saying(thinker, {"Shout.": f"{start}LOUD!</think>LOUD", "": f"{start}calm"})
    assert other.chat(user("hi"), preference="Shout.").reasoning == "calm"


def test_a_grammar_begins_after_the_thinking(thinker: PreTrainedTokenizerFast) -> None:
    thinker.chat_template = f"{THINKING_CHATML}<think>\n"
    amulet = amulet_saying(thinker, "Hm: no.</think>no way")
    reply = amulet.chat(user("hi"), grammar=Grammar.choice(["yes", "no"]))
    assert (reply.reasoning, reply.text) == ("Hm: no.", "no")


def test_a_continued_answer_may_be_inside_the_span(thinker: PreTrainedTokenizerFast) -> None:
    amulet = amulet_saying(thinker, "so</think>Yes")
    begun = [*user("hi"), {"role": "assistant", "content": "<think>Hm, "}]
    assert amulet.chat(begun).reasoning == "so"
    done = [*user("hi"), {"role": "assistant", "content": "<think>Hm</think>I, "}]
    assert amulet.chat(done).text == "so</think>Yes"
