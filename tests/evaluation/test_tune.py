"""The search: its rungs, its guards, and that no answer is decoded twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from amulet import Amulet
from amulet.errors import EvaluationError
from amulet.evaluation.tune import Case, Guards, Trial, _rank, _rungs, tune
from amulet.preference import Steering

QUESTIONS = ["What is tea?", "Why?", "How do bees fly?", "Who?"]


def letters(cases: Sequence[Case]) -> list[float]:
    return [float(sum(map(str.isalpha, case.answer))) for case in cases]


def test_rungs_halve_the_settings_and_double_the_questions() -> None:
    assert _rungs(24, 40) == [(24, 5), (12, 10), (6, 20), (3, 40)]
    assert _rungs(2, 40) == [(2, 40)]


def test_every_setting_is_tried_and_the_best_that_holds_is_chosen(tiny: Amulet) -> None:
    told: list[tuple[int, int]] = []
    found = tune(
        tiny,
        QUESTIONS,
        ["Be brief."],
        letters,
        strengths=(1.0, 4.0),
        floors=(0.0, 0.3),
        placements=("system",),
        guards=Guards(100.0, 1.0),
        max_new_tokens=6,
        tell=lambda *counts: told.append(counts),
    )
    assert [trial.answers for trial in found.trials] == [4, 4, 2, 2]
    settings = {(t.steering.strength, t.steering.floor) for t in found.trials}
    assert len(settings) == 4  # two of them went on after two questions
    best = max((t.score, t.steering.strength) for t in found.trials[:2])[0]
    assert found.prompt_only.answers == 4
    assert (
        max(best, found.prompt_only.score)
        == (found.prompt_only if found.steering.strength == 0 else found.trials[0]).score
    )
    assert told[-1][0] == told[-1][1]


def test_guards_that_nothing_holds_leave_the_prompt_alone(tiny: Amulet) -> None:
    found = tune(
        tiny,
        QUESTIONS,
        ["Be brief."],
        letters,
        strengths=(4.0,),
        floors=(0.0,),
        placements=("system",),
        guards=Guards(-100.0, 1.0),
        max_new_tokens=4,
    )
    assert found.steering == Steering(strength=0.0, floor=0.0)
    assert [trial.holds for trial in found.trials] == [False]


def test_what_breaks_a_guard_ranks_below_what_holds() -> None:
    setting, guards = Steering(), Guards()
    good = Trial(setting, 4, 0.2)
    bad = Trial(setting, 4, 1.0, log_probability_fall=0.9, holds=False)
    worse = Trial(setting, 4, 1.0, log_probability_fall=1.9, holds=False)
    assert sorted([worse, bad, good], key=lambda t: _rank(t, guards)) == [good, bad, worse]


def test_a_judge_that_skips_an_answer_is_an_error(tiny: Amulet) -> None:
    with pytest.raises(EvaluationError, match="The judge returned 0 numbers"):
        tune(tiny, ["Why?"], ["Be brief."], lambda cases: [], max_new_tokens=2)
    with pytest.raises(EvaluationError, match="No questions"):
        tune(tiny, [], ["Be brief."], letters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": "Why?"}, r"^questions='Why\?': expected a list of texts"),
        ({"questions": [5]}, r"^questions=\[5\]: expected a list of texts"),
        ({"preferences": "Be brief."}, r"^preferences='Be brief\.': expected a list of texts"),
        ({"score": None}, r"^score=None: expected a function of a list of cases"),
        ({"strengths": 0.5}, r"^strengths=0\.5: expected a list of values to try"),
        ({"placements": "user"}, r"^placements='user': expected a list of values to try"),
        ({"focuses": 1.0}, r"^focuses=1\.0: expected a list of values to try"),
        ({"guards": {"distinct_3": 0.1}}, r"^guards=\{.*\}: expected Guards"),
        ({"batch_size": 0}, r"^batch_size=0: expected a whole number, 1 or more"),
        ({"batch_size": None}, r"^batch_size=None: expected a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_searched_is_named_before_anything_is_decoded(
    tiny: Amulet, options: dict[str, Any], message: str
) -> None:
    told: list[Any] = []
    given = {"questions": ["Why?"], "preferences": ["Be brief."], "score": letters, **options}
    with pytest.raises(EvaluationError, match=message):
        tune(tiny, **given, tell=lambda *counts: told.append(counts))
    assert told == []
