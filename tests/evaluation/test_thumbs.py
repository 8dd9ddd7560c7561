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
    Differences,
    Features,
    Thumb,
    _as_steering,
    features,
    fit_weights,
    pairs,
    read_thumbs,
    tune_by_thumbs,
)
from amulet.preference import row_weights

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


def plain(differences: torch.Tensor) -> Differences:
    """Differences of thumbs that were given without focus and loop guard."""
    return Differences(differences, torch.zeros_like(differences), torch.zeros(len(differences)))


def test_thirty_thumbs_recover_signs_and_order_and_foretell_others() -> None:
    accuracies = []
    recovered = 0
    for seed in range(20):
        fit = fit_weights(plain(simulate(seed, 30)), prior=1.0)
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
    fits = [fit_weights(plain(simulate_one(weight, seed)), prior=1.5) for seed in range(users)]
    off = torch.tensor([(fit.weights[0] - weight) / fit.deviations[0] for fit in fits])
    assert float((off.abs() <= 2).double().mean()) >= 0.954 - 3 * (0.954 * 0.046 / users) ** 0.5
    # The thumbs have said it, not the prior: its deviation is 5.
    assert max(fit.deviations[0] for fit in fits) < 4


def score(parts: Features, weight: float) -> float:
    """What a user with one preference of this weight thinks of an answer."""
    return weight * parts.preferred[0] + max(weight - 1, 0) * parts.focused[0] + parts.guard


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_a_known_strength_comes_back_from_thumbs_on_a_real_architecture(
    tiny: Amulet, tmp_path: Path, focus: float
) -> None:
    """Thirty pairs on a random model, chosen by a user whose strength is 2; see the test above."""
    wish, truth = "Be brief.", 3.0
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(30):
        letters = torch.randint(97, 123, (2, 3), generator=generator).tolist()
        a, b = ("".join(map(chr, row)) for row in letters)
        thumb = Thumb(question=f"Question {number}?", preferences=(wish,), a=a, b=b, chosen="a")
        one, other = (score(features(tiny, thumb, y, "user", focus), truth) for y in (a, b))
        likes_a = float(torch.rand(1, generator=generator)) < 1 / (1 + math.exp(other - one))
        chosen = {"chosen": "a" if likes_a else "b", "focus": focus, "loop_guard": 0}
        chosen = {**thumb.model_dump(exclude_defaults=True), **chosen}
        lines.append(json.dumps(chosen) + "\n")
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    found = tune_by_thumbs(tiny, read_thumbs(path), placements=("user",))
    (weight,), (deviation,) = found.fit.weights, found.fit.deviations
    assert deviation < 2.5
    assert abs(weight - truth) <= 3 * deviation
    assert found.steering.strength == pytest.approx(weight - 1, abs=1e-4)
    assert (found.steering.focus, found.steering.loop_guard) == (focus, 0)
    assert tiny.steering.focus == 1  # as thumbs have that do not say


def simulate_focused(weight: float, seed: int, count: int = 30) -> Differences:
    """As `simulate_one`, of a user whose focus is 1; p − u differs by 1 nat, too."""
    generator = torch.Generator().manual_seed(seed)
    own, held = torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    draws = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(weight * own + max(weight - 1, 0) * held)
    sign = torch.where(draws < chance, 1.0, -1.0)
    return Differences(own * sign, held * sign, torch.zeros(count, dtype=torch.float64))


@pytest.mark.parametrize("strength", [-2.0, 0.35, 2.0])
def test_thirty_thumbs_at_focus_1_recover_a_known_strength(strength: float) -> None:
    """As without focus. A fit that leaves focus out is too low: it takes `p − u` for noise."""
    weight, users = 1.0 + strength, 100
    given = [simulate_focused(weight, seed) for seed in range(users)]
    fits = [fit_weights(one, prior=1.35) for one in given]
    off = torch.tensor([(fit.weights[0] - weight) / fit.deviations[0] for fit in fits])
    within = float((off.abs() <= 2).double().mean())
    assert within >= 0.954 - 3 * (0.954 * 0.046 / users) ** 0.5
    if strength == 2.0:  # what p − u says is missing from a fit without focus
        blind = [fit_weights(plain(one.preferred), prior=1.35).weights[0] for one in given]
        errors = torch.tensor([[fit.weights[0], b] for fit, b in zip(fits, blind, strict=True)])
        own, without = (errors - weight).mean(dim=0).tolist()
        assert abs(own) < 0.3
        assert without < -0.5


def test_the_fit_finds_the_best_of_all_weights_though_there_is_a_kink() -> None:
    grid = torch.arange(-4, 6, 0.01, dtype=torch.float64)
    for seed in range(20):
        given = simulate_focused((-1.0, 1.0, 3.0)[seed % 3], seed, count=8)

        def misfit(weight: torch.Tensor, given: Differences = given) -> float:
            misses = torch.nn.functional.softplus(-given.margins(weight.view(1))).sum()
            return float(misses + ((weight - 1.35) / 5).square() / 2)

        found = fit_weights(given, prior=1.35).weights[0]
        best = min(map(misfit, grid))
        assert misfit(torch.tensor(found, dtype=torch.float64)) <= best + 1e-4


