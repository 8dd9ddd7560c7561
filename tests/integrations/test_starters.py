"""`amulet init`: each starter runs as it is written, and nothing of the user's is overwritten."""

from __future__ import annotations

import ast
import asyncio
import gc
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from amulet import starter
from amulet.cli import app

ANSWERS = {
    "langchain-rag": [
        r"ada: The Saturday market offers .* smoked trout, honey cakes, and chestnut dumplings",
        r"ben: 1\. Smoked trout of the Olsen family\n2\. Honey cake of Widow Brandt\n3\. Chestnut",
        r"carl: The Saturday market is a wonderful place",
    ],
    "langgraph-agent": [
        r"anna> Keep it short, one sentence, from now on\.\nI will remember that\.\n",
        r"anna> How do I keep a houseplant alive\?\nMake sure to water them regularly",
        r"ben> How do I keep a houseplant alive\?\nKeeping a houseplant alive is a delicate",
        r"anna> When is the library open\?\nThe library is open from 9 to 17, on Mondays from 13",
    ],
    "llamaindex-chat": [r"Ctrl-D leaves\.\n(you> ){2}The sky .{20,160}\.\n(you> ){2}\S.{161,}"],
}
TYPED = "/prefer Answer in one short sentence.\nWhy is the sky blue?\n/prefer\nWhat is tea?\n"


def init(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        app, ["init", *map(str, arguments)]
    )


def written(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


# LlamaIndex does not close the databases and event loops that it opens.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("kind", starter.NEEDS)
def test_a_starter_runs(
    kind: str,
    embedded: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = init(kind, tmp_path / "mine")
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
    runpy.run_path(str(tmp_path / "mine" / "main.py"), run_name="__main__")
    asyncio.set_event_loop(None)  # let go of what it left,
    gc.collect()  # while this test's filter holds
    printed = capsys.readouterr().out
    for answer in ANSWERS[kind]:
        assert re.search(answer, printed), printed


@pytest.mark.parametrize("kind", starter.NEEDS)
def test_a_model_of_ones_own_is_loaded_by_name(kind: str, tmp_path: Path) -> None:
    name = 'Qwen/"Qwen3"'  # a name is data, whatever is in it
    assert init(kind, tmp_path / "mine", "--model", name).exit_code == 0
    program = written(tmp_path / "mine")["main.py"]
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    given = [
        keyword.value.value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("ChatAmulet", "AmuletLLM")
        for keyword in call.keywords
        if keyword.arg == "model" and isinstance(keyword.value, ast.Constant)
    ]
    assert given == [name]
    assert "embedded" not in program
    assert "choose_tool" not in program  # only the smallest models need to be told which


def test_a_local_model_is_found_from_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.gguf").touch()
    assert init("llamaindex-chat", "mine", "-m", "weights.gguf").exit_code == 0
    assert f'AmuletLLM(model="{tmp_path}/weights.gguf", ' in written(tmp_path / "mine")["main.py"]


def test_the_next_commands_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init().stdout == (
        "Written to langchain-rag: documents/lake_ferry.md, documents/library.md, "
        "documents/market.md, main.py. Next:\n  cd langchain-rag\n  python main.py\n"
    )
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    *_, install, folder, run = init("llamaindex-chat", "my chat").stdout.splitlines()
    assert install == "  pip install 'amulet-integrations[llama-index]'"
    assert (folder, run) == ("  cd 'my chat'", "  python main.py")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("mine")
    result = init("langchain-rag", tmp_path)
    assert result.exit_code == 1
    assert f"The folder '{tmp_path}' is not empty, and nothing is overwritten" in result.stderr
    assert written(tmp_path) == {"main.py": "mine"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = init("langchain-rag", tmp_path / "taken")
    assert result.exit_code == 1
    assert f"Can't write to the folder '{tmp_path}/taken': File exists." in result.stderr


def test_an_empty_name_is_no_model(tmp_path: Path) -> None:
    result = init("langchain-rag", tmp_path / "mine", "-m", " ")
    assert result.exit_code == 1
    assert "expected a hub id, a folder or a GGUF file" in result.stderr
    assert not (tmp_path / "mine").exists()


def test_an_unknown_kind_names_those_that_there_are(tmp_path: Path) -> None:
    result = init("langchain", tmp_path / "mine")
    assert result.exit_code == 2
    assert "langgraph-agent" in result.stderr
