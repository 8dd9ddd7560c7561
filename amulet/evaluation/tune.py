"""Searches the best settings for a model and preferences, within quality guards.

Successive halving: every setting answers a few questions, and the better half continues with twice
as many, until three or fewer have answered all. A setting that exceeds the guards ranks below every
setting that doesn't, however well it follows the preference.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amulet.errors import EvaluationError, shown
from amulet.evaluation.guards import distinct_3
from amulet.preference import Placement, Steering
from amulet.reply import Reply
from amulet.request import Request

if TYPE_CHECKING:
    from amulet import Amulet

STRENGTHS = (0.5, 1.0, 2.0, 4.6487)  # the default first, the paper's last
FLOORS = (0.03, 0.1, 0.3)
PLACEMENTS: tuple[Placement, ...] = ("system", "user")
_FINALISTS = 3


@dataclass(frozen=True)
class Case:
    """An answer to score, with its question and preference."""

    question: str
    preference: str
    answer: str


Score = Callable[[Sequence[Case]], Sequence[float]]
"""A judge: a number per case, higher is better; a rule gives 0 or 1, a model any number."""


@dataclass(frozen=True)
class Guards:
    """Limits of the loss of text quality against the preference in the prompt alone.

    Attributes:
        log_probability: loss in mean log-probability of the answer's tokens under the plain model,
            in nats per token, 0 or more.
        distinct_3: loss in the share of runs of three words that are not repeats, 0 to 1.
    """

    log_probability: float = 0.3
    distinct_3: float = 0.05


@dataclass(frozen=True)
class Trial:
    """The results of one setting.

    Attributes:
        steering: the setting; strength 0 is the preference in the prompt alone.
        answers: number of answers that the means cover.
        score: mean score of the judge.
        log_probability_fall, distinct_3_fall: loss against the prompt alone on the same questions.
        holds: whether both losses are within the guards.
    """

    steering: Steering
    answers: int
    score: float
    log_probability_fall: float = 0.0
    distinct_3_fall: float = 0.0
    holds: bool = True


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        steering: the best setting within the guards; strength 0 if none beats the prompt alone.
        prompt_only: the results of the preference in the prompt alone, on all questions.
        trials: all settings tried, the finalists first, each group best first.
    """

    steering: Steering
    prompt_only: Trial
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class _Outcome:
    score: float
    log_probability: float
    distinct_3: float


@dataclass
class _Search:
    """Decodes and scores; keeps outcomes, so that no setting answers a question twice."""

    amulet: Amulet
    cases: Sequence[tuple[str, str]]  # question and preference
    score: Score
    system_prompt: str
    max_new_tokens: int
    batch_size: int
    tell: Callable[[int, int], None] | None
    total: int
    done: int = 0
    outcomes: dict[Steering, list[_Outcome]] = field(default_factory=dict)

    def extend(self, steerings: Sequence[Steering], count: int) -> None:
        """Answer the first `count` cases with each setting, except those already answered."""
        jobs = [
            (steering, case)
            for steering in steerings
            for case in self.cases[len(self.outcomes.setdefault(steering, [])) : count]
        ]
        for start in range(0, len(jobs), self.batch_size):
            part = jobs[start : start + self.batch_size]
            replies = self.amulet.batch([self._request(*job) for job in part])
            answered = [reply for reply in replies if isinstance(reply, Reply)]
            numbers = self.score(
                [
                    Case(question, preference, reply.text)
                    for (_, (question, preference)), reply in zip(part, answered, strict=True)
                ]
            )
            if len(numbers) != len(part):
                raise EvaluationError(
                    f"The judge returned {len(numbers)} numbers for {len(part)} answers: expected "
                    "one for each."
                )
            for (steering, _), reply, number in zip(part, answered, numbers, strict=True):
                self.outcomes[steering].append(_outcome(reply, float(number)))
            self.done += len(part)
            if self.tell is not None:
                self.tell(self.done, self.total)

    def _request(self, steering: Steering, case: tuple[str, str]) -> Request:
        question, preference = case
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return Request(
            messages=(*system, {"role": "user", "content": question}),
            preference=preference,
            **steering.model_dump(),
            max_new_tokens=self.max_new_tokens,
            trace=True,  # has each token's log-probability under the plain model
        )


