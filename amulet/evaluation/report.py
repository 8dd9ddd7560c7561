"""Writes one or several runs as an HTML page or Markdown: scores, curves, answers."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amulet.errors import EvaluationError
from amulet.evaluation.plots import Curve, PlotPoint, save_plot, strength_plot
from amulet.evaluation.run import Answer, Run
from amulet.evaluation.tables import (
    PLAIN,
    Entry,
    Table,
    fact_tables,
    guard_tables,
    score_tables,
    win_tables,
)

# The scores to report, if a run has them: (file, value, title).
_SCORES = (
    ("rules", "adherence", "Adherence"),
    ("armorm", "instruction_following", "ArmoRM: instruction following"),
)


@dataclass(frozen=True)
class Report:
    """The content of a report in any format; `curves` has one plot per score title."""

    runs: tuple[tuple[str, Run], ...]
    entries: tuple[Entry, ...]
    tables: tuple[Table, ...]
    curves: tuple[tuple[str, tuple[Curve, ...]], ...]


def read_report(folders: Sequence[str | os.PathLike[str]]) -> Report:
    """Read runs and compute their tables and plots.

    Raises:
        EvaluationError: no run is given, one can't be read, or they contain no answer.
    """
    runs = _named([Run(folder) for folder in folders])
    several = len(runs) > 1
    entries = [entry for name, run in runs for entry in _entries(name if several else "", run)]
    if not entries:
        raise EvaluationError(
            "The runs contain no answers: `amulet eval --out FOLDER` decodes them."
        )
    found = {name for entry in entries for name in entry.values}
    scores = [(f"{file}.{value}", title) for file, value, title in _SCORES]
    scores = [(name, title) for name, title in scores if name in found]
    tables: list[Table] = []
    for name, title in scores:
        tables += score_tables(entries, name, title)
    tables += [*win_tables(runs), *guard_tables(entries), *fact_tables(runs)]
    curves = [(title, _curves(entries, name)) for name, title in scores]
    return Report(
        tuple(runs),
        tuple(entries),
        tuple(tables),
        tuple((title, tuple(drawn)) for title, drawn in curves if drawn),
    )


def write_html(report: Report, path: str | os.PathLike[str], examples: int = 6) -> None:
    """Write the page: one file without scripts or external resources.

    Args:
        report: the report.
        path: the file to write.
        examples: number of questions whose answers are shown side by side.

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
        plots=[
            Markup(strength_plot(curves, title, number))  # trusted; its texts are escaped
            for number, (title, curves) in enumerate(report.curves, 1)
        ],
        examples=_examples(report.entries, examples),
        opacity=_opacity,
    )
    Path(path).write_text(page, encoding="utf-8", errors="replace")


