"""Rows of any number of preferences combine as their formula says, in any mixture of requests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amulet.decoding.mixture import Mixture, take_rows

VOCAB = 12
NEVER = float("-inf")

# A share that underflows to nothing counts as none, which is right and not what is tested here.
weights = st.lists(
    st.floats(-3, 6).filter(lambda w: w == 0 or abs(w) > 1e-9), min_size=0, max_size=3
)


def random_logits(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64) * 4


@given(st.lists(weights, min_size=1, max_size=5), st.floats(0, 1))
def test_every_generation_gets_its_own_formula(
    given_weights: list[list[float]], floor: float
) -> None:
    counts = [len(own) + 1 for own in given_weights]
    logits = random_logits(sum(counts))
    mixture = Mixture(logits, given_weights, counts)
    mixture.cut([floor] * len(counts), [None] * len(counts))
    logs = logits.log_softmax(-1)
    first = 0
    for i, own in enumerate(given_weights):
        base, preferred = logs[first + len(own)], logs[first : first + len(own)]
        steered = any(own)
        expected = base + sum(w * (p - base) for w, p in zip(own, preferred, strict=True))
        wanted = [p for w, p in zip(own, preferred, strict=True) if w > 0] or [base]
        relative = torch.stack([p - p.max() for p in wanted]).amax(0)
        least = torch.tensor(floor, dtype=torch.float64).log()
        keep = relative >= least
        got = mixture.scores[i]
        if not steered:
            expected = logits[first + len(own)]
        # the floor's edge may fall either way by rounding
        clear = (relative - least).abs() > 1e-9
        torch.testing.assert_close(got[keep & clear], expected[keep & clear])
        assert torch.all(got[~keep & clear] == NEVER)
        first += counts[i]


def test_the_floor_is_relative_to_what_the_grammar_permits() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.9, -9.0], [0.0, 0.0, 0.0, 0.0]])
    mixture = Mixture(logits, [[2.0]], [2])
    mixture.cut([0.5], [torch.tensor([False, True, True, True])])
    assert (mixture.scores[0] > NEVER).tolist() == [False, True, True, False]


def test_a_negative_preference_alone_is_cut_by_the_base_row() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, -5.0]])
    mixture = Mixture(logits, [[-2.0]], [2])
    mixture.cut([0.1], [None])
    assert (mixture.scores[0] > NEVER).tolist() == [True, True, False]
    assert mixture.scores[0].argmax() == 1


def test_raw_logits_stay_as_they_were() -> None:
    logits = random_logits(4)
    before = logits.clone()
    mixture = Mixture(logits, [[3.0], [1.0]], [2, 2])
    mixture.cut([0.2, 0.0], [None, torch.ones(VOCAB, dtype=torch.bool)])
    mixture.trace(0, 3, top=2)
    assert torch.equal(before, logits)


@pytest.mark.parametrize("index", [[0], [2], [0, 1, 2], [1, 3, 5], [3, 1], [0, 2, 3], [4, 4]])
def test_take_rows_is_indexing(index: list[int]) -> None:
    rows = random_logits(6)
    assert torch.equal(take_rows(rows, index), rows[torch.tensor(index)])


def test_single_tokens_can_be_made_less_likely() -> None:
    mixture = Mixture(random_logits(3), [[2.0], []], [2, 1])
    before = mixture.scores.clone()
    mixture.lower([{}, {}])
    assert torch.equal(mixture.scores, before)
    mixture.lower([{3: 1.5, 4: 0.5}, {0: 2.0}])
    before[0, 3] -= 1.5
    before[0, 4] -= 0.5
    before[1, 0] -= 2.0
    torch.testing.assert_close(mixture.scores, before)
