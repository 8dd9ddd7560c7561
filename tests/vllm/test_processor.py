"""The logits processor alone: rows in any order, spans, excluded tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from amulet.vllm_backend.processor import PairProcessor
from amulet.vllm_backend.wire import Pair, Row

VOCAB = 12
ROW = Row(
    request="a",
    number=0,
    count=2,
    pair=Pair([], [3.0]),
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    penalties=(1.0, 0.0, 0.0),
    seed=0,
    is_seeded=True,
)


def params(row: Row | None) -> SamplingParams:
    return SamplingParams(extra_args=None if row is None else row.args())


def make(*rows: Row | None, output: list[int] | None = None) -> PairProcessor:
    processor = PairProcessor(None, torch.device("cpu"), False)
    added = [(i, params(row), [1], [] if output is None else output) for i, row in enumerate(rows)]
    processor.update_state(BatchUpdate(len(rows), removed=[], added=added, moved=[]))
    return processor


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))


def combined(preferred: torch.Tensor, base: torch.Tensor, weight: float = 3.0) -> torch.Tensor:
    p, r = preferred.log_softmax(-1), base.log_softmax(-1)
    return r + weight * (p - r)


def test_rows_of_a_request_get_the_same_scores_and_others_are_left() -> None:
    processor = make(None, ROW, None, replace(ROW, number=1))
    given = logits(4)
    result = processor.apply(given.clone())
    wanted = combined(given[1], given[3])
    for row in (1, 3):
        torch.testing.assert_close(result[row], wanted)
    assert torch.equal(result[[0, 2]], given[[0, 2]])


def test_rows_that_move_are_followed() -> None:
    processor = make(ROW, None, replace(ROW, number=1))
    moved = [(0, 1, MoveDirectionality.SWAP)]
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=moved))
    given = logits(3)
    torch.testing.assert_close(processor.apply(given.clone())[1], combined(given[1], given[2]))


def test_half_a_request_is_left_alone() -> None:
    processor = make(ROW, None)
    given = logits(2)
    assert torch.equal(processor.apply(given.clone()), given)
    added = [(2, params(replace(ROW, number=1)), [1], [])]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    assert not torch.equal(processor.apply(logits(3))[0], logits(3)[0])
    processor.update_state(BatchUpdate(2, removed=[2], added=[], moved=[]))
    assert torch.equal(processor.apply(given.clone()), given)


def test_inside_a_span_the_base_row_decides() -> None:
    row = replace(ROW, pair=Pair([], [3.0], spans=[[5, 6]]))
    output: list[int] = []
    processor = make(row, replace(row, number=1), output=output)
    given = logits(2)
    steered = combined(given[0], given[1])
    for token, is_plain in ((4, False), (5, True), (7, True), (6, False), (8, False)):
        output.append(token)
        result = processor.apply(given.clone())
        torch.testing.assert_close(result[0], given[1] if is_plain else steered)
        assert torch.equal(result[0], result[1])


def test_the_loop_guard_begins_anew_behind_a_span() -> None:
    row = replace(ROW, pair=Pair([], [3.0], loop_guard=1, spans=[[5, 6]]))
    output: list[int] = []
    processor = make(row, replace(row, number=1), output=output)
    given = logits(2)
    steered = combined(given[0], given[1])
    costs = {
        (1, 2, 1): {2: 0.8},
        (1, 2, 1, 2): {1: 0.8 * 1.75},  # "2 1" has been said
        (1, 2, 1, 2, 5, 1): None,
        (1, 2, 1, 2, 5, 1, 6): {},
        (1, 2, 1, 2, 5, 1, 6, 2, 1, 2): {1: 0.8},
    }
    for tokens, lowered in costs.items():
        output[:] = tokens
        wanted = given[1].clone() if lowered is None else steered.clone()
        for token, nats in (lowered or {}).items():
            wanted[token] -= nats
        result = processor.apply(given.clone())
        torch.testing.assert_close(result[0], wanted)
        again = make(row, replace(row, number=1), output=list(tokens))  # as after a preemption
        torch.testing.assert_close(again.apply(given.clone())[0], wanted)


def test_what_vllm_excluded_stays_excluded() -> None:
    row = replace(ROW, pair=Pair([], [3.0], floor=0.1))
    processor = make(row, replace(row, number=1))
    given = logits(2)
    given[:, 3] = float("-inf")
    result = processor.apply(given.clone())
    assert not result.isnan().any()
    assert result[0, 3] == float("-inf")


@pytest.mark.parametrize("is_seeded", [True, False])
@pytest.mark.parametrize("outputs", [0, 1, 5])
def test_draws_go_on_where_they_were(outputs: int, is_seeded: bool) -> None:
    row = replace(ROW, temperature=1.0, seed=4, is_seeded=is_seeded)
    output: list[int] = []
    processor = make(row, replace(row, number=1), output=output)
    given = logits(2)
    for _ in range(outputs):
        processor.apply(given.clone())
        processor.apply(given.clone())  # a step whose choice was thrown away
        output.append(0)
    result = processor.apply(given.clone())
    again = make(row, replace(row, number=1), output=list(output)).apply(given.clone())
    assert torch.equal(result, again)
    assert result[0].argmax() == result[1].argmax()
    assert (result[0] == 0.0).sum() == 1


@pytest.mark.parametrize("is_seeded", [True, False])
def test_draws_follow_the_distribution(is_seeded: bool) -> None:
    row = replace(ROW, temperature=2.0, top_k=6, is_seeded=is_seeded)
    output: list[int] = []
    processor = make(row, replace(row, number=1), output=output)
    given = logits(2)
    kept = combined(given[0], given[1]).topk(6)
    wanted = torch.zeros(VOCAB).scatter_(0, kept.indices, (kept.values / 2.0).softmax(-1))
    counts = torch.zeros(VOCAB)
    for _ in range(4000):
        token = int(processor.apply(given.clone())[0].argmax())
        counts[token] += 1
        output.append(token)
    assert not counts[wanted == 0].any()
    # four standard deviations of a share at 4,000 draws are at most 0.032
    torch.testing.assert_close(counts / 4000, wanted, rtol=0.0, atol=0.032)


def test_seeded_and_other_draws_and_greedy_rows_side_by_side() -> None:
    drawn = replace(ROW, temperature=1.0, seed=4)
    kinds = [
        drawn,
        replace(ROW, request="b"),
        replace(drawn, request="c", is_seeded=False),
        replace(drawn, request="d", seed=5),
    ]
    given = logits(8)
    pairs = [(kind, replace(kind, number=1)) for kind in kinds]
    together = make(*(row for pair in pairs for row in pair)).apply(given.clone())
    for i, pair in enumerate(pairs):
        alone = make(*pair).apply(given[2 * i : 2 * i + 2].clone())
        assert torch.equal(together[2 * i : 2 * i + 2], alone)
