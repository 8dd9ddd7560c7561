"""What a draft proposes, and when it stops proposing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amulet.decoding.prompt_lookup import NARROW, NGRAM, WIDE, Draft


def test_it_proposes_what_followed_the_same_ngram_last() -> None:
    draft = Draft([1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 6, 7])
    assert draft.propose([1, 2, 3], 10) == [4, 5, 6]
    assert draft.propose([1, 2, 3, 4], 2) == [5, 6]


def test_it_looks_in_the_answer_too() -> None:
    draft = Draft([7])
    assert draft.propose([1, 2, 3, 4, 8, 1, 2], 5) == []
    assert draft.propose([1, 2, 3, 4, 8, 1, 2, 3], 5) == [4, 8, 1]


def test_right_drafts_grow_and_wrong_ones_pause_longer_and_longer() -> None:
    prompt = list(range(100))
    draft = Draft(prompt)
    assert len(draft.propose([1, 2, 3], 99)) == NARROW
    for _ in range(5):
        draft.learn(3, 3, 4)
    assert len(draft.propose([1, 2, 3], 99)) == WIDE
    draft.learn(WIDE, 2, 3)
    assert draft.propose([1, 2, 3], 99) == []
    assert draft.propose([0] * 3 + [1, 2, 3, 4], 99) == [5, 6, 7]
    draft.learn(3, 0, 7)
    assert draft.propose([0] * 8 + [1, 2, 3, 4], 99) == []
    assert draft.propose([0] * 12 + [1, 2, 3, 4], 99) == [5, 6, 7]


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(0, 9),
)
def test_a_proposal_followed_the_answer_s_end_before(
    prompt: list[int], answer: list[int], limit: int
) -> None:
    draft = Draft(prompt)
    for length in range(1, len(answer) + 1):
        ids = prompt + answer[:length]
        found = draft.propose(answer[:length], limit)
        assert len(found) <= min(limit, NARROW)
        if found:
            pattern = [*ids[-NGRAM:], *found]
            places = range(len(ids) - len(pattern) + 1)
            assert any(ids[i : i + len(pattern)] == pattern for i in places)
