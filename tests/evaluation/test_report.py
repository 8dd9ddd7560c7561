"""The report: its figures, that texts of runs stay texts, and that it is one file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from amulet.errors import EvaluationError
from amulet.evaluation.judges.comparisons import Pair, append_pair
from amulet.evaluation.plots import Curve, PlotPoint, strength_plot
from amulet.evaluation.report import Report, read_report, write_html, write_markdown, write_plot
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
    adherence, guards, likelihoods = report.tables
    assert adherence.title == "Adherence, small"
    assert adherence.columns == (
        *("method", "all", "against prompt only", "at equal length"),
        "brief|$x^$",
    )
    cells = {row[0]: row[1:] for row in adherence.rows}
    assert cells["pref"] == ("0.50 [0.00, 1.00]", "–", "–", "0.50 [0.00, 1.00]")
    assert cells["ours"][0] == "1.00 [1.00, 1.00]"
    assert cells["ours"][1] == "0.50 [0.00, 1.00]"
    assert likelihoods.title == "Log probability against prompt only"
    assert likelihoods.rows == (
        ("base", *["0.00 [0.00, 0.00]"] * 2),
        ("ours", *["-2.00 [-2.00, -2.00]"] * 2),
    )
    assert guards.columns == ("method", "answers", "log probability", "tokens", "ms per token")
    assert guards.rows[2] == ("ours", "2", "-3.00 [-3.00, -3.00]", "2.0", "50.0")


def make_run_in_two_places(folder: Path) -> Path:
    """The prompt alone keeps none in the system message and one of two in the user's turn."""
    ours = "ours:strength=2,floor=0.1,placement="
    methods = (
        ("base", None, None, (0.0, 0.0)),
        ("pref", 0.0, "system", (0.0, 0.0)),
        ("pref:placement=user", 0.0, "user", (0.0, 1.0)),
        (f"{ours}system", 2.0, "system", (1.0, 0.0)),
        (f"{ours}user", 2.0, "user", (1.0, 1.0)),
    )
    metas = [MethodMeta(name=n, strength=s, placement=p) for n, s, p, _ in methods]
    run = Run.create(folder, Meta(model="m", dtype="float32", methods=tuple(metas)))
    for method, strength, placement, adherence in methods:
        for index in (0, 1):
            key = f"small/{index}/brief/{method}"
            answer = Answer(
                key=key,
                set="small",
                index=index,
                question=f"Q{index}",
                preference="brief",
                preference_text="Be brief.",
                method=method,
                strength=strength,
                floor=None if strength is None else 0.1,
                placement=placement,
                answer="word " * (index + 1),
                token_ids=(1, 2),
                finish_reason="stop",
            )
            run.append_answer(answer)
            run.append_scores("rules", key, {"adherence": adherence[index]})
            run.append_scores("guards", key, {"log_probability": -adherence[index]})
    return folder


def test_like_is_compared_with_like(tmp_path: Path) -> None:
    """Placed in the user's turn, ours gains .50 on the prompt alone there, not 1.00."""
    report = read_report([make_run_in_two_places(tmp_path / "run")])
    adherence, guards, likelihoods = report.tables
    expected = {
        "base": "–",  # it has no place, and the prompts alone have two
        "pref (system)": "–",
        "pref:placement=user": "–",
        "ours:strength=2,floor=0.1,placement=system": "0.50",
        "ours:strength=2,floor=0.1,placement=user": "0.50",
    }
    assert {row[0]: row[2].split(" ")[0] for row in adherence.rows} == expected
    assert adherence.note.endswith("in the prompt alone, same placement.")
    assert [row[0] for row in guards.rows] == list(expected)
    assert [(row[0], row[1].split(" ")[0]) for row in likelihoods.rows] == [
        ("ours:strength=2,floor=0.1,placement=system", "-0.50"),
        ("ours:strength=2,floor=0.1,placement=user", "-0.50"),
    ]
    [(_, curves)] = report.curves
    assert [curve.name for curve in curves] == [
        "no preference",
        "prompt only, system",
        "prompt only, user",
        "floor 0.1, system",
        "floor 0.1, user",
    ]


