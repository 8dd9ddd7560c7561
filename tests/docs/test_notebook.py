"""The notebooks in `examples/` run from the first cell to the last, and keep no outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return what its last line, if an expression, gives."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first_steps.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_no_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_first_steps_run(embedded: None) -> None:
    (path,) = NOTEBOOKS
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = [
        run("".join(cell["source"]), f"{path.name}, {cell['id']}", namespace)
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    nothing, steered, compared, answers = shown
    assert nothing is None
    assert "<span" in steered._repr_html_()
    for kind in ("plain", "prompt", "steered"):
        assert kind in compared._repr_html_()
    assert answers["ben"].startswith("1. ")
    assert not answers["ada"].startswith("1. ")
