"""`amulet report`: what it writes, prints and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from amulet.evaluation.report_cli import register
from tests.evaluation.test_report import make_run


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    app.callback()(lambda: None)  # with a callback, `report` stays a command of its own
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_page_table_and_picture_are_written_and_named(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name) for name in ("first", "second")]
    files = [tmp_path / name for name in ("page.html", "table.md", "curves.svg")]
    page, table, picture = files
    result = run(*folders, "--out", page, "--markdown", table, "--plot", picture, "--examples", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Written: {', '.join(map(str, files))}\n"
    html = page.read_text(encoding="utf-8")
    assert html.count("<h3>") == 1
    assert "first: ours" in html
    assert "second: pref" in html
    assert table.read_text(encoding="utf-8").startswith("### Adherence, small\n")
    assert picture.read_text(encoding="utf-8").startswith("<?xml")


def test_the_page_alone_is_the_default(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    page = tmp_path / "page.html"
    result = run(folder, "--out", page, "--examples", 0)
    assert result.exit_code == 0, result.output
    assert "<h3>" not in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "page.html"]


def test_what_is_no_run_or_no_picture_is_one_red_line(tmp_path: Path) -> None:
    result = run(tmp_path, "--out", tmp_path / "page.html")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "is not a run: it has no run.json" in result.stderr
    assert not (tmp_path / "page.html").exists()
    folder = make_run(tmp_path / "first")
    result = run(folder, "--out", tmp_path / "page.html", "--plot", tmp_path / "curves.gif")
    assert result.exit_code == 1
    assert "expected a name that ends in .svg or .png" in result.stderr


@pytest.mark.parametrize("option", ["--out", "--markdown", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_any_is(tmp_path: Path, option: str) -> None:
    files = {"--out": tmp_path / "page.html", option: tmp_path / "nowhere" / "page.svg"}
    given = [part for pair in files.items() for part in pair]
    result = run(make_run(tmp_path / "first"), *given)
    assert result.exit_code == 1
    assert f"error: {option} " in result.stderr
    assert "expected a file in a folder that exists" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_examples_below_none_are_refused(tmp_path: Path) -> None:
    assert run(make_run(tmp_path / "first"), "--examples", -1).exit_code == 2
