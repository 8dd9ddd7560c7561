"""Question sets: where they come from, what is refused, and what a limit takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amulet.errors import EvaluationError
from amulet.evaluation.questions import Question, QuestionSet, load_question_sets
from tests.evaluation.conftest import QUESTIONS


def test_a_file_is_a_set_named_like_it(question_file: Path) -> None:
    (questions,) = load_question_sets([question_file])
    assert questions.name == "small"
    assert [(q.index, q.question) for q in questions.questions] == list(enumerate(QUESTIONS))


def test_a_folder_gives_a_set_per_file_in_order_of_name(question_file: Path) -> None:
    other = question_file.with_name("a.json")
    other.write_text('[{"index": "x1", "question": "Where?"}]', encoding="utf-8")
    (question_file.parent / "notes.txt").write_text("not a set", encoding="utf-8")
    sets = load_question_sets([str(question_file.parent)])
    assert [(s.name, len(s.questions)) for s in sets] == [("a", 1), ("small", 3)]
    assert sets[0].questions[0].index == "x1"


def many(count: int) -> QuestionSet:
    return QuestionSet("many", tuple(Question(index=i, question=f"{i}?") for i in range(count)))


def test_a_limit_draws_by_seed_and_keeps_the_order() -> None:
    questions = many(100)
    drawn = [q.index for q in questions.sample(5, seed=0).questions]
    assert drawn == sorted(drawn)
    assert drawn == [q.index for q in questions.sample(5, seed=0).questions]
    assert drawn != [q.index for q in questions.sample(5, seed=1).questions]
    assert set(drawn) < {q.index for q in questions.sample(20, seed=0).questions}
    assert questions.sample(100) is questions
    assert questions.sample(None) is questions


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(EvaluationError, match="limit=0: expected 1 or more"):
        many(3).sample(0)


def test_the_digest_tells_other_questions() -> None:
    assert many(3).digest == many(3).digest
    assert many(3).digest != many(4).digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "bad.json is not a JSON file"),
        ('{"index": 0, "question": "?"}', "bad.json: .*input should be a valid list"),
        ("[]", "bad.json is empty"),
        ('[{"index": 0}]', r"bad.json: 0.question.*field required"),
        ('[{"index": 0, "question": " "}]', "0.question=' '"),
        ('[{"index": 0, "question": "?", "answer": 1}]', "0.answer: unknown option"),
        ('[{"index": 0, "question": "a"}, {"index": "0", "question": "b"}]', "'0' occurs twice"),
    ],
)
def test_what_is_no_question_set_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        load_question_sets([path])


def test_two_sets_of_one_name_are_refused(question_file: Path) -> None:
    with pytest.raises(EvaluationError, match="Two question sets are called 'small'"):
        load_question_sets([question_file, question_file])


def test_a_folder_without_files_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"contains no \.json file"):
        load_question_sets([tmp_path])
    with pytest.raises(EvaluationError, match=r"No questions at '.*missing\.json'"):
        load_question_sets([tmp_path / "missing.json"])
    with pytest.raises(EvaluationError, match="No questions: expected at least one"):
        load_question_sets([])


def test_a_hub_id_without_a_network_says_what_to_do() -> None:
    with pytest.raises(EvaluationError, match=r"data set that the hub returned: .*Give the path"):
        load_question_sets(["nobody/no-such-questions"])


def test_a_hub_id_is_downloaded(question_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(question_file.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (questions,) = load_question_sets(["somebody/questions"])
    assert json.dumps([q.question for q in questions.questions]) == json.dumps(QUESTIONS)
    assert asked == [("somebody/questions", {"repo_type": "dataset", "allow_patterns": "*.json"})]
