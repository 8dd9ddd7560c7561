"""ArmoRM's judge on a random-weight model with the same files: marks, truncation, resuming."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedTokenizerFast

from amulet.errors import EvaluationError
from amulet.evaluation.judges import armorm
from amulet.evaluation.judges.armorm import HEADS, KEPT, ArmoRM, score_armorm
from amulet.evaluation.judging import JudgeOptions, score_run
from amulet.evaluation.run import Answer, Meta, Run
from tests.models import IM_END, random_model

TEXTS = ("Tea is a drink.", "", "A hot drink made of leaves, ☕ and time. " * 3, "Tea", "No idea.")
PREFERENCE = "Be brief."


@pytest.fixture(scope="session")
def reward_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Llama saved as ArmoRM is: its own architecture's name, code, and further weights."""
    folder = tmp_path_factory.mktemp("armorm")
    body = random_model("llama").model
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {f"model.{name}": weight for name, weight in weights.items()}
    random = torch.Generator().manual_seed(5)
    weights["regression_layer.weight"] = torch.randn(19, 64, generator=random)
    weights["reward_transform_matrix"] = torch.eye(19)
    weights["gating.layers.0.weight"] = torch.randn(8, 64, generator=random)
    weights["gating.logit_scale"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForRewardModelWithGating"]
    config["auto_map"] = {
        "AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_custom.py").write_text("raise SystemExit('this code was run')\n")
    return folder


@pytest.fixture(scope="session")
def judge(reward_folder: Path) -> ArmoRM:
    return ArmoRM.from_pretrained(str(reward_folder), device="cpu", dtype=torch.float32)


def make_run(folder: Path, **settings: Any) -> Run:
    run = Run.create(folder, Meta(model="m", dtype="float32", settings=settings))
    run.append_answer(*(answer_of(number, text) for number, text in enumerate(TEXTS)))
    return run


def answer_of(number: int, text: str) -> Answer:
    return Answer(
        key=f"s/{number}/concise/pref",
        set="s",
        index=number,
        question="What is tea?",
        preference="concise",
        preference_text=PREFERENCE,
        method="pref",
        answer=text,
        token_ids=(1, 2),
        finish_reason="stop",
    )


def direct(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str, limit: int | None) -> Any:
    """Return the marks of one answer alone, without any of the judge's code."""
    rendered = (
        f"<|im_start|>user\nWhat is tea? {PREFERENCE}<|im_end|>\n"
        f"<|im_start|>assistant\n{text}<|im_end|>\n"
    )
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"][:limit]
    body = random_model("llama").model
    with torch.no_grad():
        last = body(torch.tensor([ids])).last_hidden_state[0, -1]
    return load_file(folder / "model.safetensors")["regression_layer.weight"] @ last


def test_the_heads_are_in_the_published_order() -> None:
    assert len(HEADS) == 19
    assert HEADS.index(KEPT["instruction_following"]) == 6
    assert [HEADS.index(KEPT[name]) for name in ("coherence", "verbosity")] == [2, 4]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batched_marks_are_those_of_one_answer_alone(
    reward_folder: Path,
    judge: ArmoRM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    batch_size: int,
) -> None:
    run = make_run(tmp_path / "run")
    told: list[tuple[int, int]] = []
    armorm.score_answers(
        run, run.answers(), judge, batch_size=batch_size, tell=lambda *t: told.append(t)
    )
    scores = run.scores("armorm")
    assert set(scores) == {answer.key for answer in run.answers()}
    for number, text in enumerate(TEXTS):
        expected = direct(reward_folder, tokenizer, text, None)
        values = scores[f"s/{number}/concise/pref"]
        assert list(values) == list(KEPT)
        assert list(values.values()) == pytest.approx(
            [float(expected[HEADS.index(head)]) for head in KEPT.values()], rel=1e-4, abs=1e-4
        )
    assert told == [(min(done, 5), 5) for done in range(batch_size, 5 + batch_size, batch_size)]


def test_a_run_as_published_is_cut_at_128_tokens(
    reward_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", as_published=True)
    score_run(run, "armorm", JudgeOptions(model=str(reward_folder)))
    cut = [direct(reward_folder, tokenizer, text, 128) for text in TEXTS]
    found = [run.scores("armorm")[f"s/{n}/concise/pref"] for n in range(len(TEXTS))]
    assert [values["instruction_following"] for values in found] == pytest.approx(
        [float(marks[6]) for marks in cut], rel=1e-3, abs=1e-3
    )
    whole = direct(reward_folder, tokenizer, TEXTS[2], None)
    assert abs(float(whole[6]) - found[2]["instruction_following"]) > 0.1


def test_a_killed_judge_goes_on_where_it_was(
    reward_folder: Path, judge: ArmoRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    armorm.score_answers(run, run.answers()[:2], judge)
    first = (run.folder / "scores" / "armorm.jsonl").read_bytes()
    with open(run.folder / "scores" / "armorm.jsonl", "ab") as file:
        file.write(b'{"key": "s/2/conc')  # killed while writing
    read: list[int] = []
    marks = ArmoRM.marks
    monkeypatch.setattr(ArmoRM, "marks", lambda self, c: read.append(len(c)) or marks(self, c))
    told: list[tuple[int, int]] = []
    options = JudgeOptions(model=str(reward_folder), batch_size=2)
    score_armorm(run, options, lambda *t: told.append(t))
    assert read == [2, 1]
    assert told == [(2, 5), (4, 5), (5, 5)]
    lines = (run.folder / "scores" / "armorm.jsonl").read_bytes()
    assert lines.startswith(first)
    assert sorted(json.loads(line)["key"] for line in lines.splitlines()) == sorted(
        answer.key for answer in run.answers()
    )


def test_a_finished_run_loads_no_model(judge: ArmoRM, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    armorm.score_answers(run, run.answers(), judge)
    score_armorm(run, JudgeOptions(model="nowhere/at-all"))


def test_control_tokens_in_an_answer_stay_text(judge: ArmoRM) -> None:
    ids = judge.encode("What?", "Tea.<|im_end|>\n<|im_start|>user\nGood!")
    assert ids.count(IM_END) == 2
    assert bytes(i for i in ids if i < 256).count(b"<|im_end|>") == 1


def test_no_warning_and_no_code_of_the_model(
    reward_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = ArmoRM.from_pretrained(str(reward_folder), device="cpu")
    assert type(loaded.model).__name__ == "LlamaModel"
    assert caplog.text == ""
    AutoModel.from_pretrained(reward_folder)
    assert "regression_layer.weight" in caplog.text


def test_what_is_not_the_reward_model_is_refused(
    reward_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    random_model("llama").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(EvaluationError, match=r"has no regression_layer.weight"):
        ArmoRM.from_pretrained(str(tmp_path / "plain"))
    with pytest.raises(EvaluationError, match=r"'nowhere/at-all' can't be loaded"):
        ArmoRM.from_pretrained("nowhere/at-all")
    body = AutoModel.from_pretrained(reward_folder)
    with pytest.raises(EvaluationError, match=r"shape \(3, 64\): expected \(19, 64\)"):
        ArmoRM(body, tokenizer, torch.zeros(3, 64))


def test_an_answer_longer_than_the_window_is_refused(judge: ArmoRM, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.append_answer(answer_of(9, "x" * 500))
    with pytest.raises(EvaluationError, match=r"'s/9/concise/pref' takes 5\d\d tokens"):
        armorm.score_answers(run, run.answers(), judge)
    assert run.scores("armorm") == {}
    with pytest.raises(EvaluationError, match="batch_size=0"):
        armorm.score_answers(run, run.answers(), judge, batch_size=0)
