"""Scores of given answers are what the decoding itself saw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amulet import Amulet, Preference, Request
from amulet.errors import EvaluationError
from amulet.evaluation import scoring
from amulet.evaluation.scoring import Scores, answer_log_probabilities, score_answers
from tests.models import Kind, byte_tokenizer, random_model
from tests.models.images import asks, image_model, picture, processor

MESSAGES = [{"role": "user", "content": "What is tea?"}]
ONE = "Be brief."
SEVERAL = [Preference("Be brief."), Preference("Be rude.", weight=-0.5)]
SHARED = [Preference("Be brief.", weight=0.3), Preference("Use long words.", weight=0.4)]


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet(random_model("qwen2"), byte_tokenizer())


def traced(amulet: Amulet, **options: Any) -> tuple[Request, tuple[int, ...], dict[str, Any]]:
    request = Request(messages=MESSAGES, max_new_tokens=12, trace=True, **options)
    reply = amulet.start(request).read()
    assert reply.trace is not None
    seen = {
        name: torch.tensor([getattr(token, name) for token in reply.trace])
        for name in ("preferred", "base", "steered")
    }
    return request, reply.token_ids, seen


@pytest.mark.parametrize("placement", ["system", "user", "both"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("preference", [ONE, SEVERAL, SHARED], ids=["one", "several", "shared"])
def test_scores_equal_the_trace(
    amulet: Amulet, placement: str, floor: float, preference: Any
) -> None:
    options = {"preference": preference, "floor": floor, "placement": placement}
    request, ids, seen = traced(amulet, strength=1.5, loop_guard=0, **options)
    scores = answer_log_probabilities(amulet, request, ids)
    steered = scores.steered(1.5, floor, focus=1.0)
    torch.testing.assert_close(scores.base, seen["base"], atol=1e-4, rtol=0)
    torch.testing.assert_close(steered, seen["steered"], atol=1e-4, rtol=0)
    if preference is ONE:  # with several the trace has their mean
        torch.testing.assert_close(scores.preferred[0], seen["preferred"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
def test_other_models_score_as_they_decode(kind: Kind) -> None:
    amulet = Amulet(random_model(kind), byte_tokenizer())
    options = {"floor": 0.0, "focus": 0.0, "loop_guard": 0}
    request, ids, seen = traced(amulet, preference=ONE, strength=1.5, **options)
    [scores] = score_answers(amulet, [(request, ids)], lambda scores: scores)
    torch.testing.assert_close(scores.base, seen["base"], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.steered(1.5), seen["steered"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_the_loop_guard_scores_as_it_decodes(amulet: Amulet, focus: float) -> None:
    options = {"strength": 1.0, "focus": focus, "loop_guard": 1, "floor": 0.0}
    request, ids, seen = traced(amulet, preference=ONE, **options)
    scores = answer_log_probabilities(amulet, request, [*ids, *ids])
    guarded = scores.steered(1.0, focus=focus, loop_guard=1)
    torch.testing.assert_close(guarded[: len(ids)], seen["steered"], atol=1e-4, rtol=0)
    free = scores.steered(1.0, focus=focus)
    assert (guarded[len(ids) + 1 :] < free[len(ids) + 1 :]).all()  # all that is said again
    without = scores.steered(0.0, loop_guard=1)  # the prompt alone has none
    torch.testing.assert_close(without, scores.steered(0.0))


def test_focus_must_have_been_asked_for(amulet: Amulet) -> None:
    request = Request(messages=MESSAGES, preference=ONE, focus=0.0)
    scores = answer_log_probabilities(amulet, request, [84])
    assert scores.steered(2.0).isfinite().all()
    with pytest.raises(EvaluationError, match="focus"):
        scores.steered(2.0, focus=1.0)


def test_the_floor_leaves_nothing_to_what_is_below_it(amulet: Amulet) -> None:
    request = Request(messages=MESSAGES, preference=ONE)
    scores = answer_log_probabilities(amulet, request, [84])
    worst = int(scores.rows[0, 0].argmin())
    scores = answer_log_probabilities(amulet, request, [worst])
    assert scores.steered(2.0, 0.9).tolist() == [float("-inf")]
    assert scores.steered(2.0, 0.0).isfinite().all()


def test_strengths_with_a_name(amulet: Amulet) -> None:
    scores = answer_log_probabilities(amulet, Request(messages=MESSAGES, preference=ONE), [84, 101])
    torch.testing.assert_close(scores.steered(-1.0), scores.base)
    torch.testing.assert_close(scores.steered(0.0), scores.preferred[0])


def test_several_preferences_have_a_row_each(amulet: Amulet) -> None:
    request = Request(messages=MESSAGES, preference=SEVERAL)
    scores = answer_log_probabilities(amulet, request, [84, 101, 97])
    assert scores.preferred.shape == (2, 3)
    assert scores.preferences == tuple(SEVERAL)
    for i, one in enumerate(SEVERAL):
        alone = Request(messages=MESSAGES, preference=one.text)
        expected = answer_log_probabilities(amulet, alone, [84, 101, 97])
        torch.testing.assert_close(scores.preferred[i], expected.preferred[0])


@pytest.mark.parametrize("budget", [1, 300, 100_000])
def test_many_score_as_each_alone(
    amulet: Amulet, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[84, 101, 97], [104] * 40, [84], [101, 97] * 9]
    requests = [
        Request(messages=MESSAGES, preference=ONE, placement="user"),
        Request(messages=MESSAGES),
        Request(messages=[{"role": "user", "content": "Why? " * 30}], preference=SEVERAL),
        Request(prompt="Tea is", preference=SHARED),
    ]

    def numbers(scores: Scores) -> torch.Tensor:
        steered = [scores.steered(1.5)] if scores.preferences else []
        return torch.cat([scores.base, *scores.preferred, *steered])

    items = list(zip(requests, answers, strict=True))
    alone = [numbers(answer_log_probabilities(amulet, *item)) for item in items]
    monkeypatch.setattr(scoring, "TOKENS", budget)
    told: list[tuple[int, int]] = []
    found = score_answers(amulet, items, numbers, lambda *counts: told.append(counts))
    for one, many in zip(alone, found, strict=True):
        torch.testing.assert_close(many, one, atol=1e-4, rtol=0)
    assert told[-1] == (4, 4)
    assert len(told) == {1: 4, 300: 3, 100_000: 1}[budget]
    assert score_answers(amulet, [], numbers) == []


def test_without_a_preference_there_is_the_base_row_alone(amulet: Amulet) -> None:
    scores = answer_log_probabilities(amulet, Request(messages=MESSAGES), [84, 101])
    assert scores.preferred.shape == (0, 2)
    assert scores.base.shape == (2,)
    with pytest.raises(EvaluationError, match="need a preference"):
        scores.steered(2.0)


def test_what_cannot_be_scored_is_said(amulet: Amulet) -> None:
    with pytest.raises(EvaluationError, match="empty answer"):
        answer_log_probabilities(amulet, Request(messages=MESSAGES), [])
    assert amulet.window is not None
    with pytest.raises(EvaluationError, match=f"context window {amulet.window}"):
        answer_log_probabilities(amulet, Request(messages=MESSAGES), [84] * amulet.window)


def test_answers_about_images_are_refused() -> None:
    amulet = Amulet(image_model("llava", torch.float32), processor("llava"))
    request = Request(messages=asks(picture(), "Which tea?"), preference=ONE)
    with pytest.raises(EvaluationError, match=r"have an image: .* can't be scored\. Leave"):
        answer_log_probabilities(amulet, request, [5, 6])
