"""The facts are sound, and a model is scored by the likeliest option."""

from __future__ import annotations

import pytest

from amulet import Amulet, Steering
from amulet.evaluation import facts as module
from amulet.evaluation.facts import Fact, facts, right_answers
from tests.models import byte_tokenizer, random_model


def test_the_facts_are_many_and_their_options_differ() -> None:
    found = facts()
    assert len(found) == 76
    assert len({fact.question for fact in found}) == 76
    for fact in found:
        assert len({option.lower() for option in fact.options}) == 4
        assert fact.question.endswith("?")


def test_the_likeliest_option_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    monkeypatch.setattr(module, "_scores", lambda *_: iter([-1.0, -2.0, -3.0, -1.5]))
    assert right_answers(amulet, given=facts()[:2]) == [True, True]
    monkeypatch.setattr(module, "_scores", lambda *_: iter([-1.0, -1.0, -3.0, -1.5]))
    assert right_answers(amulet, given=facts()[:1]) == [False], "a tie is no answer"


def test_steering_moves_the_scores() -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    fact = Fact(question="What is tea?", options=("A drink", "A stone", "A song", "A hat"))
    steering = Steering(strength=3.0)
    plain = list(module._scores(amulet, fact, None, steering))
    steered = list(module._scores(amulet, fact, "Be brief.", steering))
    assert len(plain) == len(steered) == 4
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    told: list[tuple[int, int]] = []
    right_answers(amulet, given=[fact], tell=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
