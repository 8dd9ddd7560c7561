"""A run folder: the settings, every answer and every score of an evaluation; crash-safe.

    run.json             what was run: model, settings, questions, preferences, methods, versions
    answers.jsonl        one answer per line, written as soon as it is decoded
        scores/<name>.jsonl  one judge's values for one answer per line
        facts.jsonl          which facts a method got right under a preference, with `--facts`

It contains no paths of the machine, so the folder can be moved. A line is complete once it ends in
a newline; a last line without one (the process was killed) counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amulet.errors import EvaluationError
from amulet.preference import describe

FORMAT = 1

_Record = TypeVar("_Record", bound="BaseModel")


class Answer(BaseModel):
    """One answer of a run, with the settings that it was decoded with.

    Attributes:
        key: "set/index/preference/method", unique in a run.
        strength, floor, placement, adapt: None if the method has none.
        focus, loop_guard: 0 if the method has none.
        seed: the seed, if the answer was sampled.
        token_ids: every decoded id, the end-of-turn id included.
        finish_reason: "stop" or "length".
        changed: share of tokens, 0 to 1, in which steering changed the choice; None if not steered.
        log_probability: mean over its tokens under the plain model, nats; None if unknown.
        steered_tokens: (text, steered minus base log-probability) per token, with a trace.
        seconds: wall time of the answer; answers decoded together share it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    set: str
    index: int | str
    question: str
    preference: str
    preference_text: str
    method: str
    strength: float | None = None
    floor: float | None = None
    placement: str | None = None
    focus: float = 0.0
    loop_guard: int = 0
    adapt: str | None = None
    seed: int = 0
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: str
    changed: float | None = None
    log_probability: float | None = None
    steered_tokens: tuple[tuple[str, float], ...] | None = None
    seconds: float = 0.0


class SetMeta(BaseModel):
    """A question set of a run: its name and the number of questions used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    count: int
    digest: str = ""


class PreferenceMeta(BaseModel):
    """A preference of a run; `rule` names the rule that checks it, if one does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    text: str
    rule: str | None = None


class MethodMeta(BaseModel):
    """A method of a run; absent settings are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    strength: float | None = None
    floor: float | None = None
    placement: str | None = None
    focus: float = 0.0
    loop_guard: int = 0
    adapt: str | None = None


class Meta(BaseModel):
    """The content of `run.json`.

    Attributes:
        model, revision, dtype: the given model, and its commit on the hub, if any; of a GGUF file
            its digest, and architecture, size and quantisation.
        versions, machine: of the session that started the run.
        settings: max_new_tokens, temperature, top_p, seed, system_prompt, as_published, ...
        created: the time of creation, ISO 8601 in UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: str
    revision: str | None = None
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)
    sets: tuple[SetMeta, ...] = ()
    preferences: tuple[PreferenceMeta, ...] = ()
    methods: tuple[MethodMeta, ...] = ()
    created: str = ""


# Fields that may differ between the session that started a run and one that resumes it.
_FREE = ("created", "versions", "machine")