def test_beams_are_not_where_a_curve_begins(tmp_path: Path) -> None:
    folder = make_run_in_two_places(tmp_path / "run")
    run = Run(folder)
    for answer in [answer for answer in run.answers() if answer.method == "pref"]:
        key = answer.key.replace("pref", "beam")
        run.append_answer(answer.model_copy(update={"key": key, "method": "beam"}))
        run.append_scores("rules", key, {"adherence": 1.0})
        run.append_scores("guards", key, {"log_probability": -5.0})
    [(_, curves)] = read_report([folder]).curves
    by_title = {curve.name: curve.points for curve in curves}
    assert by_title["beam (system)"] == [PlotPoint(-5.0, 1.0, "")]
    assert by_title["floor 0.1, system"][0] == PlotPoint(0.0, 0.0, "")


def test_facts_are_compared_with_the_prompt_alone_in_the_same_place(tmp_path: Path) -> None:
    folder = make_run_in_two_places(tmp_path / "run")
    run = Run(folder)
    wish = PreferenceMeta(name="brief", text="Be brief.")
    meta = run.meta.model_copy(update={"preferences": (wish,)})
    (folder / "run.json").write_text(meta.model_dump_json())
    right = ("pref", "11"), ("pref:placement=user", "10")
    for fact in (0, 1):
        found = {(name, "brief"): flags[fact] == "1" for name, flags in right}
        found |= {("ours:strength=2,floor=0.1,placement=user", "brief"): fact == 0}
        run.append_facts(f"Fact {fact}?", found)
    rows = {row[0]: row[3].split(" ")[0] for row in read_report([folder]).tables[-1].rows}
    assert rows == {
        "pref (system)": "0.00",
        "pref:placement=user": "0.00",
        "ours:strength=2,floor=0.1,placement=user": "0.00",
    }


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
    assert lines[2] == r"| method | all | against prompt only | at equal length | brief\|$x^$ |"
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: |"


def test_what_length_explains_is_taken_out(tmp_path: Path) -> None:
    """Scores that follow the length alone: all of the difference is length's."""
    run = Run(make_run(tmp_path / "run"))
    lengths = {"pref": (3, 4), "base": (5, 9), "ours": (5, 9)}
    for answer in run.answers():
        count = lengths[answer.method][int(answer.index)]
        changed = answer.model_copy(update={"answer": "word " * count})
        (tmp_path / "all").mkdir(exist_ok=True)
        with open(tmp_path / "all" / "answers.jsonl", "a") as file:
            file.write(changed.model_dump_json() + "\n")
        value = 0.1 * count + (answer.method == "ours")
        run.append_scores("rules", answer.key, {"adherence": value})
    (tmp_path / "all" / "answers.jsonl").replace(run.folder / "answers.jsonl")
    cells = {row[0]: row[1:] for row in read_report([run.folder]).tables[0].rows}
    assert cells["base"][1] == "0.35 [0.20, 0.50]"
    assert cells["base"][2].startswith("0.00 ")
    assert cells["ours"][1].startswith("1.35 ")
    assert cells["ours"][2].startswith("1.00 ")


def test_several_sets_are_shown_together_and_apart(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path / "run"))
    for answer in run.answers():
        key = answer.key.replace("small/", "large/")
        run.append_answer(answer.model_copy(update={"key": key, "set": "large"}))
        run.append_scores("rules", key, {"adherence": 1.0})
    tables = read_report([run.folder]).tables[:3]
    assert [t.title.split(", ")[1] for t in tables] == ["all sets", "small", "large"]
    assert [t.is_detail for t in tables] == [False, True, True]
    assert [t.rows[0][1][:4] for t in tables] == ["0.50", "0.00", "1.00"]


