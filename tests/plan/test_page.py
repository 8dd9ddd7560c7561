"""docs/scaling.md: its tables are what the code computes, its commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from amulet.cli import app
from amulet.plan.tables import TABLES

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^amulet plan (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_the_code_computes(name: str) -> None:
    assert TABLES[name]() in PAGE


@pytest.mark.parametrize("arguments", PLANS)
def test_a_plan_runs_and_prints_what_the_page_shows(arguments: str) -> None:
    found = CliRunner().invoke(app, ["plan", *shlex.split(arguments)], env={"COLUMNS": "100"})
    assert found.exit_code == 0, found.output
    shown = PAGE.split(f"amulet plan {arguments}\n```\n", 1)[1].split("```")[1]
    lines = [line.rstrip() for line in found.output.strip().splitlines()]
    assert shown.strip().removeprefix("text\n").splitlines() == lines


def test_there_is_a_plan() -> None:
    assert PLANS
