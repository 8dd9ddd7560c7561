"""The tables of docs/scaling.md, and the plans there and in docs/deployment.md, are computed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amulet.cli import app
from amulet.plan.tables import TABLES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")
DEPLOYMENT = (DOCS / "deployment.md").read_text(encoding="utf-8")
PLANS = [
    (page, plan)
    for page in (PAGE, DEPLOYMENT)
    for plan in re.findall(r"^amulet plan (.*)$", page, re.MULTILINE)
]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_the_code_computes(name: str) -> None:
    assert TABLES[name]() in PAGE


@pytest.mark.parametrize(("page", "arguments"), PLANS, ids=[plan for _, plan in PLANS])
def test_a_plan_runs_and_prints_what_the_page_shows(page: str, arguments: str) -> None:
    found = CliRunner().invoke(app, ["plan", *shlex.split(arguments)], env={"COLUMNS": "100"})
    assert found.exit_code == 0, found.output
    shown = page.split(f"amulet plan {arguments}\n```\n", 1)[1].split("```")[1]
    lines = [line.rstrip() for line in found.output.strip().splitlines()]
    assert shown.strip().removeprefix("text\n").splitlines() == lines


def test_each_page_has_a_plan() -> None:
    assert {page for page, _ in PLANS} == {PAGE, DEPLOYMENT}


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b"])
def test_what_was_measured_is_compared_with_the_plan(shape: str) -> None:
    """The benchmark decoded two rows, that is, without focus."""
    line = re.search(rf"^\| {shape} \| (\S+) \| (\S+) \|$", DEPLOYMENT, re.MULTILINE)
    assert line is not None
    given = "--gpu H100 --users 1 --prompt 550 --answer 64 --shared 530 --alone 0 --json"
    found = CliRunner().invoke(app, ["plan", "-m", shape, *given.split()])
    seconds = json.loads(found.output)["amulet"]["step_seconds"]
    assert line[1] == f"{1000 * seconds:.2f}"
    benchmarks = (DOCS.parent / "BENCHMARKS.md").read_text(encoding="utf-8")
    (measured,) = re.findall(r"steered 2\.85 and 9\.07,\s+compiled (\S+) and (\S+);", benchmarks)
    assert line[2] in measured