def test_facts_are_compared_with_the_plain_model_and_the_prompt(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    run = Run(folder)
    wish = run.meta.preferences[0].name
    right = {"base": "1110", "pref": "1100", "ours": "1000"}
    for number in range(4):
        found = {
            (method, "" if method == "base" else wish): each[number] == "1"
            for method, each in right.items()
        }
        run.append_facts(f"Fact {number}?", found)
    table = read_report([folder]).tables[-1]
    assert table.title == "Facts answered right"
    assert [tuple(cell.split(" ")[0] for cell in row) for row in table.rows] == [
        ("base", "0.75", "–", "–", "–"),
        ("pref", "0.50", "-0.25", "0.00", "0.50"),
        ("ours", "0.25", "-0.50", "-0.25", "0.25"),
    ]


def test_win_rates_stand_beside_the_scores(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    run = Run(folder)
    for index, winners in enumerate((("a", "a"), ("a", "b"))):
        for order, winner in zip(("ab", "ba"), winners, strict=True):
            keys = {"key_a": f"small/{index}/brief/ours", "key_b": f"small/{index}/brief/pref"}
            append_pair(run, Pair(**keys, order=order, winner=winner, judge="j", calls=1))
    table = read_report([folder]).tables[1]
    assert table.title == "Win rates, language model as judge"
    assert table.rows == (("ours", "pref", "0.75 [0.50, 1.00]", "2", "0.50", "0.75"),)
    write_html(read_report([folder]), tmp_path / "page.html")
    assert "A tie is half a win." in (tmp_path / "page.html").read_text()
    write_markdown(read_report([folder]), tmp_path / "page.md")
    assert "A tie is half a win." in (tmp_path / "page.md").read_text()


def test_the_curves_are_written_as_a_picture(report: Report, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        write_plot(report, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert svg == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "prompt only" in svg
    assert "currentColor" not in svg
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EvaluationError, match=r"'d\.gif': expected a name"):
        write_plot(report, tmp_path / "d.gif")
    with pytest.raises(EvaluationError, match="no strength curves"):
        write_plot(dataclasses.replace(report, curves=()), tmp_path / "a.svg")


def test_curves_begin_at_the_prompt_of_their_placement(report: Report) -> None:
    [(title, curves)] = report.curves
    assert title == "Adherence"
    prompt = PlotPoint(-1.0, 0.5, "")
    assert curves == (
        Curve("no preference", [PlotPoint(-1.0, 0.0, "")], is_mark=True),
        Curve("prompt only, system", [prompt], is_mark=True),
        Curve("floor 0.1, system", [prompt, PlotPoint(-3.0, 1.0, "2")]),
    )


def test_what_was_written_in_any_order_is_shown_in_the_plans(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(reversed(lines)))
    report = read_report([folder])
    assert [row[0] for row in report.tables[0].rows] == ["base", "pref", "ours"]


def test_curves_beyond_the_colours_differ_in_dash() -> None:
    curves = [
        Curve(f"c{i}", [PlotPoint(-1.0, 0.1 * i, ""), PlotPoint(-2.0, 0.2, "")]) for i in range(9)
    ]
    styles = re.findall(
        r'<path d="M[^"]*" clip-path[^>]*style="([^"]*)"', strength_plot(curves, "x")
    )
    assert len(set(styles) - {style for style in styles if "b0b0b0" in style}) >= 9


def test_a_plot_takes_any_text_and_two_plots_share_no_id() -> None:
    curves = [Curve("$\\frac{ <b> 日本", [PlotPoint(-1.0, 0.5, "$"), PlotPoint(-2.0, 0.7, "2")])]
    plots = [strength_plot(curves, "adherence", number) for number in (1, 2)]
    ids = [set(re.findall(r'\bid="([^"]+)"', plot)) for plot in plots]
    assert ids[0] & ids[1] == set()
    assert all("<b>" not in plot and "currentColor" in plot for plot in plots)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is not a run: it has no run"):
        read_report([tmp_path])
    with pytest.raises(EvaluationError, match="No runs"):
        read_report([])
