"""Snippets on serving, of docs/serving.md and the README, run as they stand but for the port."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from amulet.serve.app import create_app
from tests.serve.conftest import listening, saying

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
ROOT = Path(__file__).parents[2]


def python_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


SNIPPETS = python_of(ROOT / "docs" / "serving.md")
CLIENTS = [text for text in python_of(ROOT / "README.md") if "http://127.0.0.1:8000" in text]


@pytest.fixture(scope="module")
def url(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """A server that shows, by its answer, which preference has reached it."""
    answers = {
        "one short sentence": "A hole.",
        "pirate": "Arr.",
        "Be brief": "Dark.",
        "": "?",
    }
    app = create_app(saying(tokenizer, answers), name="SmolLM2-135M-Instruct")
    with listening(app) as (address, _):
        yield address


@pytest.mark.parametrize(
    ("snippet", "said"),
    list(
        zip(
            [*SNIPPETS, *CLIENTS],
            ["A hole.", "A hole.", "A hole.", "Dark.", "A hole.", "A hole."],
            strict=True,
        )
    ),
    ids=[
        "openai",
        "langchain",
        "llama_index",
        "connect",
        "responses",
        "README",
    ],
)
def test_a_snippet_runs(
    snippet: str,
    said: str,
    url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exec(snippet.replace("http://127.0.0.1:8000", url), {})
    assert capsys.readouterr().out.startswith(said)
