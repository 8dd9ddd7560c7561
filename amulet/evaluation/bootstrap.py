"""Computes means with bootstrap intervals over questions, and paired differences.

Answers to one question are similar, so whole questions are resampled, not answers. Uses numpy,
which Transformers requires anyway; SciPy's bootstrap does not support clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from amulet.errors import EvaluationError

Values: TypeAlias = "Sequence[float] | Mapping[Any, float | Sequence[float]]"
_Floats: TypeAlias = "npt.NDArray[np.float64]"

_DRAWN_AT_ONCE = 2**20  # indices; bounds the memory whatever the number of questions


def interval(
    values_by_question: Values, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of some values and its percentile interval: `(mean, low, high)`.

    Args:
        values_by_question: one value per question, or a mapping from the question to its value or
            values. Every value counts equally, so a question with more values counts for more.
        level: the interval's probability, between 0 and 1.
        resamples: how often the questions are drawn, with replacement; at least 1.
        seed: the seed of the draws; the same seed gives the same interval.

    With one question, low and high are the mean, which says nothing about how questions differ.
    With fewer than about twenty, a percentile interval is too narrow.

    Raises:
        EvaluationError: no values, a value that is not finite, or a level or count out of range.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    _check(level, resamples)
    groups = [_array(values) for values in _groups(values_by_question)]
    if not groups:
        raise EvaluationError(
            "An interval requires values of at least one question; none was given."
        )
    smallest = min(float(group.min()) for group in groups)
    # Minus the smallest, so that equal values sum to exactly 0, without rounding errors.
    sums = np.array([((group - smallest).sum(), group.size) for group in groups])  # [questions, 2]
    mean = smallest + float(sums[:, 0].sum() / sums[:, 1].sum())
    drawn = _resample(sums, resamples, seed)
    return _percentiles(mean, smallest + drawn[:, 0] / drawn[:, 1], level)


def difference(
    values: Values,
    others: Values,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the mean of `values − others`, paired by question, and its interval.

    Args:
        values, others: as for `interval`, over the same questions, with equally many values in
            the same order for each.
        level, resamples, seed: as for `interval`.

    Raises:
        EvaluationError: as for `interval`, or the two can't be paired.
    """
    if isinstance(values, Mapping) != isinstance(others, Mapping):
        raise EvaluationError(
            "A paired difference needs two sequences or two mappings by question, not one of each."
        )
    if not (isinstance(values, Mapping) and isinstance(others, Mapping)):
        return interval(_subtract(values, others), level, resamples, seed)
    for name in [*values, *others]:
        if name not in values or name not in others:
            raise EvaluationError(
                f"Question {name!r} has values on one side of the difference only: compare over "
                "the questions that both sides answered."
            )
    by_question = {name: _subtract(values[name], others[name], name) for name in values}
    return interval(by_question, level, resamples, seed)


def at_zero(
    points_by_question: Mapping[Any, Sequence[tuple[float, float]]],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return y at x = 0 on the least-squares line of y on x, and its interval.

    If y is the difference of two answers' scores and x that of their lengths, this is the
    difference in score that length does not explain.

    Args:
        points_by_question: (x, y) of every pair of answers, by question.
        level, resamples, seed: as for `interval`.

    Raises:
        EvaluationError: no points, a point that is not finite, or a level or count out of range.

    >>> round(at_zero({"a": [(0.0, 1.0), (1.0, 3.0)], "b": [(2.0, 5.0)]})[0], 6)
    1.0
    """
    _check(level, resamples)
    groups = [np.asarray(points, dtype=np.float64) for points in points_by_question.values()]
    groups = [group.reshape(-1, 2) for group in groups if group.size]
    if not groups:
        raise EvaluationError("A line requires points of at least one question; none was given.")
    if not all(np.isfinite(group).all() for group in groups):
        raise EvaluationError("A line requires finite points: leave the others out.")
    sums = np.array([_moments(group[:, 0], group[:, 1]) for group in groups])  # [questions, 5]
    mean = float(_intercept(sums.sum(axis=0, keepdims=True))[0])
    return _percentiles(mean, _intercept(_resample(sums, resamples, seed)), level)


def _moments(x: _Floats, y: _Floats) -> list[float]:
    return [float(x.size), *(float(sum_) for sum_ in (x.sum(), y.sum(), x @ x, x @ y))]


def _intercept(sums: _Floats) -> _Floats:
    """Return the intercepts `[draws]` from the sums of 1, x, y, x², xy, `[draws, 5]`."""
    n, x, y, xx, xy = sums.T
    spread = xx / n - (x / n) ** 2
    is_line = spread > 1e-12 * (
        1.0 + xx / n
    )  # otherwise all x are equal, and only the mean is known
    slope = np.where(is_line, (xy / n - x * y / n**2) / np.where(is_line, spread, 1.0), 0.0)
    return np.asarray(y / n - slope * x / n)


def _check(level: float, resamples: int) -> None:
    if not 0.0 < level < 1.0:
        raise EvaluationError(f"level={level!r}: expected between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise EvaluationError(f"resamples={resamples!r}: expected 1 or more.")


def _percentiles(mean: float, drawn: _Floats, level: float) -> tuple[float, float, float]:
    tail = (1.0 - level) / 2.0
    low, high = (float(value) for value in np.quantile(drawn, [tail, 1.0 - tail]))
    # With few resamples or a low level, the mean can be outside the quantiles.
    return mean, min(low, mean), max(high, mean)


def _groups(values: Values) -> list[object]:
    given = list(values.values()) if isinstance(values, Mapping) else list(values)
    return [group for group in given if not (isinstance(group, Sequence) and not group)]


def _array(values: object) -> _Floats:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if not np.isfinite(array).all():
        wrong = array[~np.isfinite(array)][0]
        raise EvaluationError(
            f"An interval requires finite values, and one is {wrong}: leave it out."
        )
    return array


def _subtract(values: object, others: object, name: object = None) -> list[float]:
    left, right = _array(values), _array(others)
    if left.size != right.size:
        where = "" if name is None else f" for question {name!r}"
        raise EvaluationError(
            f"{left.size} values can't be paired with {right.size}{where}: expected equally many "
            "on both sides."
        )
    return [float(value) for value in left - right]


def _resample(sums: _Floats, resamples: int, seed: int) -> _Floats:
    """Return sums over draws of whole questions, `[resamples, k]`, from `[questions, k]`."""
    draw = np.random.default_rng(seed)
    questions = len(sums)
    step = max(1, _DRAWN_AT_ONCE // questions)
    drawn = []
    for start in range(0, resamples, step):
        index = draw.integers(questions, size=(min(step, resamples - start), questions))
        drawn.append(sums[index].sum(axis=1))
    return np.concatenate(drawn)
