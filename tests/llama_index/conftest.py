"""LlamaIndex's own leftovers must not fail our tests; everything of ours still does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEFTOVERS = (
    # Its default memory opens an SQLite connection that nothing ever closes.
    "ignore:.*Connection.__del__:pytest.PytestUnraisableExceptionWarning",
    "ignore:Accessing the 'model_",
    "ignore:is_running called from within a step",  # its ReAct agent
    "ignore:The `__fields",  # its agents and tools, under pydantic 2.11 and later
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            for leftover in LEFTOVERS:
                item.add_marker(pytest.mark.filterwarnings(leftover))


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Find them while this test's filters hold."""
    yield
    gc.collect()
