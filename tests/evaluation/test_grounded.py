"""Facts in decoded answers: the questions can be answered, and what counts as an answer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Steering
from amulet.evaluation.grounded import answered, holds, memory, passages
from tests.models import ScriptedModel


def test_every_passage_holds_its_answers_and_no_question_does() -> None:
    given = passages()
    assert len(given) == 100
    assert len({asked.passage for asked in given}) == 25
    for asked in given:
        assert holds(asked.passage, asked.answers), asked.question
        assert not holds(asked.question, asked.answers), asked.question


def test_what_is_remembered_has_no_article_and_may_be_a_digit() -> None:
    given = {asked.question: asked.answers for asked in memory()}
    assert len(given) == 76
    assert given["What does the Earth orbit?"] == ("Sun",)
    assert given["How many legs does a spider have?"] == ("eight", "8")


@pytest.mark.parametrize(
    ("text", "answers", "held"),
    [
        ("It is led by **Tomas Vey**.", ["Vey"], True),
        ("It is led by Tomas.", ["Vey"], False),
        ("A SURVEY SAYS 27.", ["Vey"], False),
        ("It costs 64 crowns.", ["64"], True),
        ("It costs 640 crowns, or 164.", ["64"], False),
        ("At 14:05.", ["14.05", "14:05"], True),
        ("Bees.", ["bee"], True),
        ("", ["bee"], False),
    ],
)
def test_what_holds_an_answer(text: str, answers: list[str], held: bool) -> None:
    assert holds(text, answers) is held


def test_answers_come_in_order_with_their_verdicts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = ScriptedModel(tokenizer, {"Shout.": "THE SUN", "": "the moon"})
    amulet = Amulet(model, tokenizer)  # type: ignore[arg-type]
    given = [asked for asked in memory() if "orbit" in asked.question] * 3
    plain = list(answered(amulet, given, batch_size=2))
    assert [(asked, text, right) for asked, text, right in plain] == [
        (asked, "the moon", False) for asked in given
    ]
    steering = Steering(strength=0.0)
    [(_, text, right), *_] = answered(amulet, given, "Shout.", steering)
    assert (text, right) == ("THE SUN", True)
