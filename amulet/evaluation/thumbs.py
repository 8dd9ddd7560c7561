"""Fits strength and weights to thumbs: pairs of answers of which one was preferred.

The decoder samples from `log π ∝ r + Σ w_i·(p_i − r) + Σ v_i·f·(p_i − u) − c`: p_i, r and u are the
rows' log-probabilities, f is the focus, c the loop guard's cost, and v_i the part of w_i above
strength 0, `v_i = max(w_i, 0)·max(1 − 1/Σ|w|, 0)`. That is the optimal policy for a user whose
reward for a token is all of this except r, so the weights of the reward are the weights to decode
with. An answer's score is the mean of that reward over its tokens, and the probability that answer
a is preferred to b is the logistic function of the difference of their scores (Bradley-Terry).

The exact log π would subtract a normaliser per token that depends on w, which requires whole rows
over the vocabulary for every w. Without it, one forward pass per row is enough for all w. Without
focus, the model is linear in w and the fit is convex; with focus it has a kink at strength 0, so
the fit starts on both sides of it. The mean, not the sum, keeps a long answer from outweighing all
others.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from amulet.decoding.loop_guard import Repeats
from amulet.errors import EvaluationError
from amulet.evaluation.run import read_lines
from amulet.game import game_gain
from amulet.preference import Focus, LoopGuard, Placement, Preference, Steering, describe
from amulet.prompting.chat_template import break_all, encode, token_pattern
from amulet.prompting.tokenizer import own_tokenizer
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet

SPREAD = 5.0  # standard deviation of the prior around the default weight; wide, so that data decide
LARGEST = 1.0 + game_gain()  # the paper's; thumbs that all agree would have no maximum
_FOLDS = 10
_SQLITE = b"SQLite format 3\0"
_RECORDED: dict[str, TypeAdapter[Any]] = {
    "focus": TypeAdapter(Focus),
    "loop_guard": TypeAdapter(LoopGuard),
}
T = TypeVar("T", int, float)


class Thumb(BaseModel):
    """One pair of answers to the same question, and the better one.

    Args:
        messages: the chat; or `question`, its only message.
        preferences: one or more texts, which were active when the answers were shown.
        a, b: the two answers.
        chosen: "a" or "b".
        focus, loop_guard: the settings of the answers; None is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[dict[str, Any], ...] = ()
    question: str = ""
    preferences: tuple[str, ...] = Field(min_length=1)
    a: str
    b: str
    chosen: Literal["a", "b"]
    focus: Focus | None = None
    loop_guard: LoopGuard | None = None

    @field_validator("preferences")
    @classmethod
    def _preferences_differ(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return differing(given)

    @model_validator(mode="after")
    def _one_chat(self) -> Thumb:
        if bool(self.messages) == bool(self.question.strip()):
            raise ValueError("expected either messages or question")
        return self

    @property
    def chat(self) -> tuple[dict[str, Any], ...]:
        """The chat that both answers reply to."""
        return self.messages or ({"role": "user", "content": self.question},)


@dataclass(frozen=True)
class Fit:
    """Weights fitted to thumbs.

    Attributes:
        weights: w_i, one per preference; w = 1 + g for a single one.
        deviations: their standard deviations, from the curvature at the fit.
        agreement: share of thumbs, 0 to 1, that weights fitted to the *other* thumbs predict.
        log_loss: mean of −log P(chosen) under these weights; ln 2 is chance.
    """

    weights: tuple[float, ...]
    deviations: tuple[float, ...]
    agreement: float
    log_loss: float


@dataclass(frozen=True)
class TunedByThumbs:
    """The settings fitted to a user's thumbs.

    Attributes:
        steering: the settings, for every class that takes them. Focus and loop guard are those of
            most thumbs.
        preferences: the texts with their weights, to be used together.
        fit: the weights before bounding, and how well they predict.
        thumbs: the number of thumbs.
    """

    steering: Steering
    preferences: tuple[Preference, ...]
    fit: Fit
    thumbs: int


def differing(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the stripped texts.

    Raises:
        ValueError: one is empty or occurs twice.
    """
    stripped = tuple(text.strip() for text in texts)
    if not all(stripped) or len(set(stripped)) < len(stripped):
        raise ValueError("expected texts that are not empty and differ")
    return stripped


def pairs(rated: Iterable[Mapping[str, Any]]) -> list[Thumb]:
    """Return every pair of a liked and a disliked answer to the same chat.

    Args:
        rated: a server's thumbs of one user: `messages`, `preferences`, `answer`, and `thumb`,
            "up" or "down". Pairs have the same messages and the same preferences. A pair gets
            focus and loop guard from the `settings` of the liked answer, or else of the other.
    """
    groups: dict[str, tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]] = {}
    for one in rated:
        key = json.dumps([one["messages"], sorted(one["preferences"])], sort_keys=True)
        liked, disliked = groups.setdefault(key, ([], []))
        (liked if one["thumb"] == "up" else disliked).append(one)
    return [
        Thumb(
            messages=one["messages"],
            preferences=one["preferences"],
            a=one["answer"],
            b=other["answer"],
            chosen="a",
            **{**_recorded(other), **_recorded(one)},
        )
        for liked, disliked in groups.values()
        for one in liked
        for other in disliked
        if one["answer"] != other["answer"]
    ]


def _recorded(rated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the focus and loop guard among a thumb's settings, as far as they are valid.

    Settings are stored as any client has sent them, and older ones have neither.
    """
    settings = rated.get("settings", {})
    found = {}
    for name, adapter in _RECORDED.items():
        if name in settings:
            with suppress(ValidationError):
                found[name] = adapter.validate_python(settings[name], strict=True)
    return found


def read_thumbs(path: str | os.PathLike[str], user: str | None = None) -> list[Thumb]:
    """Return the thumbs of a JSONL file, or of a server's SQLite file.

    Args:
        path: the file.
        user: the user whose thumbs are read from a server's file; None means all users.

    Raises:
        EvaluationError: there is no such file, it has no thumbs, or a line is not a thumb (says
            which).
    """
    if not Path(path).is_file():
        raise EvaluationError(f"{str(path)!r}: no such file; expected JSON lines of thumbs.")
    with open(path, "rb") as file:
        is_database = file.read(len(_SQLITE)) == _SQLITE
    if is_database:
        return _stored_thumbs(Path(path), user)
    if user is not None:
        raise EvaluationError(
            f"user={user!r}: only a server's SQLite file distinguishes users, and {str(path)!r} is "
            "not one; leave the user out."
        )
    thumbs = []
    for number, record in read_lines(Path(path)):
        try:
            thumbs.append(Thumb.model_validate(record))
        except ValidationError as error:
            raise EvaluationError(
                f"{Path(path).name}, line {number}: {describe(error)} Expected "
                '{"question": ..., "preferences": [...], "a": ..., "b": ..., "chosen": "a"}.'
            ) from None
    if not thumbs:
        raise EvaluationError(f"{str(path)!r} has no thumbs: expected one JSON object per line.")
    return thumbs


def _stored_thumbs(path: Path, user: str | None) -> list[Thumb]:
    """Return the pairs of a file of `amulet.serve.store`; no pair mixes two users."""
    by_user: dict[str, list[dict[str, Any]]] = {}
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            for name, kept in database.execute("SELECT user, thumb FROM thumbs ORDER BY rowid"):
                by_user.setdefault(name, []).append(json.loads(kept))
    except (sqlite3.Error, ValueError) as error:
        raise EvaluationError(
            f"{str(path)!r}: {error}; expected a file of `amulet serve --thumbs`."
        ) from None
    found = [one for name in by_user if user in (None, name) for one in pairs(by_user[name])]
    if not found:
        whose = "" if user is None else f" of the user {user!r}"
        raise EvaluationError(
            f"{str(path)!r} has no pairs{whose}: expected a thumb up on one answer and a thumb "
            "down on another one to the same question."
        )
    return found


def tune_by_thumbs(
    amulet: Amulet,
    thumbs: Sequence[Thumb],
    *,
    placements: Sequence[Placement] | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> TunedByThumbs:
    """Return the steering and the weights of the preferences that explain the thumbs best.

    Args:
        amulet: the model that will answer. Its own steering is the start of the fit, and sets the
            floor, which thumbs can't determine. Focus and loop guard are those of most thumbs; a
            thumb that does not record them counts as one with the model's own.
        thumbs: about 30 are enough for a few preferences.
        placements: the candidates, compared by log-loss on left-out thumbs; None means the
            model's own.
        tell: called with (pairs of answers scored, pairs in all).

    Raises:
        EvaluationError: there are no thumbs.
    """
    if not thumbs:
        raise EvaluationError("No thumbs: expected at least one pair of answers.")
    names = tuple(dict.fromkeys(text for thumb in thumbs for text in thumb.preferences))
    places = tuple(placements or (amulet.steering.placement,))
    prior = (1.0 + amulet.steering.strength) / len(names)
    focus = _usual([thumb.focus for thumb in thumbs], amulet.steering.focus)
    guard = _usual([thumb.loop_guard for thumb in thumbs], amulet.steering.loop_guard)
    fits: dict[Placement, Fit] = {}
    for index, placement in enumerate(places):
        rows = []
        for number, thumb in enumerate(thumbs, 1):
            rows.append(_difference(amulet, thumb, names, placement, focus, guard))
            if tell is not None:
                tell(index * len(thumbs) + number, len(places) * len(thumbs))
        fits[placement] = fit_weights(Differences(*map(_stack, zip(*rows, strict=True))), prior)
    placement = min(places, key=lambda place: fits[place].log_loss)
    strength, preferences = _as_steering(names, fits[placement].weights)
    update = {"strength": strength, "placement": placement, "focus": focus, "loop_guard": guard}
    steering = amulet.steering.model_copy(update=update)
    return TunedByThumbs(steering, preferences, fits[placement], len(thumbs))


def _usual(recorded: Sequence[T | None], own: T) -> T:
    """Return the value that most thumbs were given with; those that don't say count as `own`."""
    return Counter(own if value is None else value for value in recorded).most_common(1)[0][0]


def _stack(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Differences:
    """How the chosen answers of thumbs differ from the others, in nats per token, float64.

    Attributes:
        preferred: of log p_i − log r, `[thumbs, preferences]`; 0 where one was not in force.
        focused: of f·(log p_i − log u), likewise; 0 without focus.
        guard: of −c, what the loop guard adds to the score, `[thumbs]`.
    """

    preferred: torch.Tensor
    focused: torch.Tensor
    guard: torch.Tensor

    def of(self, which: torch.Tensor) -> Differences:
        """Return those of some thumbs, by a mask."""
        return Differences(self.preferred[which], self.focused[which], self.guard[which])

    def margins(self, weights: torch.Tensor) -> torch.Tensor:
        """Return by how much the score of each thumb's chosen answer is above the other's."""
        over = 1 - 1 / weights.abs().sum().clamp(min=1.0)  # the share of the push over strength 0
        focused = self.focused @ (weights.clamp(min=0.0) * over)
        return self.preferred @ weights + focused + self.guard


def fit_weights(differences: Differences, prior: float, spread: float = SPREAD) -> Fit:
    """Fit weights by logistic regression without intercept, with a normal prior.

    Args:
        differences: of the scores' parts.
        prior: the weight of each preference without data.
        spread: standard deviation of the prior.
    """
    count = len(differences.guard)
    centre = torch.full((differences.preferred.shape[1],), prior, dtype=torch.float64)
    starts = [centre]
    if differences.focused.any():  # strengths below 0, too: focus makes a kink between them
        starts.append(torch.full_like(centre, 0.5 / len(centre)))
    weights = _most_likely(differences, centre, spread, starts)
    chance = torch.sigmoid(differences.margins(weights))
    slopes = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
        differences.margins, weights
    )
    precision = torch.eye(len(weights), dtype=weights.dtype) / spread**2
    curvature = (slopes * (chance * (1 - chance)).unsqueeze(1)).T @ slopes + precision
    margins = torch.zeros(count, dtype=weights.dtype)
    folds = torch.arange(count) % min(count, _FOLDS)
    for fold in range(min(count, _FOLDS)):
        held_out = folds == fold
        others = _most_likely(differences.of(~held_out), centre, spread, [weights])
        margins[held_out] = differences.of(held_out).margins(others)
    return Fit(
        weights=tuple(weights.tolist()),
        deviations=tuple(torch.linalg.inv(curvature).diagonal().sqrt().tolist()),
        agreement=float((margins > 0).double().mean()),
        log_loss=float(torch.nn.functional.softplus(-margins).mean()),
    )


def _most_likely(
    differences: Differences, centre: torch.Tensor, spread: float, starts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the weights with the highest posterior that is found from some weights."""

    def misfit(weights: torch.Tensor) -> torch.Tensor:
        misses = torch.nn.functional.softplus(-differences.margins(weights)).sum()
        return misses + ((weights - centre) / spread).square().sum() / 2

    def descend(start: torch.Tensor) -> torch.Tensor:
        weights = start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            value = misfit(weights)
            value.backward()  # type: ignore[no-untyped-call]  # torch has no types here
            return value

        with torch.enable_grad():
            optimiser.step(loss)  # type: ignore[no-untyped-call]
        return weights.detach()

    return min(map(descend, starts), key=lambda weights: float(misfit(weights)))


def _difference(
    amulet: Amulet,
    thumb: Thumb,
    names: Sequence[str],
    placement: Placement,
    focus: float,
    loop_guard: int,
) -> tuple[list[float], list[float], float]:
    chosen, other = (thumb.a, thumb.b) if thumb.chosen == "a" else (thumb.b, thumb.a)
    liked = features(amulet, thumb, chosen, placement, focus, loop_guard)
    disliked = features(amulet, thumb, other, placement, focus, loop_guard)

    def by_name(better: Sequence[float], worse: Sequence[float]) -> list[float]:
        known = {name: b - w for name, b, w in zip(thumb.preferences, better, worse, strict=True)}
        return [known.get(name, 0.0) for name in names]

    return (
        by_name(liked.preferred, disliked.preferred),
        by_name(liked.focused, disliked.focused),
        liked.guard - disliked.guard,
    )


@dataclass(frozen=True)
class Features:
    """The parts of an answer's score, means over its tokens in nats; see `Differences`."""

    preferred: list[float]
    focused: list[float]
    guard: float = 0.0


def features(
    amulet: Amulet,
    thumb: Thumb,
    answer: str,
    placement: Placement,
    focus: float = 0.0,
    loop_guard: int = 0,
) -> Features:
    """Return the parts of an answer's score, for each of a thumb's preferences."""
    from amulet.evaluation.scoring import answer_log_probabilities

    tokenizer = own_tokenizer(amulet.tokenizer)
    ids = encode(tokenizer, break_all(answer, token_pattern(tokenizer.all_special_tokens)))
    end = tokenizer.eos_token_id
    if end is not None and end in amulet.end_ids:
        ids = [*ids, end]  # the end belongs to the answer: brevity shows there
    if not ids:
        return Features([0.0] * len(thumb.preferences), [0.0] * len(thumb.preferences))
    request = Request(
        messages=thumb.chat,
        preference=[Preference(text) for text in thumb.preferences],
        placement=placement,
        focus=focus,
    )
    scores = answer_log_probabilities(amulet, request, ids)
    guard = 0.0
    if loop_guard:
        repeats = Repeats(loop_guard)
        costs = [repeats.costs(ids[:place]).get(token, 0.0) for place, token in enumerate(ids)]
        guard = -math.fsum(costs) / len(ids)
    # A template may refuse the preferences alone; then it is decoded without focus, too.
    held = focus if len(scores.rows) > len(scores.preferences) + 1 else 0.0
    return Features(
        (scores.preferred - scores.base).double().mean(dim=-1).tolist(),
        (held * (scores.preferred - scores.alone).double().mean(dim=-1)).tolist(),
        guard,
    )


def _as_steering(
    names: Sequence[str], weights: Sequence[float]
) -> tuple[float, tuple[Preference, ...]]:
    """Return a strength and weighted preferences whose products are the bounded weights."""
    push = math.fsum(map(abs, weights))
    bounded = min(1.0, LARGEST / push) if push else 1.0
    if len(names) == 1:  # the strength is enough, and may steer away
        return round(weights[0] * bounded - 1.0, 4), (Preference(names[0]),)
    preferences = tuple(
        Preference(name, weight=round(weight / push, 4) if push else 0.0)
        for name, weight in zip(names, weights, strict=True)
    )
    return round(push * bounded - 1.0, 4), preferences
