"""Each LangChain example runs on the embedded model, and its answers follow the preferences."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amulet import Amulet
from tests.models import ScriptedModel
from tests.templates import family_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT_ANSWER = "Make sure to water it regularly"
LIST_ANSWER = "1. Water regularly"
PLAIN_ANSWER = "Keeping a houseplant alive is a delicate balance of care."

Run = Callable[[str], list[str]]


@pytest.fixture
def run(embedded: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python examples/<name>.py` would, and returns the lines it printed."""

    def run_example(name: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name])
        monkeypatch.syspath_prepend(EXAMPLES)  # examples may import each other
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


def after(lines: list[str], start: str) -> str:
    """The rest of the line that begins so."""
    (line,) = [line for line in lines if line.startswith(start)]
    return line.removeprefix(start).strip()


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("langchain_*.py")), ids=lambda path: path.name
)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 60


def test_swap(run: Run) -> None:
    lines = run("langchain_swap.py")
    assert after(lines, "as before:").startswith(PLAIN_ANSWER)
    assert after(lines, "Answer in one short sentence.").startswith(SHORT_ANSWER)
    assert after(lines, "Answer as a numbered list.").startswith(LIST_ANSWER)


def test_rag(run: Run) -> None:
    text = "\n".join(run("langchain_rag.py"))
    monday, tuesday = re.split(r"(?:^|\n)(?:mon|tues)day\n", text)[1:]
    searched = "  searched: In other words, what can I eat at the Saturday market?\n"
    answers = []
    for thread in (monday, tuesday):
        assert thread.startswith(searched)  # finding the passage is not steered
        answers.append(thread.removeprefix(searched))
    listed, plain = answers
    assert listed.startswith("1. Smoked trout of the Olsen family\n2. Honey cake of Widow Brandt")
    assert plain.startswith("The Saturday market is a wonderful place to enjoy a variety of")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_agent(run: Run) -> None:
    lines = run("langchain_agent.py")
    plant = "How do I keep a houseplant alive?"
    anna = lines.index(f"anna: {plant}")
    ben = lines.index(f"ben: {plant}")
    hours = lines.index("anna: When is the library open?")
    kept = {"preference": "one sentence", "replace": True}
    assert lines[1].strip() == str([("remember_preference", kept)])
    assert lines[anna + 1].strip() == "[]"
    assert lines[anna + 2].strip().startswith("Make sure to water them regularly")
    assert ben == anna + 3  # one line, where ben's and the plain answer go on
    assert lines[ben + 2].strip().startswith(LIST_ANSWER)
    assert lines[hours + 1].strip() == "[('opening_hours', {'place': 'library'})]"
    said = "The library is open from 9 to 17, on Mondays from 13 to 17."
    assert lines[hours + 2].strip() == said


def test_structured(run: Run) -> None:
    jaws, cats, *free = run("langchain_structured.py")
    assert jaws == "Review(film='Jaws', verdict='good', stars=5)"
    assert cats == "Review(film='Cats', verdict='bad', stars=1)"
    assert "pirate" in free[0]


def test_fastapi(run: Run) -> None:
    pytest.importorskip("fastapi")
    lines = run("langchain_fastapi.py")
    assert after(lines, "None:").startswith(PLAIN_ANSWER)
    assert after(lines, "Answer in one short sentence.:").startswith(SHORT_ANSWER)
    assert after(lines, "Answer as a numbered list.:").startswith(LIST_ANSWER)


def test_reasoning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package carries a reasoning model, so a scripted one stands in for Qwen3."""
    asked: list[str] = []

    def scripted(name: str, **options: Any) -> Amulet:
        asked.append(name)
        tokenizer = family_tokenizer("qwen")
        answers = {
            "<think>\n\n</think>": "Eight.",  # the template wrote an empty thought: thinking is off
            "one short sentence": "<think>\n2 * 4 = 8\n</think>\n\nEight weeks.",
            "": "<think>\n2 * 4 = 8\n</think>\n\nFour fortnights are eight weeks.",
        }
        model: Any = ScriptedModel(tokenizer, answers)
        return Amulet(model, tokenizer)

    monkeypatch.setattr(Amulet, "from_pretrained", scripted)
    lines = run("langchain_reasoning.py")
    assert asked == ["Qwen/Qwen3-0.6B"]
    thought, rest = "\n".join(lines[:-2]), lines[-2:]
    assert re.sub(r"\(thinks\) |\s", "", thought) == "2*4=8"
    assert rest == ["Eight weeks.", "Eight."]


def test_langsmith(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANGSMITH_API_KEY", raising=False)
    lines = run("langchain_langsmith.py")
    assert after(lines, "anna:").startswith(SHORT_ANSWER)
    assert after(lines, "ben:").startswith(LIST_ANSWER)
    assert lines.count("  amulet_strength: 0.35") == 2
    assert lines.count("  amulet_preference_source: conversation") == 2
    digests = {line for line in lines if line.startswith("  amulet_preference: sha256:")}
    assert len(digests) == 2
    assert not any("Answer in" in line or "Answer as" in line for line in lines)
