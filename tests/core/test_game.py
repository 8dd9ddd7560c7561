"""The closed form equals the paper's literal game, and is linear, pure and range-checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amulet.errors import AmuletError, RequestError
from amulet.game import game_gain, steer, steer_many
from tests.oracles.literal_game import literal_game, log_softmax
from tests.search import examples

# The gain grows like T^(α/λ − 1), and with it the numbers of the literal game and their rounding:
# α = 4λ reaches 1e5 within 60 steps. Up to α = 2λ, the largest ratio that design and paper try
# (g = 114 at T = 60), the comparison is about the algebra; it is made relative to the largest
# |log π_T|, which is what float64 can promise of either side.
game_numbers = st.fixed_dictionaries(
    {
        "iterations": st.integers(0, 80),
        "alpha": st.floats(0.0, 2.0),
        "lam": st.floats(1.0, 4.0),
        "eta": st.floats(0.05, 50.0),
    }
)


def assert_is_the_game(preferred: np.ndarray, base: np.ndarray, game: dict[str, Any]) -> None:
    expected = literal_game(preferred, base, **game)
    scores = steer(torch.from_numpy(preferred), torch.from_numpy(base), game_gain(**game))
    steered = torch.log_softmax(scores, dim=-1).numpy()
    assert np.abs(steered - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())
    assert (steered.argmax(axis=-1) == expected.argmax(axis=-1)).all()


@examples(150)
@given(game=game_numbers, rows=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_closed_form_is_the_literal_game(game: dict[str, Any], rows: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3.0, size=(2, rows, 997))
    assert_is_the_game(log_softmax(logits[0]), log_softmax(logits[1]), game)


@examples(50)
@given(ratio=st.floats(0.05, 1.0), lam=st.floats(0.1, 10.0), eta=st.floats(0.01, 100.0))
def test_the_closed_form_is_the_literal_game_over_many_steps(
    ratio: float, lam: float, eta: float
) -> None:
    logits = np.random.default_rng(7).normal(scale=3.0, size=(2, 2, 211))
    game = {"iterations": 1000, "alpha": ratio * lam, "lam": lam, "eta": eta}
    assert_is_the_game(log_softmax(logits[0]), log_softmax(logits[1]), game)


@pytest.fixture(scope="module")
def real_rows(
    smollm: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> tuple[np.ndarray, np.ndarray]:
    """p and r of SmolLM2, with and without a preference, for two questions: `[2, vocab]` each."""
    model, tokenizer = smollm

    def last_logits(system: str, question: str) -> np.ndarray:
        chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -1]
        return np.asarray(logits.double().numpy())

    questions = ("Why is the sky blue?", "How do I boil an egg?")
    system, preference = "You are a helpful assistant.", " Talk like a pirate."
    preferred = np.stack([last_logits(system + preference, question) for question in questions])
    base = np.stack([last_logits(system, question) for question in questions])
    return log_softmax(preferred), log_softmax(base)


@pytest.mark.parametrize(
    "game",
    [
        {"iterations": 60, "alpha": 2.0, "lam": 2.0, "eta": 10.0},
        {"iterations": 60, "alpha": 1.0, "lam": 2.0, "eta": 10.0},
        {"iterations": 60, "alpha": 2.0, "lam": 1.0, "eta": 10.0},
        {"iterations": 7, "alpha": 0.5, "lam": 3.0, "eta": 0.1},
        {"iterations": 0, "alpha": 2.0, "lam": 2.0, "eta": 10.0},
    ],
)
def test_the_closed_form_is_the_literal_game_on_real_logits(
    real_rows: tuple[np.ndarray, np.ndarray], game: dict[str, Any]
) -> None:
    assert_is_the_game(*real_rows, game)


@pytest.mark.parametrize(
    ("iterations", "gain"),
    [
        (0, 0.0),
        (1, 0.952),
        (5, 2.251),
        (10, 2.898),
        (20, 3.567),
        (40, 4.247),
        (60, 4.6487),
        (100, 5.156),
        (1000, 7.454),
    ],
)
def test_the_gain_of_the_papers_game(iterations: int, gain: float) -> None:
    assert game_gain(iterations) == pytest.approx(gain, abs=5e-4)


def test_the_gain_for_other_weights() -> None:
    assert round(game_gain(), 4) == 4.6487
    assert game_gain(60, alpha=1.0, lam=2.0) == pytest.approx(0.926, abs=5e-4)
    assert game_gain(60, alpha=2.0, lam=1.0) == pytest.approx(114, abs=0.5)
    assert game_gain(60, alpha=0.0) == 0.0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"iterations": -1}, "iterations=-1: expected a whole number, 0 or more."),
        ({"iterations": 2.5}, "iterations=2.5: expected a whole number, 0 or more."),
        ({"iterations": True}, "iterations=True: expected a whole number, 0 or more."),
        ({"alpha": -0.5}, "alpha=-0.5: expected a finite number, 0 or more."),
        ({"alpha": "2"}, "alpha='2': expected a finite number, 0 or more."),
        ({"eta": None}, "eta=None: expected a finite number, above 0."),
        ({"alpha": math.nan}, "alpha=nan: expected a finite number, 0 or more."),
        ({"lam": 0.0}, "lam=0.0: expected a finite number, above 0."),
        ({"lam": math.inf}, "lam=inf: expected a finite number, above 0."),
        ({"eta": 0.0}, "eta=0.0: expected a finite number, above 0."),
        ({"eta": -1.0}, "eta=-1.0: expected a finite number, above 0."),
        (
            {"iterations": 1000, "alpha": 1e6, "lam": 1e-6},
            "iterations=1000, alpha=1000000.0, lam=1e-06, eta=10.0 give an infinite gain; "
            "use fewer iterations, a smaller alpha or a larger lam.",
        ),
    ],
)
def test_a_number_out_of_range_is_named(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        game_gain(**numbers)
    assert str(raised.value) == message
    assert isinstance(raised.value, AmuletError)


def log_probs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_strength_0_is_the_preferred_row_and_minus_1_the_base_row() -> None:
    p, r = log_probs(3, 50), log_probs(3, 50, seed=1)
    assert torch.equal(steer(p, r, 0.0), p)
    torch.testing.assert_close(steer(p, r, -1.0), r, rtol=0, atol=1e-14)


@given(first=st.floats(-5, 5), second=st.floats(-5, 5))
def test_the_score_is_linear_in_the_strength(first: float, second: float) -> None:
    p, r = log_probs(2, 40), log_probs(2, 40, seed=1)
    middle = steer(p, r, (first + second) / 2)
    mean = (steer(p, r, first) + steer(p, r, second)) / 2
    torch.testing.assert_close(middle, mean, rtol=0, atol=1e-12)


def test_each_row_has_its_own_strength() -> None:
    p, r = log_probs(3, 40), log_probs(3, 40, seed=1)
    column = torch.tensor([[0.0], [2.0], [4.6487]], dtype=torch.float64)
    together = steer(p, r, column)
    for row, gain in enumerate(column[:, 0].tolist()):
        assert torch.equal(together[row], steer(p[row], r[row], gain))


@given(gain=st.floats(-2, 10))
def test_one_preference_of_weight_1_plus_g_is_strength_g(gain: float) -> None:
    p, r = log_probs(3, 40), log_probs(3, 40, seed=1)
    many = steer_many(p, r, torch.full((3,), 1.0 + gain, dtype=p.dtype), torch.arange(3))
    torch.testing.assert_close(many, steer(p, r, gain), rtol=0, atol=1e-12)


def test_several_preferences_add_up_in_the_request_they_belong_to() -> None:
    p, r = log_probs(4, 40), log_probs(3, 40, seed=1)
    weights = torch.tensor([2.0, -0.5, 3.0, 1.0], dtype=torch.float64)
    owner = torch.tensor([2, 0, 2, 0])
    many = steer_many(p, r, weights, owner)
    torch.testing.assert_close(many[0], r[0] - 0.5 * (p[1] - r[0]) + (p[3] - r[0]))
    assert torch.equal(many[1], r[1])
    torch.testing.assert_close(many[2], r[2] + 2.0 * (p[0] - r[2]) + 3.0 * (p[2] - r[2]))


def test_the_inputs_stay_as_they_are() -> None:
    p, r = log_probs(2, 40), log_probs(2, 40, seed=1)
    p_before, r_before = p.clone(), r.clone()
    steer(p, r, 2.0)
    steer_many(p, r, torch.tensor([3.0, 1.0], dtype=p.dtype), torch.tensor([0, 1]))
    assert torch.equal(p, p_before)
    assert torch.equal(r, r_before)
