"""Thumbs: what is read, what is fitted from a simulated user, and the real model end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amulet import Amulet, Preference
from amulet.errors import EvaluationError
from amulet.evaluation.thumbs import (
    LARGEST,
    Thumb,
    _as_steering,
    fit_weights,
    read_thumbs,
    tune_by_thumbs,
)

TRUE = torch.tensor([6.0, -4.0, 2.0], dtype=torch.float64)


def simulate(seed: int, count: int) -> torch.Tensor:
    """Differences f(chosen) − f(other) of a user who chooses by `TRUE`, with logistic noise.

    Pairs differ clearly, by 1 nat per token; with .25 even the true weights foretell only 77 %.
    """
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    chosen = torch.where(draws < torch.sigmoid(given @ TRUE), 1.0, -1.0)
    return given * chosen.unsqueeze(1)


def test_thirty_thumbs_recover_signs_and_order_and_foretell_others() -> None:
    accuracies = []
    recovered = 0
    for seed in range(20):
        fit = fit_weights(simulate(seed, 30), prior=1.0)
        weights = torch.tensor(fit.weights, dtype=torch.float64)
        recovered += bool(weights[0] > weights[2] > 0 > weights[1])
        held_out = simulate(1000 + seed, 1000)
        accuracies.append(float((held_out @ weights > 0).double().mean()))
    assert recovered >= 17
    assert min(accuracies) > 0.8


def test_without_information_the_prior_stays() -> None:
    fit = fit_weights(torch.zeros(4, 2, dtype=torch.float64), prior=1.5)
    assert fit.weights == pytest.approx((1.5, 1.5))
    assert fit.deviations == pytest.approx((5.0, 5.0))
    assert fit.agreement == 0.0


def test_weights_become_strength_and_shares_that_multiply_back() -> None:
    strength, preferences = _as_steering(("x", "y"), (3.0, -1.0))
    assert strength == 3.0
    assert preferences == (Preference("x", weight=0.75), Preference("y", weight=-0.25))
    assert _as_steering(("x",), (-2.0,)) == (-3.0, (Preference("x"),))
    assert _as_steering(("x",), (50.0,))[0] == round(LARGEST - 1.0, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Q", "preferences": ["P"], "a": "1", "b": "2", "chosen": "c"}, "chosen='c'"),
        ({"preferences": ["P"], "a": "1", "b": "2", "chosen": "a"}, "either messages or question"),
        ({"question": "Q", "preferences": ["P", "P"], "a": "", "b": "", "chosen": "a"}, "differ"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, object], message: str) -> None:
    path = tmp_path / "thumbs.jsonl"
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=message) as error:
        read_thumbs(path)
    assert str(error.value).startswith("thumbs.jsonl, line 1: ")


def test_on_a_real_model_brief_answers_pull_towards_brevity(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    amulet = Amulet(*smollm)
    brief = "Answer in one short sentence."
    pairs = [
        ("What is tea?", "Tea is a drink made of leaves.", "Tea is a drink. " * 8),
        ("Where is Paris?", "Paris is in France.", "Paris is a city with many sights. " * 4),
        ("What do bees make?", "Bees make honey.", "Bees are insects. They live in hives. " * 3),
    ]
    fitted = {
        chosen: tune_by_thumbs(
            amulet,
            [Thumb(question=q, preferences=(brief,), a=a, b=b, chosen=chosen) for q, a, b in pairs],
        )
        for chosen in ("a", "b")
    }
    assert fitted["a"].steering.strength > amulet.steering.strength > fitted["b"].steering.strength
    assert fitted["a"].fit.agreement == 1.0
    assert fitted["a"].steering.floor == amulet.steering.floor
