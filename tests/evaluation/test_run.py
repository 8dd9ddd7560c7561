"""Run folders: what they hold, `kill -9` at any moment, and when a run is not the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from amulet.errors import EvaluationError
from amulet.evaluation.decode import evaluate
from amulet.evaluation.jobs import Settings
from amulet.evaluation.methods import parse_methods
from amulet.evaluation.paper import SYSTEM_PROMPT, preferences_of
from amulet.evaluation.questions import load_question_sets
from amulet.evaluation.run import Answer, Meta, Run
from tests.evaluation.conftest import QUESTIONS

OURS = "ours:strength=1,floor=0.05,placement=user,focus=1,loop_guard=4"
METHODS = ("base", "pref", "linear_alignment", OURS)
PREFERENCES = ("concise", "formal")
SETTINGS = Settings(max_new_tokens=12)
ROOT = Path(__file__).parents[2]


def decode(
    amulet: Amulet,
    folder: Path,
    questions: Path,
    *,
    preferences: tuple[str, ...] = PREFERENCES,
    methods: tuple[str, ...] = METHODS,
    settings: Settings = SETTINGS,
    **options: object,
) -> Run:
    return evaluate(
        amulet,
        folder,
        sets=load_question_sets([questions]),
        preferences=preferences_of(preferences),
        methods=parse_methods(methods),
        settings=settings,
        max_rows=8,
        **options,  # type: ignore[arg-type]
    )


def contents(run: Run) -> dict[str, tuple[str, tuple[int, ...], str, float | None]]:
    """Return what must not depend on when a run was killed; each key must be there once."""
    answers = run.answers()
    found = {a.key: (a.answer, a.token_ids, a.finish_reason, a.changed) for a in answers}
    assert len(found) == len(answers)
    return found


@pytest.fixture(scope="module")
def whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory, tiny: Amulet
) -> tuple[Path, Path]:
    """A finished run that nobody killed, and its questions."""
    folder = tmp_path_factory.mktemp("whole")
    questions = folder / "small.json"
    questions.write_text(
        json.dumps([{"index": i, "question": text} for i, text in enumerate(QUESTIONS)])
    )
    decode(tiny, folder / "run", questions)
    return folder / "run", questions


def test_a_run_says_what_was_run(whole: tuple[Path, Path]) -> None:
    meta = json.loads((whole[0] / "run.json").read_text())
    versions, machine, created = (meta.pop(name) for name in ("versions", "machine", "created"))
    (small,) = load_question_sets([whole[1]])
    assert meta == {
        "format": 1,
        "model": "qwen2",
        "revision": None,
        "dtype": "float32",
        "settings": {
            "max_new_tokens": 12,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "system_prompt": SYSTEM_PROMPT,
            "as_published": False,
            "trace": False,
        },
        "sets": [{"name": "small", "count": 3, "digest": small.digest}],
        "preferences": [
            {
                "name": name,
                "text": f"Your answer should be {name} as much as possible.",
                "rule": None,
            }
            for name in PREFERENCES
        ],
        "methods": [
            {
                "name": name,
                "strength": strength,
                "floor": floor,
                "placement": placement,
                "focus": focus,
                "loop_guard": guard,
                "adapt": None,
            }
            for name, strength, floor, placement, focus, guard in (
                ("base", None, None, None, 0.0, 0),
                ("pref", 0.0, None, "system", 0.0, 0),
                ("linear_alignment", 2.0, 0.0, "system", 0.0, 0),
                (OURS, 1.0, 0.05, "user", 1.0, 4),
            )
        ],
    }
    assert {"python", "torch", "transformers"} <= set(versions)
    assert machine["max_rows"] == 8
    assert created.endswith("+00:00")


def test_every_answer_is_there_with_its_settings(whole: tuple[Path, Path]) -> None:
    answers = {answer.key: answer for answer in Run(whole[0]).answers()}
    assert set(answers) == {
        f"small/{i}/{preference}/{method}"
        for i in range(3)
        for preference in PREFERENCES
        for method in METHODS
    }
    steered = answers[f"small/1/formal/{OURS}"]
    assert (steered.set, steered.index, steered.question) == ("small", 1, QUESTIONS[1])
    assert (steered.strength, steered.floor, steered.placement) == (1.0, 0.05, "user")
    assert (steered.focus, steered.loop_guard) == (1.0, 4)
    assert steered.preference_text == "Your answer should be formal as much as possible."
    assert steered.changed is not None
    assert 0 <= steered.changed <= 1
    assert steered.steered_tokens is None
    assert 0 < steered.seconds < 60
    assert answers["small/1/formal/pref"].changed is None


def test_answers_are_what_the_model_answers(whole: tuple[Path, Path], tiny: Amulet) -> None:
    answers = {answer.key: answer for answer in Run(whole[0]).answers()}
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": QUESTIONS[2]},
    ]
    plain = tiny.chat(messages, max_new_tokens=12)
    wish = "Your answer should be concise as much as possible."
    options = {"preference": wish, "placement": "system", "max_new_tokens": 12}
    prompted = tiny.chat(messages, strength=0, **options)
    steered = tiny.chat(messages, strength=2, floor=0, focus=0, loop_guard=0, **options)
    for method, reply in (("base", plain), ("pref", prompted), ("linear_alignment", steered)):
        answer = answers[f"small/2/concise/{method}"]
        assert (answer.answer, answer.token_ids) == (reply.text, reply.token_ids)
        assert answer.finish_reason == reply.finish_reason


def test_a_plain_answer_is_decoded_once_for_all_preferences(whole: tuple[Path, Path]) -> None:
    answers = [answer for answer in Run(whole[0]).answers() if answer.method == "base"]
    for index in range(3):
        shared = [a for a in answers if a.index == index]
        assert sorted(answer.preference for answer in shared) == ["concise", "formal"]
        assert len({(a.answer, a.seconds, a.seed) for a in shared}) == 1


def test_a_moved_run_goes_on_anywhere(
    whole: tuple[Path, Path], tmp_path: Path, tiny: Amulet
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(whole[0], moved)
    assert str(whole[0].parent) not in (moved / "run.json").read_text()
    told: list[tuple[int, int]] = []
    run = decode(tiny, moved, whole[1], tell=lambda done, total: told.append((done, total)))
    assert told == [(24, 24)]  # nothing was decoded again
    assert contents(run) == contents(Run(whole[0]))


def test_a_cut_at_any_byte_loses_and_repeats_nothing(
    whole: tuple[Path, Path], tmp_path: Path, tiny: Amulet
) -> None:
    written = (whole[0] / "answers.jsonl").read_bytes()
    line_ends = [i + 1 for i, byte in enumerate(written) if byte == 10]
    middle = len(line_ends) // 2
    cuts = [0, 1, line_ends[0] - 1, line_ends[0], line_ends[middle] + 100, len(written) - 1]
    for cut in cuts:
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        shutil.copy(whole[0] / "run.json", folder)
        (folder / "answers.jsonl").write_bytes(written[:cut])
        complete = sum(end <= cut for end in line_ends)
        assert len(Run(folder).answers()) == complete  # reading tolerates the torn line
        run = decode(tiny, folder, whole[1])
        assert contents(run) == contents(Run(whole[0]))
        kept = line_ends[complete - 1] if complete else 0
        assert (folder / "answers.jsonl").read_bytes()[:kept] == written[:kept]


def test_plain_answers_cut_between_their_lines_are_copied(
    whole: tuple[Path, Path], tmp_path: Path, tiny: Amulet
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(whole[0] / "run.json", folder)
    lines = (whole[0] / "answers.jsonl").read_text().splitlines(keepends=True)
    base = [line for line in lines if "/concise/base" in line]
    (folder / "answers.jsonl").write_text("".join(base))
    run = decode(tiny, folder, whole[1])
    by_key = {answer.key: answer for answer in run.answers()}
    for index in range(3):
        one, other = (by_key[f"small/{index}/{name}/base"] for name in PREFERENCES)
        assert (one.answer, one.seconds) == (other.answer, other.seconds)
    assert contents(run) == contents(Run(whole[0]))


KILLED = """
import sys, time
from pathlib import Path
from amulet import Amulet
from tests.evaluation.test_run import decode
from tests.models import byte_tokenizer, random_model

