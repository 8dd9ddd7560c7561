"""The command `amulet eval`: decode a run and judge it; arguments to functions, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from amulet.console import Device, DType, Model, load, progress_bar, readable_errors
from amulet.evaluation.jobs import Settings
from amulet.evaluation.judging import JUDGES, JudgeOptions, check_judges, score_run
from amulet.evaluation.methods import parse_methods
from amulet.evaluation.paper import METHODS, SYSTEM_PROMPT, preferences_of
from amulet.evaluation.questions import load_question_sets

if TYPE_CHECKING:
    from amulet.evaluation.run import Run

Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="The run's folder; a run that was cut short goes on there."
    ),
]
Questions = Annotated[
    list[str],
    typer.Option(
        "--questions",
        "-q",
        metavar="SOURCE",
        help='A .json file of [{"index": 0, "question": "..."}], a folder of them, or a data '
        "set's hub id; again for more.",
    ),
]
Preferences = Annotated[
    list[str] | None,
    typer.Option(
        "--preferences",
        "-p",
        metavar="NAMES",
        help="paper (its eight, the default), rules, rules-dev, rules-heldout, or names, "
        "separated by commas; concise+formal asks for both at once.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="base, pref, beam, linear_alignment, amulet, amulet_literal, or such as "
        "ours:strength=2,floor=0.1,placement=user,adapt=decay; again for more. "
        f"Default: {', '.join(METHODS)}.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", metavar="NAME", help=f"{', '.join(JUDGES)}; again for more than one."),
]
Limit = Annotated[int | None, typer.Option(help="Questions per set, drawn by the seed; else all.")]
Seed = Annotated[int, typer.Option(help="Of the questions drawn and of sampling.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens per answer, at most.")]
SystemPrompt = Annotated[
    str, typer.Option(metavar="TEXT", help="Stands before every question; '' is none.")
]
Temperature = Annotated[float, typer.Option(help="For every method alike; 0 is greedy.")]
AsPublished = Annotated[
    bool,
    typer.Option(
        "--as-published",
        help="The authors' decoding: base and pref sampled, the others greedy; ArmoRM reads the "
        "first 128 tokens of question and answer together.",
    ),
]
Trace = Annotated[bool, typer.Option("--trace", help="Keep what each token gained by steering.")]
MaxRows = Annotated[int, typer.Option(help="Rows decoded at once; a steered answer takes two.")]
JudgeModel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="For armorm a hub id or folder, for llm its name."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="The llm judge's OpenAI-compatible endpoint.")
]

JudgePrice = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="READ WRITTEN", help="Dollars per million tokens at the llm judge's endpoint."
    ),
]
JudgeConcurrency = Annotated[int, typer.Option(min=1, help="Requests to it under way at once.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("eval")(eval_command)


def eval_command(
    out: Out,
    questions: Questions,
    model: Model = None,
    preferences: Preferences = None,
    method: Methods = None,
    judge: Judges = None,
    limit: Limit = None,
    seed: Seed = 0,
    max_new_tokens: Tokens = 128,
    system_prompt: SystemPrompt = SYSTEM_PROMPT,
    temperature: Temperature = 0.0,
    as_published: AsPublished = False,
    trace: Trace = False,
    max_rows: MaxRows = 64,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    judge_price: JudgePrice = None,
    judge_concurrency: JudgeConcurrency = 4,
    device: Device = None,
    dtype: DType = "auto",
) -> None:
    """Compare ways of decoding: every question, preference and method; a run resumes if killed.

    The answers, their settings and scores are kept in FOLDER, which can be moved.
    """
    with readable_errors():
        judges = judge or []
        settings = Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            system_prompt=system_prompt,
            as_published=as_published,
            trace=trace,
        )
        methods = parse_methods(method or METHODS)
        wishes = preferences_of(
            name for names in preferences or ["paper"] for name in names.split(",")
        )
        check_judges(judges, wishes)
        sets = load_question_sets(questions, limit=limit, seed=seed)
        amulet = load(model, device, dtype, max_rows=max_rows)
        from amulet.evaluation.decode import evaluate

        with progress_bar("Answers") as tell:
            run = evaluate(
                amulet,
                out,
                sets=sets,
                preferences=wishes,
                methods=methods,
                settings=settings,
                model=_model_name(model),
                max_rows=max_rows,
                tell=tell,
            )
        for name in judges:
            options = JudgeOptions(
                amulet=amulet,
                model=judge_model,
                base_url=judge_url,
                prices=judge_price,
                concurrency=judge_concurrency,
            )
            with progress_bar(f"Scores: {name}") as tell:
                score_run(run, name, options, tell)
        Console().print(_summary(run))
        if "llm" in judges:
            Console().print(_verdicts(run))


def _model_name(model: str | None) -> str | None:
    """Return what the run calls the model: never a path of this machine."""
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).is_dir() else model


def _verdicts(run: Run) -> str:
    """Return the llm judge's win rates, a line each, and what they cost."""
    from amulet.evaluation.judges.comparisons import spent, win_rates

    lines = [
        f"{method} against {other}: {rate}" for (method, other), rate in win_rates(run).items()
    ]
    return "\n".join([*lines, str(spent(run))])


def _summary(run: Run) -> Table:
    """Return a table of the methods: answers, mean tokens and time, and each judge's means."""
    answers = run.answers()
    scores = {name: run.scores(name) for name in run.score_names() if not name.endswith("-pairs")}
    values = {
        (judge, value): None
        for judge, by_key in scores.items()
        for entry in by_key.values()
        for value in entry
    }
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("method", "answers", "tokens", "ms/token", *(value for _, value in values)):
        table.add_column(title, justify="left" if title == "method" else "right")
    for method in run.meta.methods:
        own = [answer for answer in answers if answer.method == method.name]
        tokens = sum(len(answer.token_ids) for answer in own)
        cells = [method.name, str(len(own)), "–", "–"]
        if tokens:
            seconds = sum(answer.seconds for answer in own)
            cells[2:] = [f"{tokens / len(own):.1f}", f"{1000 * seconds / tokens:.1f}"]
        for judge, value in values:
            entries = [scores[judge].get(answer.key, {}) for answer in own]
            found = [entry[value] for entry in entries if value in entry]
            cells.append(f"{sum(found) / len(found):.3f}" if found else "–")
        table.add_row(*cells)
    return table
