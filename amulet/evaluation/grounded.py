"""Measures whether answers contain the requested fact, from passages and from memory.

The passages are invented, so the model can't know them. A fact counts if one of its spellings is in
the answer; most are names and numbers, which are the same in every language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from amulet.evaluation.facts import facts
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet, Steering

SYSTEM_PROMPT = "Answer the question from the text."
# Number words in the facts that may also be written in digits.
DIGITS = {
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "ten": "10",
    "twelve": "12",
    "twenty-four": "24",
    "thirty": "30",
    "sixty": "60",
    "100 degrees": "100",
}


class Asked(BaseModel):
    """A question, the spellings of its answer, and the passage that contains it ("" for none)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    answers: tuple[str, ...]
    passage: str = ""


def passages() -> list[Asked]:
    """Return 100 questions over 25 invented passages."""
    text = (resources.files("amulet.evaluation") / "rag.json").read_text(encoding="utf-8")
    return [
        Asked(question=question, answers=answers, passage=entry["passage"])
        for entry in json.loads(text)
        for question, answers in entry["questions"]
    ]


def memory() -> list[Asked]:
    """Return the facts of `amulet.evaluation.facts` as questions without options."""
    found = []
    for fact in facts():
        answer = re.sub(r"^(?:the|an?) ", "", fact.options[0])
        digits = [DIGITS[answer]] if answer in DIGITS else []
        found.append(Asked(question=fact.question, answers=(answer, *digits)))
    return found


def holds(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text contains one of the answers as whole words or numbers."""
    text = re.sub(r"[*_`]", "", text).lower()
    return any(
        re.search(rf"(?<![a-z0-9]){re.escape(answer.strip().lower())}{_end(answer)}", text)
        for answer in answers
    )


def _end(answer: str) -> str:
    return "(?![0-9])" if answer.strip()[-1].isdigit() else ""  # a word may have an ending


def answered(
    amulet: Amulet,
    given: Sequence[Asked],
    preference: str | None = None,
    steering: Steering | None = None,
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
) -> Iterator[tuple[Asked, str, bool]]:
    """Yield each question, its greedy answer, and whether the answer contains the fact.

    Args:
        amulet: the model.
        given: questions, such as `passages()` or `memory()`.
        preference: the preference; None is the plain model.
        steering: the settings; None is the model's own.
        max_new_tokens: limit per answer.
        batch_size: answers decoded at once.
    """
    options = (steering or amulet.steering).model_dump()
    for first in range(0, len(given), batch_size):
        part = given[first : first + batch_size]
        requests = [
            Request(
                messages=_messages(asked),
                preference=preference,
                max_new_tokens=max_new_tokens,
                **options,
            )
            for asked in part
        ]
        for asked, reply in zip(part, amulet.batch(requests), strict=True):
            if isinstance(reply, Exception):
                raise reply
            yield asked, reply.text, holds(reply.text, asked.answers)


def _messages(asked: Asked) -> list[dict[str, str]]:
    if not asked.passage:
        return [{"role": "user", "content": asked.question}]
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{asked.passage}\n\n{asked.question}"},
    ]
