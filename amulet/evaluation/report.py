"""Makes one HTML page and a Markdown table of one run or several: scores, curves, answers."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amulet.errors import EvaluationError
from amulet.evaluation.bootstrap import interval
from amulet.evaluation.plots import Curve, Point, strength_plot
from amulet.evaluation.run import Answer, Run

# Judged by these, in this order, where a run has them: (file, value, what the page calls it).
_SCORES = (
    ("rules", "adherence", "adherence"),
    ("armorm", "instruction_following", "ArmoRM: instruction following"),
)
_PROMPT_ONLY = "pref"


@dataclass(frozen=True)
class Entry:
    """An answer with its scores; `arm` is its method, after its run's name if there are several."""

    arm: str
    answer: Answer
    values: dict[str, float]

    @property
    def asked(self) -> tuple[str, str]:
        """The question, which is what intervals resample."""
        return self.answer.set, str(self.answer.index)


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap interval over questions."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_number(self.mean)} [{_number(self.low)}, {_number(self.high)}]"


@dataclass(frozen=True)
class Table:
    """A table of texts; `title` stands above it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """What both forms of the report show."""

    runs: tuple[tuple[str, Run], ...]
    entries: tuple[Entry, ...]
    tables: tuple[Table, ...]
    plots: tuple[str, ...]


def read_report(folders: Sequence[str | os.PathLike[str]]) -> Report:
    """Read runs and compute their tables and plots.

    Raises:
        EvaluationError: no run is given, one can't be read, or they hold no answer.
    """
    runs = _named([Run(folder) for folder in folders])
    entries = [entry for name, run in runs for entry in _entries(name, run, len(runs) > 1)]
    if not entries:
        raise EvaluationError("The runs hold no answers: `amulet eval --out FOLDER` makes them.")
    found = {name for entry in entries for name in entry.values}
    scores = [(f"{file}.{value}", title) for file, value, title in _SCORES]
    scores = [(name, title) for name, title in scores if name in found]
    tables: list[Table] = []
    for name, title in scores:
        tables += _score_tables(entries, name, title)
    tables.append(_guard_table(entries, found))
    plots = [
        strength_plot(curves, title, number)
        for number, (name, title) in enumerate(scores, 1)
        if (curves := _curves(entries, name))
    ]
    return Report(tuple(runs), tuple(entries), tuple(tables), tuple(plots))


def write_html(report: Report, path: str | os.PathLike[str], examples: int = 6) -> None:
    """Write the page: one file, no scripts, nothing loaded from elsewhere.

    Args:
        report: what is shown.
        path: where to.
        examples: how many questions' answers stand side by side.

    Raises:
        EvaluationError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise EvaluationError(
            'The page needs Jinja: run `pip install "amulet-integrations[eval]"`.'
        ) from error
    environment = Environment(
        loader=PackageLoader("amulet.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        runs=report.runs,
        tables=report.tables,
        plots=[Markup(plot) for plot in report.plots],  # ours; texts in it are escaped
        examples=_examples(report.entries, examples),
        opacity=_opacity,
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def write_markdown(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the tables as Markdown; texts of runs can't break a cell or become HTML."""
    lines: list[str] = []
    for table in report.tables:
        lines += [f"### {_cell(table.title)}", "", _row(table.columns)]
        lines += [_row(["---", *["---:"] * (len(table.columns) - 1)], escape=False)]
        lines += [*map(_row, table.rows), ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8", errors="replace")


def _named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Name each run after its folder; two of one name get numbers."""
    if not runs:
        raise EvaluationError("No runs: expected at least one run folder.")
    names = [run.folder.resolve().name for run in runs]
    return [
        (name if names.count(name) == 1 else f"{name} ({number})", run)
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
    ]


def _entries(name: str, run: Run, is_one_of_many: bool) -> Iterable[Entry]:
    # Pairwise judgements are of two answers, so that no single answer has a value of theirs.
    files = [file for file in run.score_names() if not file.endswith("-pairs")]
    scores = {file: run.scores(file) for file in files}
    for answer in run.answers():
        values = {
            f"{file}.{value}": number
            for file, by_key in scores.items()
            for value, number in by_key.get(answer.key, {}).items()
            if math.isfinite(number)
        }
        yield Entry(f"{name}: {answer.method}" if is_one_of_many else answer.method, answer, values)


def _score_tables(entries: Sequence[Entry], name: str, title: str) -> list[Table]:
    """Return one table per set: methods by preferences, and the difference to the prompt alone."""
    tables = []
    for set_name in dict.fromkeys(entry.answer.set for entry in entries):
        own = [entry for entry in entries if entry.answer.set == set_name and name in entry.values]
        preferences = tuple(dict.fromkeys(entry.answer.preference for entry in own))
        rows = []
        for arm in dict.fromkeys(entry.arm for entry in own):
            of_arm = [entry for entry in own if entry.arm == arm]
            cells = [
                _estimate([entry for entry in of_arm if entry.answer.preference == wish], name)
                for wish in preferences
            ]
            rows.append((arm, *cells, _estimate(of_arm, name), _gain(own, of_arm, name)))
        if rows:
            columns = ("method", *preferences, "all", "against prompt only")
            tables.append(Table(f"{title}, {set_name}", columns, tuple(rows)))
    return tables


def _guard_table(entries: Sequence[Entry], found: Iterable[str]) -> Table:
    guards = sorted(name for name in found if name.startswith("guards."))
    rows = []
    for arm in dict.fromkeys(entry.arm for entry in entries):
        of_arm = [entry for entry in entries if entry.arm == arm]
        tokens = sum(len(entry.answer.token_ids) for entry in of_arm)
        seconds = math.fsum(entry.answer.seconds for entry in of_arm)
        rows.append(
            (
                arm,
                str(len(of_arm)),
                *(_estimate(of_arm, name) for name in guards),
                f"{tokens / len(of_arm):.1f}",
                f"{1000 * seconds / tokens:.1f}" if tokens else "–",
            )
        )
    titles = (name.removeprefix("guards.").replace("_", " ") for name in guards)
    columns = ("method", "answers", *titles, "tokens", "ms per token")
    return Table("Guards and time", columns, tuple(rows))


def _estimate(entries: Sequence[Entry], name: str) -> str:
    return _interval(entries, lambda entry: entry.values.get(name))


def _gain(all_entries: Sequence[Entry], of_arm: Sequence[Entry], name: str) -> str:
    """Return the paired difference to the same run's prompt-only answers."""
    if of_arm[0].answer.method == _PROMPT_ONLY:
        return "–"
    arm = of_arm[0].arm.removesuffix(of_arm[0].answer.method) + _PROMPT_ONLY
    before = {
        (*entry.asked, entry.answer.preference): entry.values[name]
        for entry in all_entries
        if entry.arm == arm
    }

    def difference(entry: Entry) -> float | None:
        value = before.get((*entry.asked, entry.answer.preference))
        return None if value is None else entry.values[name] - value

    return _interval(of_arm, difference)


def _interval(entries: Sequence[Entry], value_of: Callable[[Entry], float | None]) -> str:
    by_question: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry in entries:
        if (value := value_of(entry)) is not None:
            by_question[entry.asked].append(value)
    if not by_question:
        return "–"
    means = [math.fsum(values) / len(values) for values in by_question.values()]
    mean, low, high = interval(means)
    return str(Estimate(mean, low, high))


def _curves(entries: Sequence[Entry], name: str) -> list[Curve]:
    """Return one curve per floor, placement and variant, and a sign for methods without any."""
    scored = [e for e in entries if name in e.values and "guards.log_probability" in e.values]
    groups: dict[tuple[str, bool], list[tuple[float, Point]]] = defaultdict(list)
    for arm in dict.fromkeys(entry.arm for entry in scored):
        own = [entry for entry in scored if entry.arm == arm]
        answer = own[0].answer
        x = math.fsum(entry.values["guards.log_probability"] for entry in own) / len(own)
        y = math.fsum(entry.values[name] for entry in own) / len(own)
        run = arm.removesuffix(answer.method)
        if answer.method == _PROMPT_ONLY:
            groups[f"{run}prompt only", True].append((0.0, Point(x, y, "")))
        elif answer.strength is None:
            groups[arm, True].append((0.0, Point(x, y, "")))
        else:
            variant = f", {answer.adapt}" if answer.adapt else ""
            curve = f"{run}floor {answer.floor or 0:g}, {answer.placement or 'system'}{variant}"
            groups[curve, False].append((answer.strength, Point(x, y, f"{answer.strength:g}")))
    return [
        Curve(title, [point for _, point in sorted(points, key=lambda pair: pair[0])], is_mark)
        for (title, is_mark), points in groups.items()
    ]


def _examples(entries: Sequence[Entry], count: int) -> list[tuple[Answer, list[Entry]]]:
    """Return the first answers of each preference in turn: as they come, not the best ones."""
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[(entry.answer.preference, *entry.asked)].append(entry)
    by_preference: dict[str, list[list[Entry]]] = defaultdict(list)
    for (preference, *_), group in groups.items():
        by_preference[preference].append(group)
    most = max(map(len, by_preference.values()))
    turns = [own[i] for i in range(most) for own in by_preference.values() if i < len(own)]
    return [(group[0].answer, group) for group in turns[:count]]


def _opacity(gain: float) -> str:
    """Return how strongly a token is marked: 0 for no gain, 0.6 from 4 nats on."""
    return f"{min(max(gain, 0.0) / 4.0, 1.0) * 0.6:.2f}" if math.isfinite(gain) else "0.60"


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-0.000", "0.000")


def _row(cells: Iterable[Any], *, escape: bool = True) -> str:
    texts = [_cell(str(cell)) if escape else str(cell) for cell in cells]
    return f"| {' | '.join(texts)} |"


def _cell(text: str) -> str:
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, safe)
    return " ".join(text.split())
