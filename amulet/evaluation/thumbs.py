"""Fits strength and weights to thumbs: pairs of answers of which one was preferred.

The decoder samples from `π ∝ r·Π (p_i/r)^w_i`. That is the optimal policy for a user whose reward
for a token is `Σ w_i·(log p_i − log r)`, so the weights of the reward are the weights to decode
with. An answer's score is the mean of that reward over its tokens, and the probability that answer
a is preferred to b is the logistic function of the difference of their scores (Bradley-Terry):

    f_i(y) = mean_t (log p_i(y_t) − log r(y_t)),      P(a over b) = σ( Σ w_i·(f_i(a) − f_i(b)) )

The exact log π would subtract a normaliser per token that depends on w, which requires whole rows
over the vocabulary for every w. Without it, the model is linear in w, one forward pass per row is
enough for all w, and the fit is convex. The mean, not the sum, keeps a long answer from outweighing
all others.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from amulet.errors import EvaluationError
from amulet.evaluation.run import read_lines
from amulet.gain import game_gain
from amulet.preference import Placement, Preference, Steering, describe
from amulet.prompting.chat_template import break_all, encode, token_pattern
from amulet.prompting.tokenizer import own_tokenizer
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet

SPREAD = 5.0  # standard deviation of the prior around the default weight; wide, so that data decide
LARGEST = 1.0 + game_gain()  # the paper's; thumbs that all agree would have no maximum
_FOLDS = 10
_SQLITE = b"SQLite format 3\0"


class Thumb(BaseModel):
    """One pair of answers to the same question, and the better one.

    Args:
        messages: the chat; or `question`, its only message.
        preferences: one or more texts, which were active when the answers were shown.
        a, b: the two answers.
        chosen: "a" or "b".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: tuple[dict[str, Any], ...] = ()
    question: str = ""
    preferences: tuple[str, ...] = Field(min_length=1)
    a: str
    b: str
    chosen: Literal["a", "b"]

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
        steering: the settings, for every class that takes them.
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
            "up" or "down". Pairs have the same messages and the same preferences.
    """
    groups: dict[str, tuple[list[Mapping[str, Any]], list[str]]] = {}
    for one in rated:
        key = json.dumps([one["messages"], sorted(one["preferences"])], sort_keys=True)
        liked, disliked = groups.setdefault(key, ([], []))
        if one["thumb"] == "up":
            liked.append(one)
        else:
            disliked.append(one["answer"])
    return [
        Thumb(
            messages=one["messages"],
            preferences=one["preferences"],
            a=one["answer"],
            b=other,
            chosen="a",
        )
        for liked, disliked in groups.values()
        for one in liked
        for other in disliked
        if one["answer"] != other
    ]


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
        amulet: the model that will answer. Its own steering is the start of the fit, and sets floor
                and loop guard, which thumbs can't determine. The fit has no focus.
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
    fits: dict[Placement, Fit] = {}
    for index, placement in enumerate(places):
        rows = []
        for number, thumb in enumerate(thumbs, 1):
            rows.append(_difference(amulet, thumb, names, placement))
            if tell is not None:
                tell(index * len(thumbs) + number, len(places) * len(thumbs))
        fits[placement] = fit_weights(torch.tensor(rows, dtype=torch.float64), prior)
    placement = min(places, key=lambda place: fits[place].log_loss)
    strength, preferences = _as_steering(names, fits[placement].weights)
    # The weights are fitted to p − r only.
    steering = amulet.steering.model_copy(
        update={"strength": strength, "placement": placement, "focus": 0.0}
    )
    return TunedByThumbs(steering, preferences, fits[placement], len(thumbs))


def fit_weights(differences: torch.Tensor, prior: float, spread: float = SPREAD) -> Fit:
    """Fit weights by logistic regression without intercept, with a normal prior.

    Args:
        differences: f(chosen) − f(other), nats per token, `[thumbs, preferences]`, float64; 0
            for a preference that was not active.
            prior: the weight of each preference without data.
        spread: standard deviation of the prior.
    """
    count = len(differences)
    weights = _most_likely(differences, prior, spread)
    chance = torch.sigmoid(differences @ weights)
    precision = torch.eye(len(weights), dtype=differences.dtype) / spread**2
    curvature = (differences * (chance * (1 - chance)).unsqueeze(1)).T @ differences + precision
    margins = torch.zeros(count, dtype=differences.dtype)
    folds = torch.arange(count) % min(count, _FOLDS)
    for fold in range(min(count, _FOLDS)):
        held_out = folds == fold
        others = _most_likely(differences[~held_out], prior, spread)
        margins[held_out] = differences[held_out] @ others
    return Fit(
        weights=tuple(weights.tolist()),
        deviations=tuple(torch.linalg.inv(curvature).diagonal().sqrt().tolist()),
        agreement=float((margins > 0).double().mean()),
        log_loss=float(torch.nn.functional.softplus(-margins).mean()),
    )


def _most_likely(differences: torch.Tensor, prior: float, spread: float) -> torch.Tensor:
    """Return the weights with the highest posterior; the problem is convex."""
    centre = torch.full((differences.shape[1],), prior, dtype=differences.dtype)
    weights = centre.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        misfit = torch.nn.functional.softplus(-(differences @ weights)).sum()
        value = misfit + ((weights - centre) / spread).square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def _difference(
    amulet: Amulet, thumb: Thumb, names: Sequence[str], placement: Placement
) -> list[float]:
    chosen, other = (thumb.a, thumb.b) if thumb.chosen == "a" else (thumb.b, thumb.a)
    liked = features(amulet, thumb, chosen, placement)
    disliked = features(amulet, thumb, other, placement)
    by_name = {
        name: better - worse
        for name, better, worse in zip(thumb.preferences, liked, disliked, strict=True)
    }
    return [by_name.get(name, 0.0) for name in names]


def features(amulet: Amulet, thumb: Thumb, answer: str, placement: Placement) -> list[float]:
    """Return `mean_t (log p_i − log r)` of an answer for each of a thumb's preferences."""
    from amulet.evaluation.scoring import answer_log_probabilities

    tokenizer = own_tokenizer(amulet.tokenizer)
    ids = encode(tokenizer, break_all(answer, token_pattern(tokenizer.all_special_tokens)))
    end = tokenizer.eos_token_id
    if end is not None and end in amulet.end_ids:
        ids = [*ids, end]  # the end belongs to the answer: brevity shows there
    if not ids:
        return [0.0] * len(thumb.preferences)
    request = Request(
        messages=thumb.chat,
        preference=[Preference(text) for text in thumb.preferences],
        placement=placement,
        focus=0.0,
    )
    scores = answer_log_probabilities(amulet, request, ids)
    return [float(mean) for mean in (scores.preferred - scores.base).double().mean(dim=-1)]


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
