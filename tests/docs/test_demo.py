"""`make demo`: it runs without a terminal, and its steered answers are what was asked for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from amulet.evaluation.grounded import holds
from benchmarks.demo_choice import faults

PROMPTED, STEERED = "preference in the prompt only", "steered"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    """The example as a module; the folder of examples is on the path, as when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import rag_two_people

        yield rag_two_people
    finally:
        sys.path.remove(str(EXAMPLES))


def test_minilm_finds_the_passage(demo: ModuleType) -> None:
    store = demo.InMemoryVectorStore.from_documents(demo.load_passages(), demo.MiniLM())
    expected = {
        demo.QUESTION: "The Saturday market / What to eat",
        "How long can I keep a library book?": "The town library / Borrowing",
        "May my dog come on the ferry?": "The lake ferry / Dogs",
        "When does the lighthouse open?": "The old lighthouse / Visiting",
    }
    found = {
        question: demo.title(store.similarity_search(question, k=1)[0]) for question in expected
    }
    assert found == expected


@pytest.mark.slow
def test_the_demo_runs_and_steering_shows(
    demo: ModuleType, embedded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = demo.main()
    printed = capsys.readouterr().out
    assert "Passages: The Saturday market / What to eat" in printed
    assert len(re.findall(r"\d+ words, \d+ ms", printed)) == 6
    ada, ben = answers["Ada"], answers["Ben"]
    assert ada["plain"] == ben["plain"]
    passage = next(p for p in demo.load_passages() if demo.title(p).endswith("/ What to eat"))
    failed = 0
    for name, given in answers.items():
        kept = demo.PEOPLE[name].check
        assert kept(given[STEERED])
        assert holds(given[STEERED], [demo.FACT])
        wish = demo.PEOPLE[name].preference
        assert faults(given[STEERED], True, wish, f"{passage.page_content}\n{demo.QUESTION}") == []
        failed += not (kept(given[PROMPTED]) and holds(given[PROMPTED], [demo.FACT]))
    assert failed >= 1
    assert printed.count("keeps the preference: plain no, ") == 2
    assert printed.count("steered yes") == 4
