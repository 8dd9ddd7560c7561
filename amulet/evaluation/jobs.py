"""The answers that a run needs, as jobs, and the request of each job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amulet.errors import EvaluationError
from amulet.evaluation.methods import Method
from amulet.evaluation.paper import SYSTEM_PROMPT, parts_of
from amulet.evaluation.questions import Question, QuestionSet
from amulet.evaluation.run import PreferenceMeta
from amulet.preference import describe
from amulet.request import Request


class Settings(BaseModel):
    """The settings with which all answers of a run are decoded.

    Attributes:
        max_new_tokens: limit per answer.
        temperature, top_p: the same for every method; 0 is greedy.
        seed: for sampling, and for drawing the questions.
        system_prompt: the system message of every question; "" is none.
        as_published: decode as the paper's authors did: base and pref are sampled with the
            model's own generation config, the others are greedy. (They also truncated what the
            reward model reads to 128 tokens, which the judge does, and took the argmax after
            top-p 0.95, which is the plain argmax. Their unmasked padding is not reproduced.)
        trace: store how much steering raised each token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0)
    system_prompt: str = SYSTEM_PROMPT
    as_published: bool = False
    trace: bool = False

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise EvaluationError(f"settings: {describe(error, type(self).model_fields)}") from None


@dataclass(frozen=True)
class Job:
    """One answer to decode, for the preferences that share it.

    Plain answers don't depend on the preference: one is decoded and stored for all.
    """

    set: str
    question: Question
    preferences: tuple[PreferenceMeta, ...]
    method: Method

    @property
    def keys(self) -> list[str]:
        """The keys of the job's answers."""
        return [
            f"{self.set}/{self.question.index}/{preference.name}/{self.method.name}"
            for preference in self.preferences
        ]


def jobs_of(
    sets: Iterable[QuestionSet],
    preferences: Sequence[PreferenceMeta],
    methods: Sequence[Method],
) -> Iterator[Job]:
    """Yield the answers to decode, question by question."""
    plain = [method for method in methods if method.kind == "base"]
    others = [method for method in methods if method.kind != "base"]
    for questions in sets:
        for question in questions.questions:
            for method in plain:
                yield Job(questions.name, question, tuple(preferences), method)
            for preference in preferences:
                for method in others:
                    yield Job(questions.name, question, (preference,), method)


def request_of(job: Job, settings: Settings, sampling: dict[str, Any] | None = None) -> Request:
    """Return a job's request; `sampling` overrides the settings' decoding options."""
    method = job.method
    options: dict[str, Any] = {
        "messages": messages_of(job.question.question, settings.system_prompt),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        **(sampling or {}),
        "seed": seed_of(job, settings),
        "trace": method.kind == "base",  # for `log_probability`; needs no further row
    }
    if method.steering is not None:
        preference = job.preferences[0]
        apart = method.adapt == "separate"
        options |= {
            "preference": [part.text for part in parts_of(preference)]
            if apart
            else preference.text,
            **method.steering.model_dump(),
            "trace": method.is_steered,  # for `changed`; it would cost pref a second row
        }
    return Request(**options)


def with_every_row(request: Request) -> Request:
    """Return the request with all its rows, whatever its strength."""
    return request.model_copy(update={"strength": 1.0, "trace": True})


def messages_of(question: str, system_prompt: str) -> list[dict[str, str]]:
    """Return the chat that asks a question."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def seed_of(job: Job, settings: Settings) -> int:
    """Return an answer's seed, which depends on the run's seed and the job, not on the order."""
    digest = hashlib.sha256(f"{settings.seed}/{job.keys[0]}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
