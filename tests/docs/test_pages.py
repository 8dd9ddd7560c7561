"""Every Python block of the pages runs, page by page, and every command has the options it gives.

Models by name are a tiny one with random weights, put where the hub's downloads lie; the embedded
model is loaded once, and answers are cut short. What can't run here says so in its first line, and
its imports and keywords are checked.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from llama_index.core import Settings

import amulet.cli
from amulet import Amulet
from amulet.models.loading import load_pretrained
from tests.docs.pages import DOCS, PAGES, ROOT, Block, blocks
from tests.models import random_model
from tests.templates import family_tokenizer

STAND_IN = "Qwen/Qwen3-0.6B"
NOT_RUN = "# Not run here: "
FRAMEWORKS = ("langchain.md", "llama_index.md")
# What a print of a page gives at the end of its line: `print(...)  # ... word`.
ENDS = re.compile(r"^ *print\(.*\)  # \.\.\. (\w+)$", re.MULTILINE)
# Pages whose blocks another test runs.
ELSEWHERE = {"serving.md": "tests/serve/test_docs.py"}

RUN = [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]
UNRUN = [
    block for page in [*PAGES, ROOT / "README.md"] for block in blocks(page, "python") if block.mark
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A hub cache that holds the stand-in; the tests are offline, so nothing else is looked for."""
    folder = tmp_path_factory.mktemp("hub")
    saved = folder / f"models--{STAND_IN.replace('/', '--')}"
    snapshot = saved / "snapshots" / "0"
    tokenizer = family_tokenizer("qwen")
    model = random_model("qwen3", vocab_size=len(tokenizer))
    model.config.max_position_embeddings = 8192  # its tokens are bytes
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (saved / "refs").mkdir()
    (saved / "refs" / "main").write_text("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
        yield


# LlamaIndex does not close the event loops and in-memory databases that it opens.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_page_runs(
    page: Path,
    hub: None,
    embedded: None,
    short_answers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("_llm", "_tokenizer"):  # what a page sets ends with it
        monkeypatch.setattr(Settings, name, None)
    monkeypatch.setattr("llama_index.core.global_tokenizer", None)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if not block.mark:
            exec(block.compiled(), namespace)  # type: ignore[call-overload]
            printed = capsys.readouterr().out
            for word in ENDS.findall(block.text):
                assert re.search(rf" {word}$", printed, re.MULTILINE), f"{block.name}: {word}"
    namespace.clear()
    asyncio.set_event_loop(None)  # let go of what it left,
    gc.collect()  # while this test's filter holds


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_frameworks_pages_need_the_embedded_model_alone(name: str) -> None:
    first, *others = [block for block in blocks(DOCS / name, "python") if not block.mark]
    assert ".embedded(" in first.text
    for block in (first, *others):
        assert STAND_IN not in block.text, f"{block.name}: a reader without a network is stuck"


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.name)
def test_nothing_is_installed_under_a_name_that_no_index_has(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<this repository>" not in text
    commands = re.findall(r"^ *(?:\$ )?(pip install .*)$", text, re.MULTILINE)
    assert [line for line in commands if "amulet-integrations" in line] == []


@pytest.mark.parametrize("block", UNRUN, ids=lambda block: block.name)
def test_what_is_not_run_says_so_and_could(block: Block) -> None:
    assert block.mark == "no-run", f"{block.name}: what does {block.mark!r} mean?"
    assert block.text.startswith(NOT_RUN), f"{block.name}: the reader isn't told that it isn't run"
    check(block)


def check(block: Block) -> None:
    """Import what a block imports, and compare its calls' keywords with what they call."""
    block.compiled()
    tree = ast.parse(block.text)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := look_up(node.func, names)) is not None:
            for keyword in node.keywords:
                if keyword.arg and (known := keywords(called)) is not None:
                    assert keyword.arg in known, f"{block.name}: {keyword.arg}"


def look_up(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := look_up(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None


def keywords(called: Any) -> set[str] | None:
    """Return the keywords that something takes; None where it takes any."""
    parameters = inspect.signature(called).parameters
    known = set(parameters)
    if called == Amulet.from_pretrained:
        return known | set(inspect.signature(load_pretrained).parameters)
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return None if is_open else known


def test_a_wrong_keyword_is_found() -> None:
    text = f'{NOT_RUN}x\nfrom amulet import Amulet\nAmulet.from_pretrained("x", devise="cuda")\n'
    with pytest.raises(AssertionError, match="devise"):
        check(Block(DOCS / "x.md", "python", "no-run", text, 1))


def test_the_other_tests_read_their_pages() -> None:
    for page, test in ELSEWHERE.items():
        if (DOCS / page).exists():
            assert page in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.name)
def test_commands_have_their_options(path: Path) -> None:
    app: Any = typer.main.get_command(amulet.cli.app)
    for block in blocks(path, "sh", "bash", "console", "shell"):
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            if not re.match(r"(\$ )?amulet [a-z]", line):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            command: click.Command = app.commands[words[1]]
            known = {option for each in command.params for option in each.opts} | {"--help"}
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= known, f"{block.name}: {given - known}"


@pytest.mark.parametrize("path", [*PAGES, *ROOT.glob("*.md")], ids=lambda path: path.name)
def test_json_is_json(path: Path) -> None:
    for block in blocks(path, "json"):
        for line in [block.text] if "\n}" in block.text else block.text.splitlines():
            json.loads(line)
