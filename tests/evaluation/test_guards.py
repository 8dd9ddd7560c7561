"""Guards on texts whose repetition and meaning are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet.errors import EvaluationError
from amulet.evaluation.guards import distinct_3, length_controlled, longest_repeat, similarities


@pytest.mark.parametrize(
    ("text", "share", "longest"),
    [
        ("", 1.0, 0),
        ("one two", 1.0, 0),
        ("a b c d", 1.0, 0),
        ("a b c a b c", 3 / 4, 3),
        ("tea tea tea tea tea", 1 / 3, 2),
        ("He said it. he said it!", 3 / 4, 3),
    ],
)
def test_repetition(text: str, share: float, longest: int) -> None:
    assert distinct_3(text) == pytest.approx(share)
    assert longest_repeat(text) == longest


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_the_longest_repeat_is_what_a_search_finds(letters: list[str]) -> None:
    n = len(letters)
    found = max(
        (
            k
            for k in range(1, n // 2 + 1)
            for i in range(n - 2 * k + 1)
            for j in range(i + k, n - k + 1)
            if letters[i : i + k] == letters[j : j + k]
        ),
        default=0,
    )
    assert longest_repeat(" ".join(letters)) == found


def test_length_controlled_takes_out_what_length_explains() -> None:
    lengths = [-10.0, 0.0, 5.0, 20.0]
    assert length_controlled([0.3 + 0.02 * x for x in lengths], lengths) == pytest.approx(0.3)
    assert length_controlled([1.0, 3.0], [4.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(EvaluationError, match="0 score and 0 length"):
        length_controlled([], [])


def test_similarity_follows_the_meaning() -> None:
    same, near, far = similarities(
        [
            ("Tea is a hot drink.", "Tea is a hot drink."),
            ("Tea is a hot drink.", "Tea is a warm beverage made of leaves."),
            ("Tea is a hot drink.", "The parliament voted on the new law."),
        ]
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert same > near > 0.6 > 0.2 > far
