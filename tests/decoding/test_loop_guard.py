"""What an answer repeats of itself costs likelihood, and only that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet.decoding.loop_guard import FIRST, GROWTH, MOST, Repeats, cost_of


def literal(answer: list[int], free: int) -> dict[int, float]:
    """The rule, read off directly: compare the answer's end with every earlier place."""
    costs: dict[int, float] = {}
    for place in range(1, len(answer)):
        length = 0
        while length < place and answer[place - 1 - length] == answer[-1 - length]:
            length += 1
        if length >= free:
            cost = min(FIRST * GROWTH ** min(length - free, 100), MOST)
            costs[answer[place]] = max(cost, costs.get(answer[place], 0.0))
    return costs


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_read_token_by_token_it_is_the_rule(answer: list[int], free: int) -> None:
    repeats = Repeats(free)
    for end in range(len(answer) + 1):
        assert repeats.costs(answer[:end]) == pytest.approx(literal(answer[:end], free))


def test_the_cost_grows_with_the_run() -> None:
    answer, repeats = [1, 2, 3, 4, 5, 6], Repeats(3)
    assert repeats.costs([*answer, 1, 2]) == {}
    assert repeats.costs([*answer, 1, 2, 3]) == {4: 0.8}
    assert repeats.costs([*answer, 1, 2, 3, 4]) == {5: pytest.approx(1.4)}
    assert repeats.costs([*answer, 1, 2, 3, 4, 9]) == {}


def test_a_long_loop_costs_a_finite_number_of_nats() -> None:
    assert Repeats(2).costs([7] * 300) == {7: MOST}


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5), st.integers(0, 20))
def test_what_comes_before_the_start_does_not_count(
    answer: list[int], free: int, start: int
) -> None:
    start = min(start, len(answer))
    found = Repeats(free, start).costs(answer)
    assert found == pytest.approx(literal(answer[start:], free))


@given(st.lists(st.integers(0, 1), max_size=60), st.lists(st.integers(1, 9), max_size=60))
def test_several_tokens_may_come_at_once(answer: list[int], steps: list[int]) -> None:
    repeats, end = Repeats(2), 0
    for step in steps:
        end = min(end + step, len(answer))
        assert repeats.costs(answer[:end]) == Repeats(2).costs(answer[:end])


def test_the_costs_up_to_the_highest() -> None:
    assert [cost_of(over) for over in (0, 1, 2)] == pytest.approx([0.8, 1.4, 2.45])
    assert cost_of(8) < MOST == cost_of(9) == cost_of(1000)
