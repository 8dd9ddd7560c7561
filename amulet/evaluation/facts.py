"""Measures whether steering makes a model prefer false answers, by multiple-choice facts.

The model does not see the options: each is scored as if it were the answer. There is no
plausibility floor, because all four may be below it if the preference requests another form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from amulet.errors import EvaluationError, shown
from amulet.evaluation.jobs import messages_of
from amulet.evaluation.methods import Method, parse_method
from amulet.evaluation.pairs import combine_of
from amulet.evaluation.paper import parts_of
from amulet.evaluation.run import Run
from amulet.evaluation.scoring import Scores, rows_of, score_continuations
from amulet.preference import Steering
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet
    from amulet.preference import Placement

# Their base row has another prompt, which is not supported here.
LEFT_OUT = ("opposite", "default-system")


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
    """Return whether the right option of each fact is the likeliest, by mean per token.

    Args:
        amulet: the model.
        preference: the preference; None is the plain model.
        steering: the settings, of which floor and loop guard are ignored; None is the model's own.
        given: the facts; None is `facts()`.
        tell: called with (facts scored, facts in all).

    Raises:
        EvaluationError: the settings are not a `Steering`.
    """
    steering = amulet.steering if steering is None else steering
    if not isinstance(steering, Steering):
        raise EvaluationError(f"steering={shown(steering)}: expected Steering(strength=0.5).")
    given = facts() if given is None else given
    wish = None if preference is None else (preference,)
    asked = _Asked(wish, steering.placement, bool(steering.focus))
    right = []
    for count, fact in enumerate(given, 1):
        options = _options(amulet, fact, asked, "", {})
        right.append(
            _is_right(
                float(
                    (
                        scores.base
                        if preference is None
                        else scores.steered(steering.strength, focus=steering.focus)
                    ).mean()
                )
                for scores in options
            )
        )
        if tell is not None:
            tell(count, len(given))
    return right


def score_facts(
    run: Run,
    amulet: Amulet,
    tell: Callable[[int, int], None] | None = None,
    given: Sequence[Fact] | None = None,
) -> None:
    """Ask the facts that are missing in a run, under every method and preference.

    Methods whose base row has another prompt (`LEFT_OUT`) are skipped. Beam search counts as the
    prompt alone, which it follows.

    Args:
        run: the results are written next to its answers.
        amulet: the model that answered.
        tell: called with (facts asked, facts in all).
        given: facts; None is `facts()`.
    """
    given = facts() if given is None else given
    prompt = str(run.meta.settings.get("system_prompt", ""))
    wanted = list(_wanted(run))
    found = run.facts()
    for count, fact in enumerate(given):
        if tell is not None:
            tell(count, len(given))
        left = [one for one in wanted if fact.question not in found.get(one.key, {})]
        known: dict[tuple[int, ...], list[torch.Tensor]] = {}  # many base rows are the same
        options = {one.asked: _options(amulet, fact, one.asked, prompt, known) for one in left}
        right = {
            one.key: _is_right(_likelihood(scores, one.method) for scores in options[one.asked])
            for one in left
        }
        run.append_facts(fact.question, right)
    if tell is not None:
        tell(len(given), len(given))


@dataclass(frozen=True)
class _Asked:
    """The settings under which a fact is asked; None for preferences is the plain model."""

    preferences: tuple[str, ...] | None
    placement: Placement
    has_focus: bool = False


@dataclass(frozen=True)
class _Wanted:
    """A method and preference of a run; `key` names both, with "" for no preference."""

    key: tuple[str, str]
    asked: _Asked
    method: Method


def _wanted(run: Run) -> Iterator[_Wanted]:
    for method in (parse_method(meta.name) for meta in run.meta.methods):
        if method.adapt in LEFT_OUT:
            continue
        if method.strength is None:
            yield _Wanted((method.name, ""), _Asked(None, "system"), method)
            continue
        for preference in run.meta.preferences:
            parts = parts_of(preference) if method.adapt == "separate" else [preference]
            texts = tuple(part.text for part in parts)
            asked = _Asked(texts, method.placement or "system", bool(method.focus))
            yield _Wanted((method.name, preference.name), asked, method)


def _is_right(means: Iterable[float]) -> bool:
    """Return whether the first is the largest; a tie counts as wrong."""
    first, *others = means
    return first > max(others)


def _likelihood(scores: Scores, method: Method) -> float:
    """Return the mean log-probability of an option's tokens under a method."""
    if method.strength is None:
        return float(scores.base.mean())
    if not method.in_pairs:
        return float(scores.steered(method.strength, focus=method.focus).mean())
    combine = combine_of(method)
    preferred, base = scores.rows[0], scores.rows[-1]  # [T, vocab]
    steps = [
        combine(preferred[step : step + 1], base[step : step + 1], step)
        for step in range(len(preferred))
    ]
    logs = torch.cat(steps).log_softmax(dim=-1)
    return float(logs.gather(-1, scores.token_ids[:, None]).mean())


def _options(
    amulet: Amulet,
    fact: Fact,
    asked: _Asked,
    system_prompt: str,
    known: dict[tuple[int, ...], list[torch.Tensor]],
) -> list[Scores]:
    """Return the rows' scores of each option as the answer; `known` caches rows by prompt."""
    request = Request(
        messages=messages_of(fact.question, system_prompt),
        preference=None if asked.preferences is None else list(asked.preferences),
        placement=asked.placement,
        focus=float(asked.has_focus),
    )
    # As the start of an answer, without an end token, because the sentence may continue.
    texts = [option[:1].upper() + option[1:] for option in fact.options]
    answers = [amulet.encode(text) for text in texts]
    prompts, preferences = rows_of(amulet, request)
    for prompt in map(tuple, prompts):
        if prompt not in known:
            known[prompt] = score_continuations(amulet, prompt, answers)
    found = []
    for i, answer in enumerate(answers):
        rows = torch.stack([known[tuple(prompt)][i] for prompt in prompts])
        found.append(Scores(torch.tensor(answer, device=rows.device), rows, preferences))
    return found