class Run:
    """A run folder, opened for reading and appending; `Run.create` starts or resumes one.

    Args:
        folder: the run's folder.

    Raises:
        EvaluationError: there is no run, or this version can't read it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], meta: Meta) -> Run:
        """Start a run, or resume it.

        Raises:
            EvaluationError: the folder contains a run with other settings (names the first that
                differs), or something else.
        """
        path = Path(folder)
        if not (path / "run.json").exists():
            if path.is_dir() and any(path.iterdir()) and not (path / "run.json.part").exists():
                raise EvaluationError(
                    f"{str(folder)!r} contains files, but no run.json: expected an empty or new "
                    "folder, or that of a run to resume."
                )
            path.mkdir(parents=True, exist_ok=True)
            part = (
                path / "run.json.part"
            )  # a kill while writing must not leave an incomplete run.json
            part.write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
            part.replace(path / "run.json")
            return cls(path)
        run = cls(path)
        _check_same(run.meta, meta, str(folder))
        return run

    def answers(self) -> list[Answer]:
        """Return the answers so far, in the order in which they were stored."""
        return list(_read_lines(self.folder / "answers.jsonl", Answer))

    def append_answer(self, *answers: Answer) -> None:
        """Store answers; they are in the file when this returns."""
        append_lines(
            self.folder / "answers.jsonl", [answer.model_dump(mode="json") for answer in answers]
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing answers to this run; a kill releases the lock.

        Raises:
            EvaluationError: another process has the lock.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise EvaluationError(
                f"Another process is writing to {str(self.folder)!r}: wait for it or end it."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def scores(self, name: str) -> dict[str, dict[str, float]]:
        """Return one judge's values by answer key; empty if it has not judged yet.

        If an answer was judged again, its last line counts.
        """
        lines = _read_lines(self.folder / "scores" / f"{name}.jsonl", _Score)
        return {score.key: score.values for score in lines}

    def append_scores(self, name: str, key: str, values: Mapping[str, float]) -> None:
        """Store one judge's values for one answer."""
        record = {"key": key, "values": dict(values)}
        append_lines(self.folder / "scores" / f"{name}.jsonl", [record])

    def facts(self) -> dict[tuple[str, str], dict[str, bool]]:
        """Return which facts were right, by (method, preference), then by question.

        The preference of the method base is "".
        """
        found: dict[tuple[str, str], dict[str, bool]] = {}
        for line in _read_lines(self.folder / "facts.jsonl", _FactLine):
            found.setdefault((line.method, line.preference), {})[line.fact] = line.right
        return found

    def append_facts(self, fact: str, right: Mapping[tuple[str, str], bool]) -> None:
        """Store whether a fact was right under each (method, preference)."""
        records = [
            {"fact": fact, "method": method, "preference": preference, "right": is_right}
            for (method, preference), is_right in right.items()
        ]
        append_lines(self.folder / "facts.jsonl", records)

    def score_names(self) -> list[str]:
        """Return the names of the judges that have scored answers of this run, sorted."""
        return sorted(path.stem for path in (self.folder / "scores").glob("*.jsonl"))


class _Score(BaseModel):
    key: str
    values: dict[str, float]


class _FactLine(BaseModel):
    fact: str
    method: str
    preference: str
    right: bool


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSONL file in one write, after removing an incomplete last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with open(path, "a+b") as file:
        _take_off_torn_line(file)
        file.write(lines.encode("utf-8", "replace"))


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a JSONL file, if any, without an incomplete last line.

    Raises:
        EvaluationError: a complete line is not a JSON object.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise EvaluationError(
                    f"{path.name}, line {number}: expected a JSON object; delete the line and "
                    "run again to recreate it."
                )
            yield number, record


def _read_lines(path: Path, record_type: type[_Record]) -> Iterator[_Record]:
    for number, record in read_lines(path):
        try:
            yield record_type.model_validate(record)
        except ValidationError as error:
            raise EvaluationError(f"{path.name}, line {number}: {describe(error)}") from None


def _take_off_torn_line(file: Any) -> None:
    """Truncate an open binary file after its last newline, and seek to its end."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    position, rest = end, b""
    while position and b"\n" not in rest:
        step = min(position, 65536)
        position -= step
        file.seek(position)
        rest = file.read(step) + rest
    file.truncate(position + rest.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def _read_meta(folder: Path) -> Meta:
    path = folder / "run.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(
            f"{str(folder)!r} is not a run: it has no run.json. `amulet eval --out "
            "FOLDER` creates one."
        ) from None
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{str(path)!r} can't be read: {error}") from None
    given = data.get("format") if isinstance(data, dict) else None
    if given != FORMAT:
        raise EvaluationError(
            f"{str(path)!r} has format {given!r}: this version reads format {FORMAT}."
        )
    try:
        return Meta.model_validate(data)
    except ValidationError as error:
        raise EvaluationError(f"{str(path)!r}: {describe(error)}") from None


def _check_same(old: Meta, new: Meta, folder: str) -> None:
    """Raise an error that names the first setting in which two runs differ."""
    was, given = (_flat(meta.model_dump(mode="json", exclude=set(_FREE))) for meta in (old, new))
    for name in dict.fromkeys([*was, *given]):
        if was.get(name) != given.get(name):
            raise EvaluationError(
                f"{folder!r} is a run with {name}={was.get(name)!r}, not {given.get(name)!r}: "
                "resume it with the settings it was started with, or give another --out."
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists to one dict with names such as "settings.seed"."""
    if isinstance(value, dict):
        pairs = [(f"{name}.{key}" if name else str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list):
        pairs = [
            (f"{name}.{entry.get('name', i) if isinstance(entry, dict) else i}", entry)
            for i, entry in enumerate(value)
        ]
    else:
        return {name: value}
    return {key: leaf for pair in pairs for key, leaf in _flat(pair[1], pair[0]).items()}