def write_markdown(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the tables as Markdown; texts from runs are escaped."""
    lines: list[str] = []
    for table in report.tables:
        lines += [f"### {_cell(table.title)}", "", _row(table.columns)]
        lines += [_row(["---", *["---:"] * (len(table.columns) - 1)], escape=False)]
        lines += [*map(_row, table.rows), ""]
        if table.note:
            lines += [table.note, ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8", errors="replace")


def write_plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the first strength curves to an image file, .svg or .png.

    Raises:
        EvaluationError: there are no curves, or the name has another suffix.
    """
    if not report.curves:
        raise EvaluationError(
            "There are no strength curves: they need answers scored by rules or armorm, and by "
            "guards."
        )
    title, curves = report.curves[0]
    save_plot(curves, title, path)


def _named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Name each run after its folder; equal names get numbers."""
    if not runs:
        raise EvaluationError("No runs: expected at least one run folder.")
    names = [run.folder.resolve().name for run in runs]
    return [
        (name if names.count(name) == 1 else f"{name} ({number})", run)
        for number, (name, run) in enumerate(zip(names, runs, strict=True), 1)
    ]


def _entries(name: str, run: Run) -> Iterable[Entry]:
    # Pairwise verdicts are about two answers and give no value for a single one.
    files = [file for file in run.score_names() if not file.endswith("-pairs")]
    scores = {file: run.scores(file) for file in files}
    methods = {meta.name: place for place, meta in enumerate(run.meta.methods)}
    wishes = {meta.name: place for place, meta in enumerate(run.meta.preferences)}
    sets = {meta.name: place for place, meta in enumerate(run.meta.sets)}

    def place(answer: Answer) -> tuple[int, int, int]:
        given = ((methods, answer.method), (sets, answer.set), (wishes, answer.preference))
        first, second, third = (places.get(name, len(places)) for places, name in given)
        return first, second, third

    # In the planned order; answers are stored in the order in which they finish.
    for answer in sorted(run.answers(), key=place):
        values = {
            f"{file}.{value}": number
            for file, by_key in scores.items()
            for value, number in by_key.get(answer.key, {}).items()
            if math.isfinite(number)
        }
        yield Entry(name, answer, values)


def _curves(entries: Sequence[Entry], name: str) -> list[Curve]:
    """Return a curve per combination of the other settings, and markers for other methods.

    Curves start at the prompt alone with their placement, which is strength 0.
    """
    scored = [e for e in entries if name in e.values and "guards.log_probability" in e.values]
    signs: dict[str, PlotPoint] = {}
    starts: dict[tuple[str, str], PlotPoint] = {}
    groups: dict[tuple[str, str, str], list[tuple[float, PlotPoint]]] = defaultdict(list)
    for arm in dict.fromkeys(entry.arm for entry in scored):
        own = [entry for entry in scored if entry.arm == arm]
        answer = own[0].answer
        x = math.fsum(entry.values["guards.log_probability"] for entry in own) / len(own)
        y = math.fsum(entry.values[name] for entry in own) / len(own)
        run = f"{own[0].run}: " if own[0].run else ""
        placement = answer.placement or "system"
        if answer.strength is None or answer.method == "beam":
            signs[f"{run}no preference" if answer.method == PLAIN else arm] = PlotPoint(x, y, "")
        elif not answer.strength and not answer.adapt:
            starts[run, placement] = PlotPoint(x, y, "")
        else:
            point = PlotPoint(x, y, f"{answer.strength:g}")
            groups[run, placement, _setting(answer)].append((answer.strength, point))
    curves = [Curve(title, [point], True) for title, point in signs.items()]
    curves += [
        Curve(f"{run}prompt only, {placement}", [point], True)
        for (run, placement), point in starts.items()
    ]
    for (run, placement, setting), points in groups.items():
        start = starts.get((run, placement))
        drawn = [point for _, point in sorted(points, key=lambda pair: pair[0])]
        curves.append(Curve(f"{run}{setting}", [start, *drawn] if start else drawn))
    return curves


def _setting(answer: Answer) -> str:
    """Return an answer's settings except the strength."""
    parts = [f"floor {answer.floor or 0.0:g}", answer.placement or "system"]
    parts += [f"focus {answer.focus:g}"] if answer.focus else []
    parts += [f"loop guard {answer.loop_guard}"] if answer.loop_guard else []
    parts += [answer.adapt] if answer.adapt else []
    return ", ".join(parts)


def _examples(entries: Sequence[Entry], count: int) -> list[tuple[Answer, list[Entry]]]:
    """Return the first answers of each preference in turn, without selecting good ones."""
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
    """Return the opacity of a token's mark: 0 for no gain, 0.6 from 4 nats on."""
    return f"{min(max(gain, 0.0) / 4.0, 1.0) * 0.6:.2f}" if math.isfinite(gain) else "0.60"


def _row(cells: Iterable[Any], *, escape: bool = True) -> str:
    texts = [_cell(str(cell)) if escape else str(cell) for cell in cells]
    return f"| {' | '.join(texts)} |"


def _cell(text: str) -> str:
    for sign, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(sign, safe)
    return " ".join(text.split())