def tune(
    amulet: Amulet,
    questions: Sequence[str],
    preferences: Sequence[str],
    score: Score,
    *,
    strengths: Sequence[float] = STRENGTHS,
    floors: Sequence[float] = FLOORS,
    placements: Sequence[Placement] = PLACEMENTS,
    focuses: Sequence[float] | None = None,
    loop_guards: Sequence[int] | None = None,
    guards: Guards | None = None,
    system_prompt: str = "",
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Search the grid for the setting with the best score within quality guards.

    Args:
        amulet: the model.
        questions: asked with each preference; 30 or more are needed to distinguish settings.
        preferences: texts, used one at a time.
        score: the judge, such as a rule's check or a reward model.
        strengths, floors, placements, focuses, loop_guards: the grid. None for the last two means
            the model's own focus and loop guard.
        guards: limits of the quality loss; None is `Guards()`. While few questions are answered, a
            setting passes if it exceeds a limit by no more than a standard error.
        system_prompt: the system message of every question; "" is none.
        max_new_tokens: limit per answer.
        batch_size: answers decoded at once.
        seed: for the order of the questions; answers are greedy.
        tell: called with (answers decoded, answers in all).

    Raises:
        EvaluationError: there is no question, preference or setting to try, or an argument is not
            of its type.
        RequestError: a value of the grid is out of range.
    """
    for name, given in (("questions", questions), ("preferences", preferences)):
        if not _is_list(given) or not all(isinstance(text, str) for text in given):
            raise EvaluationError(f"{name}={shown(given)}: expected a list of texts.")
    if not callable(score):
        raise EvaluationError(
            f"score={shown(score)}: expected a function of a list of cases that returns a number "
            "for each."
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise EvaluationError(
            f"batch_size={shown(batch_size)}: expected a whole number, 1 or more."
        )
    guards = Guards() if guards is None else guards
    if not isinstance(guards, Guards):
        raise EvaluationError(f"guards={shown(guards)}: expected Guards(log_probability=0.3).")
    own = amulet.steering
    focuses = (own.focus,) if focuses is None else focuses
    loop_guards = (own.loop_guard,) if loop_guards is None else loop_guards
    for name, values in (
        *(("strengths", strengths), ("floors", floors), ("placements", placements)),
        *(("focuses", focuses), ("loop_guards", loop_guards)),
    ):
        if not _is_list(values):
            raise EvaluationError(f"{name}={shown(values)}: expected a list of values to try.")
    alive = [
        Steering(**dict(zip(Steering.model_fields, setting, strict=True)))
        for setting in itertools.product(strengths, floors, placements, focuses, loop_guards)
    ]
    counts = {"questions": len(questions), "preferences": len(preferences), "settings": len(alive)}
    for name, count in counts.items():
        if not count:
            raise EvaluationError(f"No {name}: expected at least one.")
    asked = random.Random(seed).sample(list(questions), len(questions))
    cases = [(question, preference) for question in asked for preference in preferences]
    prompt_only = Steering(strength=0.0, floor=0.0, placement=own.placement)
    rungs = _rungs(len(alive), len(asked))
    search = _Search(
        amulet,
        cases,
        score,
        system_prompt,
        max_new_tokens,
        batch_size,
        tell,
        total=len(preferences) * (len(asked) + _answers(rungs)),
    )
    out: list[Trial] = []
    for rung, (settings, count) in enumerate(rungs):
        is_last = rung == len(rungs) - 1
        search.extend([prompt_only, *alive], count * len(preferences))
        trials = sorted(
            (_trial(search, setting, prompt_only, guards, is_last) for setting in alive),
            key=lambda trial: _rank(trial, guards),
        )
        keep = len(trials) if is_last else rungs[rung + 1][0]
        assert len(alive) == settings
        out = [*trials[keep:], *out]
        alive = [trial.steering for trial in trials[:keep]]
    reference = _trial(search, prompt_only, prompt_only, guards, True)
    best = trials[0]
    chosen = best if best.holds and best.score > reference.score else reference
    return Tuned(chosen.steering, reference, (*trials, *out))


def _is_list(given: object) -> bool:
    return isinstance(given, Collection) and not isinstance(given, str | bytes | Mapping)


def _rungs(settings: int, questions: int) -> list[tuple[int, int]]:
    """Return (remaining settings, questions) of each rung, the last with all questions."""
    alive = [settings]
    while alive[-1] > _FINALISTS:
        alive.append(math.ceil(alive[-1] / 2))
    last = len(alive) - 1
    return [
        (count, max(1, math.ceil(questions / 2 ** (last - rung))))
        for rung, count in enumerate(alive)
    ]


def _answers(rungs: Sequence[tuple[int, int]]) -> int:
    """Return the total number of answers over all rungs."""
    before = [0, *(questions for _, questions in rungs)]
    return sum(alive * (now - then) for (alive, now), then in zip(rungs, before, strict=False))


def _outcome(reply: Reply, score: float) -> _Outcome:
    base = [token.base for token in reply.trace or ()]
    return _Outcome(
        score=score,
        log_probability=math.fsum(base) / len(base) if base else 0.0,
        distinct_3=distinct_3(reply.text),
    )


def _trial(
    search: _Search, setting: Steering, prompt_only: Steering, guards: Guards, is_last: bool
) -> Trial:
    own = search.outcomes[setting]
    reference = search.outcomes[prompt_only][: len(own)]
    pairs = list(zip(reference, own, strict=True))
    falls = {
        "log_probability": [
            before.log_probability - after.log_probability for before, after in pairs
        ],
        "distinct_3": [before.distinct_3 - after.distinct_3 for before, after in pairs],
    }
    return Trial(
        steering=setting,
        answers=len(own),
        score=math.fsum(outcome.score for outcome in own) / len(own),
        log_probability_fall=_mean(falls["log_probability"]),
        distinct_3_fall=_mean(falls["distinct_3"]),
        holds=all(
            _mean(values) - (0.0 if is_last else _standard_error(values)) <= getattr(guards, name)
            for name, values in falls.items()
        ),
    )


def _rank(trial: Trial, guards: Guards) -> tuple[bool, float, float]:
    """Return a sort key: settings within the guards by score, then the others by their excess."""
    if trial.holds:
        return False, -trial.score, trial.log_probability_fall
    excess = max(
        trial.log_probability_fall - guards.log_probability,
        trial.distinct_3_fall - guards.distinct_3,
    )
    return True, excess, -trial.score


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    mean = _mean(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
