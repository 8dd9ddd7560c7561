"""Reads question sets from a file, a folder or a data set on the hub, and samples them.

A set is a JSON file with `[{"index": 0, "question": "..."}, ...]`, named after the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from amulet.errors import EvaluationError
from amulet.preference import describe


class Question(BaseModel):
    """One question; `index` is unique in its set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: Annotated[int, Field(strict=True)] | str
    question: Annotated[str, Field(pattern=r"\S")]


@dataclass(frozen=True)
class QuestionSet:
    """A named set of questions."""

    name: str
    questions: tuple[Question, ...]

    @property
    def digest(self) -> str:
        """A short hash of the questions, by which a run recognises them."""
        content = json.dumps([[q.index, q.question] for q in self.questions])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def sample(self, limit: int | None, seed: int = 0) -> QuestionSet:
        """Return `limit` questions drawn by the seed, in their original order.

        A larger limit with the same seed includes the questions of a smaller one. None means all.

        Raises:
            EvaluationError: the limit is below 1.
        """
        if limit is None or (1 <= len(self.questions) <= limit):
            return self
        if limit < 1:
            raise EvaluationError(f"limit={limit!r}: expected 1 or more questions per set.")
        order = list(range(len(self.questions)))
        random.Random(f"{seed}/{self.name}").shuffle(order)
        return QuestionSet(self.name, tuple(self.questions[i] for i in sorted(order[:limit])))


_QUESTIONS = TypeAdapter(list[Question])


def load_question_sets(
    sources: Iterable[str | os.PathLike[str]], *, limit: int | None = None, seed: int = 0
) -> list[QuestionSet]:
    """Return the question sets of several sources, each sampled separately.

    Args:
        sources: a .json file, a folder of .json files, or a data set's id on the hub
            ("owner/name", whose .json files are downloaded).
        limit, seed: see `QuestionSet.sample`.

    Raises:
        EvaluationError: a source is missing, a file is not a question set, or two sets share a
            name.
    """
    files = [file for source in sources for file in _files(source)]
    sets = [_read(file).sample(limit, seed) for file in files]
    if not sets:
        raise EvaluationError("No questions: expected at least one file, folder or hub id.")
    names = [questions.name for questions in sets]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(
                f"Two question sets are called {name!r}: answers are identified by the file's "
                "name, so rename one of the files."
            )
    return sets


def _files(source: str | os.PathLike[str]) -> Sequence[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else _download(source)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise EvaluationError(
            f"{str(source)!r} contains no .json file: expected files of "
            '[{"index": 0, "question": "..."}, ...].'
        )
    return files


def _download(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a data set's .json files in the hub's cache."""
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".json", "/")):
        raise EvaluationError(
            f"No questions at {name!r}: expected a .json file, a folder of them, or a data set's "
            'id on the hub such as "owner/name".'
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.json"))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise EvaluationError(
            f"{name!r} is neither a local file or folder nor a data set that the hub returned: "
            f"{reason} Give the path of its .json files instead."
        ) from error


def _read(path: Path) -> QuestionSet:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path.name} is not a JSON file: {error}") from None
    try:
        questions = _QUESTIONS.validate_python(data)
    except ValidationError as error:
        findings = describe(error)
        raise EvaluationError(
            f'{path.name}: {findings[:300]} Expected [{{"index": 0, "question": "..."}}, ...].'
        ) from None
    if not questions:
        raise EvaluationError(f"{path.name} is empty: expected at least one question.")
    seen: set[str] = set()
    for question in questions:
        if str(question.index) in seen:
            raise EvaluationError(
                f"{path.name}: index {question.index!r} occurs twice; answers are identified by "
                "their index, so it must be unique."
            )
        seen.add(str(question.index))
    return QuestionSet(path.stem, tuple(questions))
