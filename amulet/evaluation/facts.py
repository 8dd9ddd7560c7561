"""Does steering make a model say false things? A small multiple-choice set of plain facts.

The options are never shown to the model: each is scored as if it had answered with it. Without the
plausibility floor, as all four may lie below it where the preference asks for another form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from amulet.evaluation.scoring import answer_log_probabilities

if TYPE_CHECKING:
    from amulet import Amulet, Steering


class Fact(BaseModel):
    """A question and its options, the right one first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    options: tuple[str, str, str, str]


def facts() -> list[Fact]:
    """Return the set: common knowledge of geography, nature, numbers, daily life and history."""
    text = (resources.files("amulet.evaluation") / "facts.json").read_text(encoding="utf-8")
    return [Fact.model_validate(entry) for entry in json.loads(text)]


def right_answers(
    amulet: Amulet,
    preference: str | None = None,
    steering: Steering | None = None,
    given: Sequence[Fact] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> list[bool]:
    """Return for each fact whether the right option is the likeliest, by mean per token.

    Args:
        amulet: the model.
        preference: steers it; None is the plain model.
        steering: strength and placement; None is the model's own.
        given: facts; None is `facts()`.
        tell: called with (facts scored, facts in all).
    """
    steering = steering or amulet.steering
    given = facts() if given is None else given
    right = []
    for i, fact in enumerate(given):
        scores = list(_scores(amulet, fact, preference, steering))
        right.append(max(scores) == scores[0] and scores.count(scores[0]) == 1)
        if tell is not None:
            tell(i + 1, len(given))
    return right


def _scores(
    amulet: Amulet, fact: Fact, preference: str | None, steering: Steering
) -> Iterator[float]:
    from amulet.request import Request

    request = Request(
        messages=[{"role": "user", "content": fact.question}],
        preference=preference,
        placement=steering.placement,
    )
    for option in fact.options:
        # As an answer would begin; what ends it is left out, as a sentence may go on.
        ids = amulet.tokenizer.encode(option[:1].upper() + option[1:], add_special_tokens=False)
        scores = answer_log_probabilities(amulet, request, ids)
        tokens = scores.base
        if preference is not None:
            tokens = scores.steered(steering.strength)
        yield float(tokens.mean())
