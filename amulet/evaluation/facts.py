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

from amulet.evaluation.scoring import Scores, score_answers
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet, Steering
    from amulet.preference import Placement

OPTIONS = 4


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
    items = [
        item for fact in given for item in _asked(amulet, fact, preference, steering.placement)
    ]

    def likelihood(scores: Scores) -> float:
        # Of the mean, as options differ in length.
        tokens = scores.base if preference is None else scores.steered(steering.strength)
        return float(tokens.mean())

    def tell_facts(done: int, total: int) -> None:
        if tell is not None:
            tell(done // OPTIONS, total // OPTIONS)

    means = score_answers(amulet, items, likelihood, tell_facts)
    each = [means[first : first + OPTIONS] for first in range(0, len(means), OPTIONS)]
    return [first > max(others) for first, *others in each]  # a tie is no answer


def _asked(
    amulet: Amulet, fact: Fact, preference: str | None, placement: Placement
) -> Iterator[tuple[Request, list[int]]]:
    """Yield the question with each option as its answer."""
    request = Request(
        messages=[{"role": "user", "content": fact.question}],
        preference=preference,
        placement=placement,
    )
    for option in fact.options:
        # As an answer would begin; what ends it is left out, as a sentence may go on.
        text = option[:1].upper() + option[1:]
        yield request, amulet.tokenizer.encode(text, add_special_tokens=False)
