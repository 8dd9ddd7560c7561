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
from amulet.evaluation.methods import Method, parse_methods
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
    prompted = f"ours:strength=0,floor=0,placement={default.placement}"
    ours = f"ours:strength={default.strength},floor={default.floor},placement={default.placement}"
    system, same_place, steered = methods = parse_methods(["pref", prompted, ours])
    questions = tuple(Question(index=i, question=text) for i, text in enumerate(QUESTIONS))
    run = evaluate(
        smollm,
        tmp_path / "run",
        sets=[QuestionSet(name="smoke", questions=questions)],
        preferences=preferences_of(PREFERENCES),
        methods=methods,
        settings=Settings(max_new_tokens=48),
    )
    for judge in ("rules", "guards"):
        score_run(run, judge, JudgeOptions(amulet=smollm))

    def mean(judge: str, value: str, method: Method) -> float:
        scores = run.scores(judge)
        own = [answer.key for answer in run.answers() if answer.method == method.name]
        return sum(scores[key][value] for key in own) / len(own)

    for method in methods:
        adherence = mean("rules", "adherence", method)
        likely = mean("guards", "log_probability", method)
        distinct = mean("guards", "distinct_3", method)
        print(f"{method.name}: kept {adherence:.2f}, {likely:.2f} nats, distinct-3 {distinct:.2f}")
    kept = {method.name: mean("rules", "adherence", method) for method in methods}
    distinct = {method.name: mean("guards", "distinct_3", method) for method in methods}
    assert kept[steered.name] >= kept[system.name] + 0.2
    assert kept[steered.name] >= kept[same_place.name] + 0.1
    assert distinct[steered.name] >= distinct[same_place.name] - 0.15
    assert mean("guards", "empty", steered) == 0
