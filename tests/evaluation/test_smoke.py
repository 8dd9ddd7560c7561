"""The guard of quality: on a few fixed questions the default steers, and the text stays sound.

`make eval-smoke` runs it and shows the figures. The whole comparison is in docs/results.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from amulet import Amulet
from amulet.evaluation.decode import evaluate
from amulet.evaluation.jobs import Settings
from amulet.evaluation.judging import JudgeOptions, score_run
from amulet.evaluation.methods import parse_methods
from amulet.evaluation.paper import preferences_of
from amulet.evaluation.questions import Question, QuestionSet
from amulet.preference import DEFAULT_STEERING

QUESTIONS = (
    "How can I sleep better?",
    "What should I cook for dinner tonight?",
    "Why is the sea salty?",
    "How do I start learning the guitar?",
    "What is a good gift for my mother?",
    "How does a bicycle stay upright?",
)
PREFERENCES = ("one-sentence", "bullets", "exclamation", "pirate")


@pytest.mark.slow
def test_the_default_steers_and_keeps_the_text_sound(tmp_path: Path) -> None:
    default, smollm = DEFAULT_STEERING, Amulet.embedded()
    ours = f"ours:strength={default.strength},floor={default.floor},placement={default.placement}"
    questions = tuple(Question(index=i, question=text) for i, text in enumerate(QUESTIONS))
    run = evaluate(
        smollm,
        tmp_path / "run",
        sets=[QuestionSet(name="smoke", questions=questions)],
        preferences=preferences_of(PREFERENCES),
        methods=parse_methods(["pref", ours]),
        settings=Settings(max_new_tokens=48),
    )
    for judge in ("rules", "guards"):
        score_run(run, judge, JudgeOptions(amulet=smollm))
    rules, guards = run.scores("rules"), run.scores("guards")

    def mean(scores: dict[str, dict[str, float]], value: str, steered: bool) -> float:
        own = [a.key for a in run.answers() if (a.method != "pref") == steered]
        return sum(scores[key][value] for key in own) / len(own)

    prompt_only, steered = mean(rules, "adherence", False), mean(rules, "adherence", True)
    falls = {
        name: mean(guards, name, False) - mean(guards, name, True)
        for name in ("log_probability", "distinct_3")
    }
    print(f"adherence: prompt only {prompt_only:.2f}, steered {steered:.2f}; falls: {falls}")
    assert steered >= prompt_only + 0.2
    assert falls["distinct_3"] <= 0.1
    assert mean(guards, "empty", True) == 0
