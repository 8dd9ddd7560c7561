"""Sampling against Transformers' own warpers, and the draw against its distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from amulet.decoding.sampling import Sampling, choose, draw, penalise, warp

SCORES = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
IDS = torch.zeros(6, 1, dtype=torch.long)


def reference(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What Transformers makes of the scores, stage by stage."""
    scores = TemperatureLogitsWarper(sampling.temperature)(IDS, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(IDS, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(IDS, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(IDS, scores)
    return scores


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=1.0, top_k=500),
        Sampling(temperature=0.8, top_p=0.3),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=2.0, min_p=0.2),
        Sampling(temperature=1.1, top_k=20, top_p=0.9, min_p=0.05),
    ],
)
def test_warp_equals_transformers(sampling: Sampling) -> None:
    before = SCORES.clone()
    torch.testing.assert_close(warp(SCORES, [sampling] * 6), reference(SCORES, sampling))
    assert torch.equal(before, SCORES)


def test_each_row_has_its_own_settings() -> None:
    settings = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3, top_k=3),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, min_p=0.5),
        Sampling(temperature=2.0, top_k=10, top_p=0.9, min_p=0.1),
        Sampling(temperature=0.01),
    ]
    together = warp(SCORES, settings)
    for i, sampling in enumerate(settings):
        torch.testing.assert_close(together[i : i + 1], reference(SCORES[i : i + 1], sampling))


def test_repetition_penalty_equals_transformers() -> None:
    ids = torch.tensor([[3, 9, 9, 41]])
    seen = torch.zeros(50, dtype=torch.bool)
    seen[ids[0]] = True
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, SCORES[:1].clone())[0]
    torch.testing.assert_close(penalise(SCORES[0], seen, 1.7), expected)


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    scores = probabilities.log()[None]
    generator = torch.Generator().manual_seed(7)
    draws = torch.cat([draw(scores, [generator]) for _ in range(20_000)])
    counts = torch.bincount(draws, minlength=5) / len(draws)
    # four standard deviations of a share at 20,000 draws are at most 0.0142
    torch.testing.assert_close(counts, probabilities, atol=0.0142, rtol=0)
    assert counts[4] == 0


def test_greedy_and_sampled_rows_mix() -> None:
    sampled = Sampling(temperature=1.0, top_k=1)
    generators = [None, torch.Generator().manual_seed(0), None, None, None, None]
    chosen = choose(SCORES, [Sampling(), sampled, *[Sampling()] * 4], generators)
    assert chosen.tolist() == SCORES.argmax(-1).tolist()


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    def generators(n: int) -> list[torch.Generator | None]:
        return [torch.Generator().manual_seed(100 + i) for i in range(n)]

    settings = [Sampling(temperature=1.0)] * 6
    together = choose(SCORES, settings, generators(6)).tolist()
    alone = [
        choose(SCORES[i : i + 1], settings[:1], generators(6)[i : i + 1]).item() for i in range(6)
    ]
    assert together == alone
