"""Decoding a run: traces, the authors' sampling, beams and pairs, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, DecodeError
from amulet.errors import EvaluationError
from amulet.evaluation.jobs import Settings
from amulet.evaluation.run import Run
from tests.evaluation.test_run import contents, decode
from tests.models import ScriptedModel


def test_a_trace_keeps_what_each_token_gained(
    tokenizer: PreTrainedTokenizerFast, question_file: Path, tmp_path: Path
) -> None:
    amulet = Amulet(ScriptedModel(tokenizer, {"concise": "Tea.", "": "A leaf."}), tokenizer)
    run = decode(
        amulet,
        tmp_path / "run",
        question_file,
        preferences=("concise",),
        methods=("pref", "linear_alignment"),
        settings=Settings(max_new_tokens=8, trace=True),
    )
    steered = next(a for a in run.answers() if a.method == "linear_alignment")
    assert steered.answer == "Tea."
    assert steered.steered_tokens is not None
    assert [piece for piece, _ in steered.steered_tokens] == [*"Tea.", "<|im_end|>"]
    assert steered.steered_tokens[0][1] == pytest.approx(20.0, abs=1e-4)
    assert steered.changed == 1.0
    prompted = next(a for a in run.answers() if a.method == "pref")
    assert prompted.steered_tokens is None


def test_as_published_samples_base_and_pref_alone(
    tiny: Amulet, question_file: Path, tmp_path: Path
) -> None:
    methods = ("base", "pref", "linear_alignment")
    greedy = contents(decode(tiny, tmp_path / "greedy", question_file, methods=methods))
    settings = Settings(max_new_tokens=12, as_published=True)
    first = decode(tiny, tmp_path / "first", question_file, methods=methods, settings=settings)
    again = decode(tiny, tmp_path / "again", question_file, methods=methods, settings=settings)
    assert contents(first) == contents(again)
    assert first.meta.settings["published_sampling"] == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
    }
    same = {key for key, content in contents(first).items() if greedy[key] == content}
    assert same == {key for key in greedy if key.endswith("linear_alignment")}


def test_beams_and_adaptive_methods_are_resumed_too(
    tiny: Amulet, question_file: Path, tmp_path: Path
) -> None:
    methods = ("beam", "ours:strength=2,adapt=jsd", "ours:strength=2,adapt=opposite")
    options = {"preferences": ("concise",), "methods": methods}
    first = decode(tiny, tmp_path / "run", question_file, **options)  # type: ignore[arg-type]
    lines = (first.folder / "answers.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9
    expected = contents(first)
    (first.folder / "answers.jsonl").write_text("".join(lines[:4]))
    again = decode(tiny, tmp_path / "run", question_file, **options)  # type: ignore[arg-type]
    assert contents(again) == expected
    assert {a.changed is None for a in again.answers() if a.method == "beam"} == {True}


def test_what_is_decoded_greedily_refuses_a_temperature(
    tiny: Amulet, question_file: Path, tmp_path: Path
) -> None:
    warm = Settings(temperature=1.0)
    with pytest.raises(EvaluationError, match="beam is only decoded greedily"):
        decode(tiny, tmp_path / "run", question_file, methods=("beam",), settings=warm)
    assert not (tmp_path / "run").exists()


def test_a_question_that_does_not_fit_is_named(tiny: Amulet, tmp_path: Path) -> None:
    questions = tmp_path / "long.json"
    questions.write_text(json.dumps([{"index": 7, "question": "why " * 300}]))
    with pytest.raises(EvaluationError, match=r"Question 7 of 'long', method base: .*512"):
        decode(tiny, tmp_path / "run", questions)


def test_a_failed_step_keeps_what_was_decoded(
    tokenizer: PreTrainedTokenizerFast, question_file: Path, tmp_path: Path
) -> None:
    model = ScriptedModel(tokenizer, {"sky": "No tea.", "": "Tea."})
    amulet = Amulet(model, tokenizer, max_rows=8)

    def fail(done: int, total: int) -> None:
        if done == 2:
            model.fail_with = RuntimeError("broken")

    options = {"preferences": ("concise",), "methods": ("base",)}
    with pytest.raises(DecodeError, match="broken"):
        decode(amulet, tmp_path / "run", question_file, tell=fail, **options)  # type: ignore[arg-type]
    assert [a.answer for a in Run(tmp_path / "run").answers()] == ["Tea.", "Tea."]
    run = decode(amulet, tmp_path / "run", question_file, **options)  # type: ignore[arg-type]
    assert sorted(a.answer for a in run.answers()) == ["No tea.", "Tea.", "Tea."]
