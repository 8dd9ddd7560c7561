"""Thumbs: what is read, what is fitted from a simulated user, and the real model end to end."""

from __future__ import annotations

import json
import math
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
    features,
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


def simulate_one(weight: float, seed: int, count: int = 30) -> torch.Tensor:
    """Differences f(chosen) − f(other), `[count, 1]`, of a user with one weight; 1 nat apart."""
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    draws = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return torch.where(draws < torch.sigmoid(given * weight), given, -given)


@pytest.mark.parametrize("strength", [-2.0, 0.0, 0.5, 2.0])
def test_thirty_thumbs_recover_a_known_strength(strength: float) -> None:
    """Each estimate is within its own standard error of the truth as often as a normal one is.

    Of 200 users 95.4 % are expected within two deviations, with a binomial standard deviation of
    1.5 %: fewer than 95.4 − 3·1.5 = 90.9 % come by chance once in 700 runs.
    """
    weight, users = 1.0 + strength, 200
    fits = [fit_weights(simulate_one(weight, seed), prior=1.5) for seed in range(users)]
    off = torch.tensor([(fit.weights[0] - weight) / fit.deviations[0] for fit in fits])
    assert float((off.abs() <= 2).double().mean()) >= 0.954 - 3 * (0.954 * 0.046 / users) ** 0.5
    # The thumbs have said it, not the prior: its deviation is 5.
    assert max(fit.deviations[0] for fit in fits) < 4


def test_a_known_strength_comes_back_from_thumbs_on_a_real_architecture(
    tiny: Amulet, tmp_path: Path
) -> None:
    """Thirty pairs on a random model, chosen by a user whose strength is 2; see the test above."""
    wish, truth = "Be brief.", 3.0
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(30):
        letters = torch.randint(97, 123, (2, 3), generator=generator).tolist()
        a, b = ("".join(map(chr, row)) for row in letters)
        thumb = Thumb(question=f"Question {number}?", preferences=(wish,), a=a, b=b, chosen="a")
        apart = sum(features(tiny, thumb, a, "user")) - sum(features(tiny, thumb, b, "user"))
        likes_a = float(torch.rand(1, generator=generator)) < 1 / (1 + math.exp(-truth * apart))
        chosen = {**thumb.model_dump(exclude_defaults=True), "chosen": "a" if likes_a else "b"}
        lines.append(json.dumps(chosen) + "\n")
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    found = tune_by_thumbs(tiny, read_thumbs(path), placements=("user",))
    (weight,), (deviation,) = found.fit.weights, found.fit.deviations
    print(weight, deviation)
    assert deviation < 2.5
    assert abs(weight - truth) <= 3 * deviation
    assert found.steering.strength == pytest.approx(weight - 1, abs=1e-4)


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
