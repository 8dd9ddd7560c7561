"""The command `amulet eval`: decodes a run and judges it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from amulet.console import Device, DType, Model, load, progress_bar, readable_errors
from amulet.evaluation.jobs import Settings
from amulet.evaluation.judging import JUDGES, JudgeOptions, check_judges, score_run
from amulet.evaluation.methods import label, parse_methods, with_prompt_only
from amulet.evaluation.paper import METHODS, SYSTEM_PROMPT, preferences_of
from amulet.evaluation.questions import load_question_sets
from amulet.models.gguf import is_gguf

if TYPE_CHECKING:
    from amulet.evaluation.run import Run

Out = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="The run's folder; an interrupted run resumes there."),
]
Questions = Annotated[
    list[str],
    typer.Option(
        "--questions",
        "-q",
        metavar="SOURCE",
        help='A .json file of [{"index": 0, "question": "..."}], a folder of such files, or the '
        "hub id of a data set; repeatable.",
    ),
]
Preferences = Annotated[
    list[str] | None,
    typer.Option(
        "--preferences",
        "-p",
        metavar="NAMES",
        help="paper (its eight preferences, the default), rules, rules-dev, rules-heldout, or "
        "names, separated by commas; concise+formal combines two.",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="base, pref, beam, linear_alignment, amulet, amulet_literal, or a setting, e.g. "
        "ours:strength=2,floor=0.1,placement=user,adapt=decay; repeatable. ours adds pref with "
        f"the same placement. Default: {', '.join(METHODS)}; without beam for a GGUF file.",
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", metavar="NAME", help=f"{', '.join(JUDGES)}; repeatable."),
]
Limit = Annotated[
    int | None, typer.Option(help="Questions per set, drawn by the seed. Default: all.")
]
Seed = Annotated[int, typer.Option(help="Seed for drawing questions and for sampling.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum tokens per answer.")]
SystemPrompt = Annotated[
    str, typer.Option(metavar="TEXT", help="System message for every question; '' for none.")
]
Temperature = Annotated[float, typer.Option(help="Temperature of every method; 0 is greedy.")]
AsPublished = Annotated[
    bool,
    typer.Option(
        "--as-published",
        help="Decode as the authors did: base and pref sampled, the others greedy; ArmoRM reads "
        "the first 128 tokens of question and answer together.",
    ),
]
Facts = Annotated[
    bool,
    typer.Option(
        "--facts",
        help="Ask 76 plain facts under every method and preference, to see whether steering makes "
        "the model prefer false answers.",
    ),
]
Trace = Annotated[bool, typer.Option("--trace", help="Store how much steering raised each token.")]
MaxRows = Annotated[
    int, typer.Option(help="Maximum rows in a batch; a steered answer takes three or more.")
]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The judge's model: a hub id or folder for armorm, a name for llm."
    ),
]
JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="The llm judge's OpenAI-compatible endpoint.")
]

JudgePrice = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="READ WRITTEN",
        help="Dollars per million tokens of the llm judge, read and written.",
    ),
]
JudgeConcurrency = Annotated[int, typer.Option(min=1, help="Concurrent requests to the llm judge.")]


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
    facts: Facts = False,
    trace: Trace = False,
    max_rows: MaxRows = 64,
    judge_model: JudgeModel = None,
    judge_url: JudgeUrl = None,
    judge_price: JudgePrice = None,
    judge_concurrency: JudgeConcurrency = 4,
    device: Device = None,
    dtype: DType = "auto",
) -> None:
    """Compare decoding methods on questions and preferences; an interrupted run can resume.

    The answers, settings and scores are stored in FOLDER, which can be moved.
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
        usual = [name for name in METHODS if name != "beam" or not is_gguf(model or "")]
        methods = with_prompt_only(parse_methods(method or usual))
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
        if facts:
            from amulet.evaluation.facts import score_facts

            with progress_bar("Facts") as tell:
                score_facts(run, amulet, tell)
        _say(_names(run))
        _print(_summary(run))
        if "llm" in judges:
            _say(_verdicts(run))


def _model_name(model: str | None) -> str | None:
    """Return the run's name for the model, never a local path."""
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).exists() else model


def _verdicts(run: Run) -> str:
    """Return the llm judge's win rates, one per line, and their cost."""
    from amulet.evaluation.judges.comparisons import spent, win_rates

    lines = [
        f"{method} against {other}: {rate}" for (method, other), rate in win_rates(run).items()
    ]
    return "\n".join([*lines, str(spent(run))])


def _summary(run: Run) -> Table:
    """Return a table with a column per method: answers, tokens, time, and each judge's means.

    The columns are numbered because names of methods are long.
    """
    answers = run.answers()
    scores = [run.scores(name) for name in run.score_names() if not name.endswith("-pairs")]
    right = _facts_right(run)
    columns: list[dict[str, str]] = []
    for method in run.meta.methods:
        own = [answer for answer in answers if answer.method == method.name]
        tokens = sum(len(answer.token_ids) for answer in own)
        cells = {"answers": str(len(own))}
        if tokens:
            seconds = sum(answer.seconds for answer in own)
            cells["tokens"] = f"{tokens / len(own):.1f}"
            cells["ms per token"] = f"{1000 * seconds / tokens:.1f}"
        found: dict[str, list[float]] = {}
        for by_key in scores:
            for answer in own:
                for value, number in by_key.get(answer.key, {}).items():
                    found.setdefault(value.replace("_", " "), []).append(number)
        if method.name in right:
            found["facts right"] = [float(one) for one in right[method.name]]
        cells |= {value: f"{sum(each) / len(each):.3f}" for value, each in found.items()}
        columns.append(cells)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("method", no_wrap=True)
    for number in range(1, len(columns) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    for title in dict.fromkeys(title for cells in columns for title in cells):
        table.add_row(title, *(cells.get(title, "–") for cells in columns))
    return table


def _print(table: Table) -> None:
    """Print a table at full width: a narrow terminal wraps lines, but no number is cut."""
    console = Console()
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def _names(run: Run) -> str:
    """Return the methods behind the numbers of the summary's columns."""
    names = (label(method.name, method.placement) for method in run.meta.methods)
    return "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))


def _facts_right(run: Run) -> dict[str, list[bool]]:
    """Return which facts each method got right, over all preferences; empty if none was asked."""
    found: dict[str, list[bool]] = {}
    for (method, _), right in run.facts().items():
        found.setdefault(method, []).extend(right.values())
    return found
