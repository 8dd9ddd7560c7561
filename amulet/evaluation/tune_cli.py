"""The command `amulet tune`: writes the `Steering` file that rules or thumbs suggest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amulet.console import Device, DType, Model, check_out, load, progress_bar, readable_errors
from amulet.errors import EvaluationError
from amulet.preference import PLACEMENTS as KNOWN_PLACEMENTS
from amulet.preference import Placement, Steering

if TYPE_CHECKING:
    from amulet import Amulet
    from amulet.evaluation.thumbs import Thumb
    from amulet.evaluation.tune import Case, Score, Tuned

Out = Annotated[Path, typer.Option(metavar="FILE", help="The steering file to write.")]
Questions = Annotated[
    list[str] | None,
    typer.Option("--questions", "-q", metavar="SOURCE", help="As for `amulet eval`."),
]
Preferences = Annotated[
    list[str] | None,
    typer.Option(
        "--preferences",
        "-p",
        metavar="NAMES",
        help="Names of rules, separated by commas; see --list-rules.",
    ),
]
Thumbs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON lines of answer pairs, or a server's thumbs file."),
]
User = Annotated[
    str | None,
    typer.Option(help="User whose thumbs are read from a server's file. Default: all users."),
]
Strengths = Annotated[
    list[float] | None, typer.Option("--strength", help="Strength to try; repeatable.")
]
Floors = Annotated[list[float] | None, typer.Option("--floor", help="Floor to try; repeatable.")]
Placements = Annotated[
    list[str] | None, typer.Option("--placement", help="Placement to try; repeatable.")
]
Focuses = Annotated[
    list[float] | None,
    typer.Option("--focus", help="Focus to try; repeatable. Default: only the default."),
]
LoopGuards = Annotated[
    list[int] | None,
    typer.Option("--loop-guard", help="Loop guard to try; repeatable. Default: only the default."),
]
Limit = Annotated[
    int | None, typer.Option(help="Questions per set, drawn by the seed. Default: all.")
]
Seed = Annotated[int, typer.Option(help="Seed for drawing and ordering the questions.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum tokens per answer.")]
LogProbability = Annotated[
    float,
    typer.Option(
        "--max-log-probability-fall",
        help="Permitted loss against the prompt alone, in nats per token.",
    ),
]
Distinct = Annotated[
    float,
    typer.Option("--max-distinct-3-fall", help="Permitted loss against the prompt alone, 0 to 1."),
]
ListRules = Annotated[
    bool,
    typer.Option("--list-rules", help="List the rules and what they check, and exit."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("tune")(tune_command)


def tune_command(
    out: Out = Path("steering.json"),
    questions: Questions = None,
    preferences: Preferences = None,
    thumbs: Thumbs = None,
    user: User = None,
    model: Model = None,
    strength: Strengths = None,
    floor: Floors = None,
    placement: Placements = None,
    focus: Focuses = None,
    loop_guard: LoopGuards = None,
    limit: Limit = None,
    seed: Seed = 0,
    max_new_tokens: Tokens = 128,
    max_log_probability_fall: LogProbability = 0.3,
    max_distinct_3_fall: Distinct = 0.05,
    device: Device = None,
    dtype: DType = "auto",
    list_rules: ListRules = False,
) -> None:
    """Find the settings that suit your model and preferences, and write a steering file.

    Give --questions and --preferences (their rules judge), or --thumbs. If thumbs have several
    preferences, their weights go to a second file next to FILE.
    """
    if list_rules:
        Console().print(_rule_table())
        return
    with readable_errors():
        has_rules = bool(questions and preferences)
        if (thumbs is None) != has_rules or (thumbs and (questions or preferences)):
            raise EvaluationError(
                "Expected either --questions with --preferences, or --thumbs alone."
            )
        check_out("--out", out)
        places = _placements(placement)
        if thumbs is not None:
            from amulet.evaluation.thumbs import read_thumbs

            pairs = read_thumbs(thumbs, user)
            _by_thumbs(load(model, device, dtype), pairs, places, out)
            return
        from amulet.evaluation.questions import load_question_sets
        from amulet.evaluation.tune import (
            FLOORS,
            PLACEMENTS,
            STRENGTHS,
            Guards,
            tune,
        )

        sets = load_question_sets(questions or [], limit=limit, seed=seed)
        wishes, score = _rules(preferences or [])
        guards = Guards(max_log_probability_fall, max_distinct_3_fall)
        amulet = load(model, device, dtype)
        with progress_bar("Answers") as tell:
            found = tune(
                amulet,
                [question.question for one in sets for question in one.questions],
                wishes,
                score,
                strengths=strength or STRENGTHS,
                floors=floor or FLOORS,
                placements=places or PLACEMENTS,
                focuses=focus,
                loop_guards=loop_guard,
                guards=guards,
                max_new_tokens=max_new_tokens,
                seed=seed,
                tell=tell,
            )
        out.write_text(found.steering.model_dump_json(indent=1) + "\n", encoding="utf-8")
        Console().print(_table(found))
        _say(f"Written: {out}")


def _placements(given: list[str] | None) -> tuple[Placement, ...]:
    for name in given or ():
        if name not in KNOWN_PLACEMENTS:
            raise EvaluationError(
                f"placement={name!r}: expected one of {', '.join(KNOWN_PLACEMENTS)}."
            )
    return tuple(cast(Placement, name) for name in given or ())


def _rules(names: Sequence[str]) -> tuple[list[str], Score]:
    """Return the texts of the preferences, and a judge that checks their rules."""
    from amulet.evaluation.paper import preferences_of
    from amulet.evaluation.rules import rule, unknown_rule

    metas = preferences_of(name for given in names for name in given.split(","))
    checks = {}
    for meta in metas:
        if meta.rule is None:
            raise EvaluationError(unknown_rule(meta.name))
        checks[meta.text] = [rule(name).check for name in meta.rule.split("+")]

    def score(cases: Sequence[Case]) -> list[float]:
        kept = [[check(case.answer) for check in checks[case.preference]] for case in cases]
        return [sum(results) / len(results) for results in kept]

    return list(checks), score


def _by_thumbs(
    amulet: Amulet, pairs: Sequence[Thumb], places: tuple[Placement, ...], out: Path
) -> None:
    from amulet.evaluation.thumbs import tune_by_thumbs

    with progress_bar("Pairs") as tell:
        found = tune_by_thumbs(amulet, pairs, placements=places or None, tell=tell)
    out.write_text(found.steering.model_dump_json(indent=1) + "\n", encoding="utf-8")
    written = [str(out)]
    if len(found.preferences) > 1:
        beside = out.with_suffix(".preferences.json")
        listed = [preference.model_dump() for preference in found.preferences]
        beside.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", "utf-8")
        written.append(str(beside))
    fit = found.fit
    for preference, weight, deviation in zip(
        found.preferences, fit.weights, fit.deviations, strict=True
    ):
        _say(f"{weight:+.2f} ± {deviation:.2f}  {preference.text}")
    _say(f"{fit.agreement:.0%} of {found.thumbs} thumbs are predicted by the others.")
    focus, guard = found.steering.focus, found.steering.loop_guard
    _say(f"Fitted with focus {focus:g} and loop guard {guard}, those of most thumbs.")
    _say(f"Written: {', '.join(written)}")


def _table(found: Tuned) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    titles = (*Steering.model_fields, "answers", "score", "fall", "distinct", "")
    for title in titles:
        table.add_column(title, justify="right")
    for trial in (found.prompt_only, *found.trials):
        setting = trial.steering
        marks = "chosen" if setting == found.steering else "" if trial.holds else "breaks a guard"
        table.add_row(
            *(f"{value:g}" if name != "placement" else value for name, value in setting),
            str(trial.answers),
            f"{trial.score:.3f}",
            f"{trial.log_probability_fall:.3f}",
            f"{trial.distinct_3_fall:.3f}",
            marks,
        )
    return table


def _rule_table() -> Table:
    from amulet.evaluation.rules import RULES

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("rule", "the model is told", "what is checked"):
        table.add_column(title)
    for rule in RULES.values():
        table.add_row(rule.name, Text(rule.preference), Text(rule.checks))
    return table


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, markup=False, highlight=False)