def test_margins_are_those_of_the_decoders_own_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    own, alone = torch.randn(5, 2, generator=generator, dtype=torch.float64), torch.randn(5, 1)
    guard = torch.randn(5, generator=generator, dtype=torch.float64)
    focus = 0.7
    given = Differences(own, focus * (own - alone), guard)  # p − u = (p − r) − (u − r)
    for weights in ([1.5, 1.0], [2.0, -0.5], [0.4, 0.3]):
        push = sum(map(abs, weights))
        preferences = [Preference(str(i), weight=w / push) for i, w in enumerate(weights)]
        decoder = row_weights(preferences, push - 1, focus)
        rows = torch.cat([own, alone], dim=1)[:, : len(decoder)]
        expected = rows.double() @ torch.tensor(decoder, dtype=torch.float64) + guard
        assert torch.allclose(given.margins(torch.tensor(weights, dtype=torch.float64)), expected)


def test_the_loop_guard_explains_loops(tiny: Amulet) -> None:
    thumb = Thumb(question="Q?", preferences=("Be brief.",), a="x", b="y", chosen="a")
    parts = features(tiny, thumb, "abcde", "user", loop_guard=4)
    assert parts.guard == 0
    looped = features(tiny, thumb, "ababababab", "user", loop_guard=4)
    # A token is taxed from the sixth on, which would make a run of five; the end comes after ten.
    taken = 0.8 * (1 + 1.75 + 1.75**2 + 1.75**3)
    assert looped.guard == pytest.approx(-taken / 11)
    assert looped.preferred == features(tiny, thumb, "ababababab", "user").preferred


def test_pairs_record_focus_and_loop_guard_as_far_as_they_are_known() -> None:
    def rated(thumb: str, answer: str, settings: object) -> dict[str, object]:
        chat = [{"role": "user", "content": answer[:1]}]
        given = {"messages": chat, "preferences": ["P"], "answer": answer, "thumb": thumb}
        return given if settings is None else {**given, "settings": settings}

    steered, plain_ = {"focus": 0.5, "loop_guard": 6}, {"preference": ""}
    found = pairs(
        [
            rated("up", "1 steered", steered),
            rated("down", "1 plain", plain_),
            rated("up", "2 plain", plain_),
            rated("down", "2 steered", steered),
            rated("up", "3 other", {**steered, "focus": 2}),
            rated("down", "3 steered", steered),
            rated("up", "4 old", {"strength": 0.5}),
            rated("down", "4 older", None),
            rated("up", "5 odd", {"focus": {"new": 1}, "loop_guard": True}),
            rated("down", "5 out of range", {"focus": -1, "loop_guard": 2**40}),
        ]
    )
    assert [(pair.focus, pair.loop_guard) for pair in found] == [
        (0.5, 6),
        (0.5, 6),
        (2, 6),
        (None, None),
        (None, None),
    ]
    assert json.loads(found[0].model_dump_json(exclude_defaults=True))["focus"] == 0.5
    assert "focus" not in json.loads(found[3].model_dump_json(exclude_defaults=True))


def test_most_thumbs_say_which_focus_and_loop_guard_the_fit_has(tiny: Amulet) -> None:
    def thumb(**recorded: object) -> Thumb:
        given = {"question": "Q?", "preferences": ["P"], "a": "x", "b": "y", "chosen": "a"}
        return Thumb.model_validate({**given, **recorded})

    old, new = thumb(), thumb(focus=0.5, loop_guard=6)
    for thumbs, expected in (
        ([old], (1.0, 4)),  # the model's own
        ([new], (0.5, 6)),
        ([old, new, new], (0.5, 6)),
        ([old, old, new], (1.0, 4)),
    ):
        steering = tune_by_thumbs(tiny, thumbs).steering
        assert (steering.focus, steering.loop_guard) == expected


def test_without_information_the_prior_stays() -> None:
    fit = fit_weights(plain(torch.zeros(4, 2, dtype=torch.float64)), prior=1.5)
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


# It repeats nothing, so that the loop guard has no say.
MORE = (
    "There is much more to tell about this, and most of it takes time. Some people have written "
    "whole books on the subject! Others prefer to learn by watching films, or from a good friend."
)


def test_on_a_real_model_brief_answers_pull_towards_brevity(
    packed_smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    amulet = Amulet(*packed_smollm)
    brief = "Answer in one short sentence."
    pairs = [
        ("What is tea?", "Tea is a drink made of leaves.", f"Tea is a drink. {MORE}"),
        ("Where is Paris?", "Paris is in France.", f"Paris is a city with many sights. {MORE}"),
        ("What do bees make?", "Bees make honey.", f"Bees are insects. They live in hives. {MORE}"),
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
