"""Scores of a given answer are what the decoding itself saw."""

from __future__ import annotations

import pytest
import torch

from amulet import Amulet, Preference, Request
from amulet.errors import EvaluationError
from amulet.evaluation.scoring import answer_log_probabilities
from tests.models import byte_tokenizer, random_model

MESSAGES = [{"role": "user", "content": "What is tea?"}]


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(random_model("qwen2"), byte_tokenizer())


@pytest.mark.parametrize("placement", ["system", "user", "both"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_scores_equal_the_trace(amulet: Amulet, placement: str, floor: float) -> None:
    options = {"preference": "Be brief.", "strength": 1.5, "floor": floor, "placement": placement}
    request = Request(messages=MESSAGES, max_new_tokens=12, trace=True, **options)
    reply = amulet.start(request).read()
    scores = answer_log_probabilities(amulet, request, reply.token_ids)
    seen = {
        name: torch.tensor([getattr(token, name) for token in reply.trace])
        for name in ("preferred", "base", "steered")
    }
    torch.testing.assert_close(scores.preferred[0], seen["preferred"], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.base, seen["base"], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.steered(1.5, floor), seen["steered"], atol=2e-4, rtol=0)


def test_several_preferences_have_a_row_each(amulet: Amulet) -> None:
    both = [Preference("Be brief."), Preference("Be rude.", -0.5)]
    request = Request(messages=MESSAGES, preference=both)
    scores = answer_log_probabilities(amulet, request, [84, 101, 97])
    assert scores.preferred.shape == (2, 3)
    for i, one in enumerate(both):
        alone = Request(messages=MESSAGES, preference=one.text)
        expected = answer_log_probabilities(amulet, alone, [84, 101, 97])
        torch.testing.assert_close(scores.preferred[i], expected.preferred[0])
    with pytest.raises(EvaluationError, match="has 2"):
        scores.steered(2.0)


def test_without_a_preference_there_is_the_base_row_alone(amulet: Amulet) -> None:
    scores = answer_log_probabilities(amulet, Request(messages=MESSAGES), [84, 101])
    assert scores.preferred.shape == (0, 2)
    assert scores.base.shape == (2,)
    with pytest.raises(EvaluationError, match="empty answer"):
        answer_log_probabilities(amulet, Request(messages=MESSAGES), [])