model = random_model("qwen2")
forward = model.forward
def slow(*given, **options):
    time.sleep(0.005)
    return forward(*given, **options)
slow.__signature__ = __import__("inspect").signature(forward)
model.forward = slow
decode(Amulet(model, byte_tokenizer(), max_rows=8), Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_kill_9_loses_and_repeats_nothing(
    whole: tuple[Path, Path], tmp_path: Path, tiny: Amulet
) -> None:
    folder = tmp_path / "run"
    answers = folder / "answers.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(whole[1])], cwd=ROOT, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 120
        while not answers.exists() or answers.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        with pytest.raises(EvaluationError, match="Another process is writing"):
            decode(tiny, folder, whole[1])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    survived = answers.read_bytes()
    before = len(Run(folder).answers())
    assert 5 <= before < 24
    run = decode(tiny, folder, whole[1])
    assert contents(run) == contents(Run(whole[0]))
    kept = survived[: survived.rfind(b"\n") + 1]
    assert answers.read_bytes().startswith(kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": Settings(max_new_tokens=13)}, "settings.max_new_tokens=12, not 13"),
        ({"settings": Settings(max_new_tokens=12, seed=1)}, "settings.seed=0, not 1"),
        ({"preferences": ("concise",)}, "preferences.formal.name='formal', not None"),
        ({"methods": (*METHODS, "amulet")}, "methods.amulet.name=None, not 'amulet'"),
        ({"model": "other"}, "model='qwen2', not 'other'"),
    ],
)
def test_other_settings_are_another_run(
    whole: tuple[Path, Path], tiny: Amulet, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        decode(tiny, whole[0], whole[1], **changes)  # type: ignore[arg-type]


def test_other_questions_are_another_run(
    whole: tuple[Path, Path], tmp_path: Path, tiny: Amulet
) -> None:
    other = tmp_path / "small.json"
    other.write_text(json.dumps([{"index": i, "question": "What?"} for i in range(3)]))
    with pytest.raises(EvaluationError, match=r"sets\.small\.digest="):
        decode(tiny, whole[0], other)


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, question_file: Path, tiny: Amulet
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EvaluationError, match=r"contains files, but no run\.json"):
        decode(tiny, tmp_path, question_file)
    with pytest.raises(EvaluationError, match=r"is not a run: it has no run\.json"):
        Run(tmp_path)


