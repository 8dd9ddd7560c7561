"""The report: its figures, that texts of runs stay texts, and that it is one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amulet.errors import EvaluationError
from amulet.evaluation.plots import Curve, Point, strength_plot
from amulet.evaluation.report import Report, read_report, write_html, write_markdown
from amulet.evaluation.run import Answer, Meta, MethodMeta, PreferenceMeta, Run, SetMeta

EVIL = "<script>alert(1)</script>"


def make_run(folder: Path) -> Path:
    """Two questions, one preference, three methods: prompt only fails once, steering never."""
    run = Run.create(
        folder,
        Meta(
            model="m",
            dtype="float32",
            sets=(SetMeta(name="small", count=2),),
            preferences=(PreferenceMeta(name="brief|$x^$", text="Be brief.", rule="brief"),),
            methods=tuple(MethodMeta(name=name) for name in ("base", "pref", "ours")),
        ),
    )
    for method, strength, adherence in (
        ("base", None, (0, 0)),
        ("pref", 0.0, (0, 1)),
        ("ours", 2.0, (1, 1)),
    ):
        for index in (0, 1):
            key = f"small/{index}/brief/{method}"
            run.append_answer(
                Answer(
                    key=key,
                    set="small",
                    index=index,
                    question=f"Q{index} {EVIL}",
                    preference="brief|$x^$",
                    preference_text="Be brief.",
                    method=method,
                    strength=strength,
                    floor=None if strength is None else 0.1,
                    answer=EVIL,
                    token_ids=(1, 2),
                    finish_reason="stop",
                    steered_tokens=((EVIL, 2.0), ("b", 0.0)) if method == "ours" else None,
                    seconds=0.1,
                )
            )
            run.append_scores("rules", key, {"adherence": adherence[index]})
            run.append_scores("guards", key, {"log_probability": -1.0 - (strength or 0)})
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return read_report([make_run(tmp_path / "first")])


def test_tables_have_means_intervals_and_the_gain_over_the_prompt(report: Report) -> None:
    adherence, guards = report.tables
    assert adherence.title == "adherence, small"
    assert adherence.columns == ("method", "brief|$x^$", "all", "against prompt only")
    cells = {row[0]: row[1:] for row in adherence.rows}
    assert cells["pref"] == ("0.500 [0.000, 1.000]", "0.500 [0.000, 1.000]", "–")
    assert cells["ours"][0] == "1.000 [1.000, 1.000]"
    assert cells["ours"][2] == "0.500 [0.000, 1.000]"
    assert guards.columns == ("method", "answers", "log probability", "tokens", "ms per token")
    assert guards.rows[2] == ("ours", "2", "-3.000 [-3.000, -3.000]", "2.0", "50.0")


def test_the_page_is_one_file_and_answers_stay_text(report: Report, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_html(report, page)
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2 * (1 + 3)
    assert html.count("<mark ") == 2
    assert '<mark style="--gain: 0.30" title="+2.00 nats">&lt;script&gt;' in html
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', html) == []
    assert "prompt only" in html
    assert str(tmp_path) not in html


def test_two_runs_are_told_apart_and_the_page_is_repeatable(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / side / "run") for side in ("a", "b")]
    for name in ("1.html", "2.html"):
        write_html(read_report(folders), tmp_path / name)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    arms = [row[0] for row in read_report(folders).tables[0].rows]
    assert arms == [f"run ({n}): {name}" for n in (1, 2) for name in ("base", "pref", "ours")]


def test_markdown_cells_cannot_be_broken(report: Report, tmp_path: Path) -> None:
    write_markdown(report, tmp_path / "table.md")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[2] == r"| method | brief\|$x^$ | all | against prompt only |"
    assert lines[3] == "| --- | ---: | ---: | ---: |"


def test_a_plot_takes_any_text_and_two_plots_share_no_id() -> None:
    curves = [Curve("$\\frac{ <b> 日本", [Point(-1.0, 0.5, "$"), Point(-2.0, 0.7, "2")])]
    plots = [strength_plot(curves, "adherence", number) for number in (1, 2)]
    ids = [set(re.findall(r'\bid="([^"]+)"', plot)) for plot in plots]
    assert ids[0] & ids[1] == set()
    assert all("<b>" not in plot and "currentColor" in plot for plot in plots)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is no run: it has no run"):
        read_report([tmp_path])
    with pytest.raises(EvaluationError, match="No runs"):
        read_report([])
