"""Fixtures of the evaluation's tests: a tiny random model, a set of questions, and its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from tests.models import random_model

QUESTIONS = ("What is tea?", "Why is the sky blue?", "How do bees find home?")


@pytest.fixture(scope="session")
def tiny(tokenizer: PreTrainedTokenizerFast) -> Amulet:
    """A random four-layer Qwen2 in float32 with bytes as tokens."""
    return Amulet(random_model("qwen2"), tokenizer, max_rows=8)


@pytest.fixture
def question_file(tmp_path: Path) -> Path:
    """A set of three questions called "small"."""
    path = tmp_path / "sets" / "small.json"
    path.parent.mkdir()
    questions = [{"index": i, "question": text} for i, text in enumerate(QUESTIONS)]
    path.write_text(json.dumps(questions), encoding="utf-8")
    return path