def test_a_broken_run_says_where(whole: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text(lines[0] + "{broken}\n" + lines[1])
    with pytest.raises(EvaluationError, match=r"answers\.jsonl, line 2: expected a JSON object"):
        Run(folder).answers()
    (folder / "answers.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(EvaluationError, match=r"answers\.jsonl, line 1: set.*field required"):
        Run(folder).answers()
    (folder / "run.json").write_text('{"format": 2}')
    with pytest.raises(EvaluationError, match="has format 2: this version reads format 1"):
        Run(folder)


def test_scores_are_kept_by_judge_and_survive_a_torn_line(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", Meta(model="m", dtype="float32"))
    assert run.scores("rules") == {}
    assert run.score_names() == []
    run.append_scores("rules", "a", {"adherence": 1.0})
    run.append_scores("rules", "b", {"adherence": 0.0})
    run.append_scores("guards", "a", {"distinct_3": 0.5, "words": 12.0})
    with open(run.folder / "scores" / "rules.jsonl", "a") as file:
        file.write('{"key": "c", "val')
    assert run.scores("rules") == {"a": {"adherence": 1.0}, "b": {"adherence": 0.0}}
    run.append_scores("rules", "c", {"adherence": 1.0})
    assert Run(run.folder).scores("rules")["c"] == {"adherence": 1.0}
    assert run.score_names() == ["guards", "rules"]


def test_an_answers_fields_are_the_formats() -> None:
    assert list(Answer.model_fields) == [
        "key",
        "set",
        "index",
        "question",
        "preference",
        "preference_text",
        "method",
        "strength",
        "floor",
        "placement",
        "focus",
        "loop_guard",
        "adapt",
        "seed",
        "answer",
        "token_ids",
        "finish_reason",
        "changed",
        "log_probability",
        "steered_tokens",
        "seconds",
    ]
