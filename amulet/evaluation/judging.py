"""Scores the answers of a run with one of the judges; existing scores are kept."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from amulet.errors import EvaluationError
from amulet.evaluation.run import Answer, PreferenceMeta, Run

if TYPE_CHECKING:
    from amulet import Amulet

JUDGES = ("rules", "guards", "armorm", "llm")

# The function of each further judge, `function(run, options, tell)`, imported on use.
SCORERS = {
    "guards": ("amulet.evaluation.guards", "score_guards"),
    "armorm": ("amulet.evaluation.judges.armorm", "score_armorm"),
    "llm": ("amulet.evaluation.judges.llm", "score_llm"),
}

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class JudgeOptions:
    """What a judge needs beyond the run.

    Attributes:
        amulet: the model that answered, for the guards' log-probabilities.
        model: the judging model: a hub id or folder for armorm, the endpoint's name for llm.
        base_url: the llm judge's OpenAI-compatible endpoint.
        baseline: the method that the llm judge compares every other one with; None is the
            preference in the prompt alone, with the same placement.
        prices: of the llm judge's endpoint, US dollars per million tokens read and written.
        concurrency: concurrent requests to that endpoint.
        batch_size: answers that a judging model reads at once.
    """

    amulet: Amulet | None = None
    model: str | None = None
    base_url: str | None = None
    baseline: str | None = None
    prices: tuple[float, float] | None = None
    concurrency: int = 4
    batch_size: int = 8


def check_judges(names: Sequence[str], preferences: Sequence[PreferenceMeta]) -> None:
    """Raise EvaluationError for judges that can't score these preferences, before decoding."""
    for name in names:
        if name not in JUDGES:
            close = difflib.get_close_matches(name, JUDGES, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise EvaluationError(
                f"{name!r} is not a judge: expected one of {', '.join(JUDGES)}.{meant}"
            )
    if "rules" in names and not any(preference.rule for preference in preferences):
        raise EvaluationError(
            "The judge 'rules' checks preferences that have a rule, and these have none: use "
            "--preferences rules, or another judge."
        )


def score_run(
    run: Run, name: str, options: JudgeOptions | None = None, tell: Tell | None = None
) -> None:
    """Score every answer of a run that this judge has not scored.

    Args:
        run: its answers are read; scores are stored one by one.
        name: "rules", "guards", "armorm" or "llm".
        options: the judge's options.
        tell: called with (answers scored, answers in all).

    Raises:
        EvaluationError: there is no such judge, or it lacks an option or package.
    """
    check_judges([name], run.meta.preferences)
    options = options or JudgeOptions()
    if name == "rules":
        _score_by_rules(run, tell)
        return
    module, function = SCORERS[name]
    try:
        scorer = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("amulet."):
            raise
        raise EvaluationError(
            f"The judge {name!r} needs the package {error.name!r}: run "
            '`pip install "amulet-integrations[eval]"`.'
        ) from error
    scorer(run, options, tell)


def _score_by_rules(run: Run, tell: Tell | None) -> None:
    from amulet.evaluation.rules import rule

    rules = {meta.name: meta.rule for meta in run.meta.preferences if meta.rule is not None}
    scored = run.scores("rules")
    answers = [answer for answer in run.answers() if answer.preference in rules]
    for done, answer in enumerate(answers, 1):
        if answer.key not in scored:
            checks = [rule(name).check for name in rules[answer.preference].split("+")]
            kept = sum(check(answer.answer) for check in checks) / len(checks)
            run.append_scores("rules", answer.key, {"adherence": kept})
        if tell is not None:
            tell(done, len(answers))


def missing(run: Run, name: str) -> list[Answer]:
    """Return the answers that a judge has not scored, in the run's order."""
    scored = run.scores(name)
    return [answer for answer in run.answers() if answer.key not in scored]
