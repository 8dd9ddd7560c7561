"""The facts are sound, and a model is scored by the likeliest option."""

from __future__ import annotations

from typing import Any

import pytest

from amulet import Amulet, Request, Steering
from amulet.evaluation import facts as module
from amulet.evaluation.facts import Fact, facts, right_answers
from amulet.evaluation.scoring import answer_log_probabilities, score_answers
from tests.models import byte_tokenizer, random_model

TEA = Fact(question="What is tea?", options=("a drink", "a stone", "a song", "a hat"))


def test_the_facts_are_many_and_their_options_differ() -> None:
    found = facts()
    assert len(found) == 76
    assert len({fact.question for fact in found}) == 76
    for fact in found:
        assert len({option.lower() for option in fact.options}) == 4
        assert fact.question.endswith("?")


def test_the_likeliest_option_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    means = [-1.0, -2.0, -3.0, -1.5, -2.0, -1.0, -3.0, -4.0, -1.0, -1.0, -3.0, -1.5]
    monkeypatch.setattr(module, "score_answers", lambda *_: means)
    assert right_answers(amulet, given=facts()[:3]) == [True, False, False], "a tie is no answer"


def test_an_option_scores_as_the_mean_of_what_is_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    amulet = Amulet(random_model("llama"), byte_tokenizer())
    steering = Steering(strength=3.0, floor=0.9, placement="user")
    taken: list[list[float]] = []

    def spy(amulet: Amulet, items: Any, take: Any, tell: Any) -> list[float]:
        taken.append(score_answers(amulet, items, take, tell))
        return taken[-1]

    monkeypatch.setattr(module, "score_answers", spy)
    told: list[tuple[int, int]] = []
    for preference in (None, "Be brief."):
        right_answers(amulet, preference, steering, [TEA, TEA], lambda *c: told.append(c))
    assert told == [(2, 2), (2, 2)]
    messages = [{"role": "user", "content": "What is tea?"}]
    for preference, means in zip((None, "Be brief."), taken, strict=True):
        request = Request(messages=messages, preference=preference, placement="user")
        for option, mean in zip(("A drink", "A stone", "A song", "A hat"), means, strict=False):
            scores = answer_log_probabilities(amulet, request, list(option.encode()))
            own = scores.base if preference is None else scores.steered(3.0)  # without the floor
            assert mean == pytest.approx(float(own.mean()), abs=1e-4)
    assert all(abs(a - b) > 1e-3 for a, b in zip(*taken, strict=True))
