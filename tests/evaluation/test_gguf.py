"""A run over a GGUF file is the run that Transformers decodes from the same weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from amulet import Amulet
from amulet.cli import app
from amulet.errors import EvaluationError
from amulet.evaluation.facts import facts, right_answers
from amulet.evaluation.jobs import Settings
from amulet.evaluation.judging import JudgeOptions, score_run
from amulet.evaluation.run import Run
from tests.evaluation.test_run import METHODS, contents, decode
from tests.gguf_files import write_gguf
from tests.marks import needs_llamacpp
from tests.models import byte_tokenizer, random_model

pytestmark = needs_llamacpp
TOKENS = 259  # of the byte tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of bytes, and the weights of `random_model("llama")`."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, random_model("llama", vocab_size=TOKENS), byte_tokenizer())


@pytest.fixture(scope="module")
def pair(file: Path) -> tuple[Amulet, Amulet]:
    """The same weights through llama.cpp in float32, and through Transformers in float64."""
    own = Amulet(random_model("llama", dtype=torch.float64, vocab_size=TOKENS), byte_tokenizer())
    found = Amulet.from_gguf(file, threads=1, kv_type="f32")
    own.end_ids = found.end_ids
    return found, own


def test_answers_and_guards_are_those_of_transformers(
    pair: tuple[Amulet, Amulet], file: Path, question_file: Path, tmp_path: Path
) -> None:
    runs = []
    for name, amulet in zip(("gguf", "transformers"), pair, strict=True):
        runs.append(decode(amulet, tmp_path / name, question_file, methods=METHODS))
        score_run(runs[-1], "guards", JudgeOptions(amulet=amulet))
    for key, (text, ids, reason, changed) in contents(runs[1]).items():
        assert contents(runs[0])[key] == (text, ids, reason, pytest.approx(changed)), key
    scores = [run.scores("guards") for run in runs]
    for key, expected in scores[1].items():
        assert scores[0][key] == pytest.approx(expected, abs=1e-3), key
    meta = runs[0].meta
    assert meta.revision == hashlib.sha256(file.read_bytes()).hexdigest()
    assert meta.dtype.startswith("llama ")
    assert meta.machine["device"] == "llama.cpp"
    assert "llama-cpp-python" in meta.versions


def test_facts_are_scored_as_by_transformers(pair: tuple[Amulet, Amulet]) -> None:
    found, expected = (right_answers(amulet, given=facts()[:6]) for amulet in pair)
    assert found == expected
    assert len(set(expected)) == 2  # random weights get some right


@pytest.mark.parametrize("method", ["beam", "amulet_literal", "ours:adapt=jsd"])
def test_what_transformers_generates_is_refused_before_the_run(
    pair: tuple[Amulet, Amulet], question_file: Path, tmp_path: Path, method: str
) -> None:
    kind = method.partition(":")[0]
    with pytest.raises(EvaluationError, match=f"^{kind}.*: needs a Transformers model, and tiny"):
        decode(pair[0], tmp_path / "run", question_file, methods=("base", method))
    assert not (tmp_path / "run").exists()


def test_the_authors_sampling_is_refused(
    pair: tuple[Amulet, Amulet], question_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"^as_published: needs a Transformers model"):
        decode(
            pair[0],
            tmp_path / "run",
            question_file,
            methods=("base",),
            settings=Settings(as_published=True),
        )


def test_the_command_takes_a_file_and_stores_no_path(
    file: Path, question_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("-q", question_file, "-p", "concise", "-m", file, "-n", 4, "--limit", 1)
    result = CliRunner().invoke(app, ["eval", "--out", str(out), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    meta = Run(out).meta
    assert meta.model == "tiny.gguf"
    assert [method.name for method in meta.methods] == [
        "base",
        "pref",
        "linear_alignment",
        "amulet",
    ]
