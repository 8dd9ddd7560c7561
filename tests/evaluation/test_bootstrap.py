"""Bootstrap intervals: exact values by hand, and what holds for every data set."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet.errors import EvaluationError
from amulet.evaluation.bootstrap import at_zero, difference, interval
from tests.search import examples

numbers = st.floats(-1e6, 1e6, allow_nan=False)
several = st.lists(numbers, min_size=1, max_size=30)
clusters = st.dictionaries(
    st.integers(0, 20), st.lists(numbers, min_size=1, max_size=4), min_size=1
)


@examples(60)
@given(several, st.floats(0.01, 0.99), st.integers(1, 60))
def test_the_interval_contains_the_mean(values: list[float], level: float, resamples: int) -> None:
    mean, low, high = interval(values, level, resamples)
    assert low <= mean <= high
    assert mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)


@examples(60)
@given(numbers, st.integers(1, 30))
def test_constant_data_has_no_width(value: float, count: int) -> None:
    assert interval([value] * count, resamples=50) == (value, value, value)


@examples(60)
@given(clusters)
def test_the_difference_of_equal_data_is_zero(values: dict[int, list[float]]) -> None:
    assert difference(values, dict(reversed(values.items())), resamples=50) == (0.0, 0.0, 0.0)


@examples(60)
@given(clusters, st.integers(0, 2**32))
def test_equal_seeds_give_equal_intervals_and_the_wider_level_holds_the_narrower(
    values: dict[int, list[float]], seed: int
) -> None:
    wide = interval(values, 0.95, 100, seed)
    assert interval(values, 0.95, 100, seed) == wide
    narrow = interval(values, 0.5, 100, seed)
    assert wide[0] == narrow[0]
    assert wide[1] <= narrow[1] <= narrow[2] <= wide[2]


@examples(40)
@given(several, st.integers(-1000, 1000))
def test_shifted_data_has_a_shifted_interval(values: list[float], shift: int) -> None:
    here = interval(values, resamples=100)
    there = interval([value + shift for value in values], resamples=100)
    assert there == pytest.approx([end + shift for end in here], rel=1e-9, abs=1e-6)


def test_the_interval_is_that_of_all_draws() -> None:
    """Three questions have 27 draws; 50,000 of them have their quantiles."""
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    mean, low, high = interval(values, 0.9, 50_000)
    assert mean == 2.0
    assert low == means[1]  # 1/27 of the draws are below: 5 % falls on the next
    assert high == means[25]


def test_a_question_is_drawn_with_all_its_values() -> None:
    """Two questions of opposite values: a draw is all of one, all of the other, or both."""
    of_questions = interval({"a": [0.0] * 50, "b": [1.0] * 50}, 0.9)
    assert of_questions == (0.5, 0.0, 1.0)
    of_answers = interval([0.0] * 50 + [1.0] * 50, 0.9)
    assert of_answers[0] == 0.5
    assert 0.35 < of_answers[1] < of_answers[2] < 0.65


def test_every_value_counts_alike() -> None:
    assert interval({"a": [0.0, 0.0, 0.0], "b": 4.0})[0] == 1.0
    assert interval({"a": [0.0, 0.0, 0.0], "b": 4.0, "none": []})[0] == 1.0


def test_pairing_takes_out_what_questions_have_in_common() -> None:
    hard_and_easy = [0.0, 10.0, 20.0, 30.0, 40.0]
    better = [value + 1.0 for value in hard_and_easy]
    assert difference(better, hard_and_easy) == (1.0, 1.0, 1.0)
    mapped = difference(
        {str(value): [value, value + 2.0] for value in hard_and_easy},
        {str(value): [value, value] for value in hard_and_easy},
    )
    assert mapped == (1.0, 1.0, 1.0)


def test_many_questions_are_drawn_in_several_steps_and_stay_the_same() -> None:
    values = [float(number % 7) for number in range(2**16)]
    mean, low, high = interval(values, resamples=40)
    assert mean == sum(values) / len(values)
    assert (low, high) == interval(values, resamples=40)[1:]
    assert high - low < 0.1


def test_a_line_takes_out_what_x_explains() -> None:
    exact = {q: [(x, 0.3 + 0.02 * x)] for q, x in enumerate((-10.0, 0.0, 5.0, 20.0))}
    assert at_zero(exact) == pytest.approx((0.3, 0.3, 0.3))
    assert at_zero({"a": [(4.0, 1.0)], "b": [(4.0, 3.0)]})[0] == pytest.approx(2.0)


def test_a_lines_interval_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        points = {}
        for question in range(40):
            own, x = draw.normal(), draw.normal(3.0, 5.0, size=6)  # answers to a question are alike
            y = 0.2 + 0.1 * x + 0.3 * own + draw.normal(0.0, 0.1, size=6)
            points[question] = list(zip(x.tolist(), y.tolist(), strict=True))
        mean, low, high = at_zero(points, resamples=300, seed=seed)
        assert low <= mean <= high
        covered += low <= 0.2 <= high
    assert 88 <= covered <= 99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at_zero({}), "requires points of at least one question"),
        (lambda: at_zero({"q": [(1.0, math.inf)]}), "requires finite points"),
        (lambda: at_zero({"q": [(1.0, 1.0)]}, level=2), "level=2: expected between 0 and 1"),
        (lambda: interval([]), "requires values of at least one question"),
        (lambda: interval({"a": []}), "requires values of at least one question"),
        (lambda: interval([1.0, math.nan]), "requires finite values, and one is nan"),
        (lambda: interval([1.0], level=95), "level=95: expected between 0 and 1"),
        (lambda: interval([1.0], resamples=0), "resamples=0: expected 1 or more"),
        (lambda: difference([1.0], [1.0, 2.0]), "1 values can't be paired with 2"),
        (lambda: difference({"q": [1.0]}, {"q": [1.0, 2.0]}), "for question 'q'"),
        (lambda: difference({"q": 1.0}, {"r": 1.0}), "Question 'q' has values on one side"),
        (lambda: difference({"q": 1.0}, [1.0]), "two sequences or two mappings"),
    ],
)
def test_what_can_not_be_estimated_is_an_error(call: object, message: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        call()  # type: ignore[operator]
    assert message in str(caught.value)
