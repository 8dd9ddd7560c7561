"""Every way to state a preference has one normal form; what can't be one is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from amulet.errors import RequestError
from amulet.game import game_gain
from amulet.preference import (
    DEFAULT_STEERING,
    PLACEMENTS,
    Preference,
    Steering,
    normal_preferences,
    row_weights,
    shares,
)


@pytest.mark.parametrize(
    ("given_form", "normal"),
    [
        (None, ()),
        ("", ()),
        (" \n", ()),
        ([], ()),
        ([None, "", " "], ()),
        ({"text": "a", "weight": 0}, ()),
        ([Preference("a", 0.0), "b"], (Preference("b"),)),
        ("Be concise.", (Preference("Be concise.", 1.0),)),
        ("  Be concise.\n", (Preference("Be concise."),)),
        ("one\ntwo", (Preference("one\ntwo"),)),
        (Preference("a", -1.0), (Preference("a", -1.0),)),
        ({"text": "a", "weight": 2}, (Preference("a", 2.0),)),
        ({"text": "a"}, (Preference("a"),)),
        (
            ["a", {"text": "b", "weight": -1}, Preference("c", 0.5)],
            (Preference("a"), Preference("b", -1.0), Preference("c", 0.5)),
        ),
        (("a", "a"), (Preference("a"), Preference("a"))),
    ],
)
def test_the_normal_form(given_form: Any, normal: tuple[Preference, ...]) -> None:
    assert normal_preferences(given_form) == normal
    assert normal_preferences(normal) == normal


def test_any_iterable_of_preferences_will_do() -> None:
    assert normal_preferences(text for text in "ab") == (Preference("a"), Preference("b"))


@pytest.mark.parametrize(
    ("given_form", "message"),
    [
        (3, "a preference of type int: "),
        (True, "a preference of type bool: "),
        (b"Be concise.", "a preference of type bytes: "),
        (["a", 3], "a preference of type int: "),
        ([["a"]], "a preference of type list: "),
        ({"weight": 2}, "a preference of type dict: "),
        (
            {"text": "a", "weigth": 2},
            "Preference: weigth: unknown option; the closest one is weight.",
        ),
        ({"text": ""}, "Preference: text='': "),
        ({"text": 3}, "Preference: text=3: "),
        ({"text": "a", "weight": 10.5}, "Preference: weight=10.5: "),
    ],
)
def test_what_is_no_preference_is_named(given_form: Any, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        normal_preferences(given_form)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Preference(" "),
            "Preference: text=' ': is empty; to decode plainly give preference=None or \"\".",
        ),
        (lambda: Preference("a", math.nan), "Preference: weight=nan: "),
        (lambda: Preference("a", -math.inf), "Preference: weight=-inf: "),
        (lambda: Preference("a", weight=-11), "Preference: weight=-11: "),
        (lambda: Preference("a", strength=2), "Preference: strength: unknown option"),
        (lambda: Steering(strength=math.nan), "Steering: strength=nan: "),
        (lambda: Steering(strength=math.inf), "Steering: strength=inf: "),
        (lambda: Steering(strength=-101), "Steering: strength=-101: "),
        (lambda: Steering(strength=1001.0), "Steering: strength=1001.0: "),
        (lambda: Steering(floor=-0.1), "Steering: floor=-0.1: "),
        (lambda: Steering(floor=1.5), "Steering: floor=1.5: "),
        (lambda: Steering(floor=math.nan), "Steering: floor=nan: "),
        (lambda: Steering(placement="end"), "Steering: placement='end': "),
        (lambda: Steering(focus=-0.1), "Steering: focus=-0.1: "),
        (lambda: Steering(focus=math.inf), "Steering: focus=inf: "),
        (lambda: Steering(loop_guard=-1), "Steering: loop_guard=-1: "),
        (lambda: Steering(loop_guard=2.5), "Steering: loop_guard=2.5: "),
        (lambda: Steering(gain=2.0), "Steering: gain: unknown option; check its spelling."),
        (lambda: Steering(strength="x", floor=2), "Steering: strength='x': "),
        (lambda: Steering.paper(iterations=-1), "iterations=-1: "),
        (lambda: Steering.paper(lam=0.0), "lam=0.0: "),
    ],
)
def test_a_bad_value_is_named_with_its_field(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        build()
    assert str(raised.value).startswith(message)


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(RequestError, match=r"strength=nan: .*; floor=2: ") as raised:
        Steering(strength=math.nan, floor=2)
    assert str(raised.value).endswith(".")


@given(
    text=st.text(min_size=1).filter(str.strip),
    weight=st.floats(-10, 10),
)
def test_a_preference_survives_json(text: str, weight: float) -> None:
    preference = Preference(text, weight)
    assert preference.text == text.strip()
    assert Preference.model_validate_json(preference.model_dump_json()) == preference


@given(
    strength=st.floats(-100, 1000),
    floor=st.floats(0, 1),
    placement=st.sampled_from(PLACEMENTS),
    focus=st.floats(0, 10),
    loop_guard=st.integers(0, 1000),
)
def test_steering_survives_json(**options: Any) -> None:
    steering = Steering(**options)
    assert steering.model_dump() == options
    assert Steering.model_validate_json(steering.model_dump_json()) == steering


def test_the_json_form() -> None:
    assert json.loads(Preference("a", -1).model_dump_json()) == {"text": "a", "weight": -1.0}
    assert json.loads(Steering(strength=3).model_dump_json()) == {
        "strength": 3.0,
        "floor": 0.1,
        "placement": "user",
        "focus": 1.0,
        "loop_guard": 4,
    }


def test_both_are_frozen_and_can_be_keys() -> None:
    preference, steering = Preference("a"), Steering()
    with pytest.raises(ValidationError, match="frozen"):
        preference.text = "b"
    with pytest.raises(ValidationError, match="frozen"):
        steering.floor = 0.0
    assert {preference: 1, steering: 2}[Preference("a")] == 1


def test_the_default_and_the_papers_steering() -> None:
    assert Steering() == DEFAULT_STEERING
    assert DEFAULT_STEERING.model_dump() == {
        "strength": 0.35,
        "floor": 0.1,
        "placement": "user",
        "focus": 1.0,
        "loop_guard": 4,
    }
    paper = Steering.paper()
    assert (round(paper.strength, 4), paper.floor, paper.placement) == (4.6487, 0.0, "system")
    assert (paper.focus, paper.loop_guard) == (0.0, 0)
    assert Steering.paper(10, alpha=1.0).strength == game_gain(10, alpha=1.0)


WEIGHTS = st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3)


@given(
    weights=st.lists(WEIGHTS, min_size=1, max_size=3),
    strength=st.floats(-1, 5).filter(lambda g: abs(g) > 1e-6),
    focus=st.sampled_from([0.0, 0.5, 1.0]),
    logs=st.lists(st.floats(-9, 0), min_size=5, max_size=5),
)
def test_the_rows_weights_are_the_formulas(
    weights: list[float], strength: float, focus: float, logs: list[float]
) -> None:
    """`r + Σ s·(p − r) + g·Σ s·(p − r) + g·f·Σ s·(p − u)`, the last over what is wished for."""
    preferences = [Preference(f"wish {number}", weight) for number, weight in enumerate(weights)]
    rows, u, r = logs[: len(weights)], logs[3], logs[4]
    own = shares(preferences)
    assert sum(map(abs, own)) <= 1 + 1e-9
    expected = r + sum(s * (1 + strength) * (p - r) for s, p in zip(own, rows, strict=True))
    if strength > 0:
        held = sum(s * (p - u) for s, p in zip(own, rows, strict=True) if s > 0)
        expected += strength * focus * held
    found = row_weights(preferences, strength, focus)
    has_u = strength > 0 and focus > 0 and max(own) > 0
    assert len(found) == len(weights) + has_u
    given_rows = [*rows, u] if has_u else rows
    combined = r + sum(w * (p - r) for w, p in zip(found, given_rows, strict=True))
    assert combined == pytest.approx(expected, abs=1e-6)


def test_the_papers_weights_are_one_number() -> None:
    paper = Steering.paper()
    [weight] = row_weights([Preference("a")], paper.strength, paper.focus)
    assert weight == 1.0 + game_gain()


def test_steering_is_read_from_the_file_that_tune_writes(tmp_path: Path) -> None:
    path = tmp_path / "steering.json"
    path.write_text(Steering(strength=1.5, floor=0.2, placement="user").model_dump_json())
    assert Steering.read(path) == Steering(strength=1.5, floor=0.2, placement="user")
    path.write_text('{"strength": "high"}')
    with pytest.raises(RequestError, match="strength='high'"):
        Steering.read(path)
    path.write_text("[1]")
    with pytest.raises(RequestError, match="expected a JSON file of strength, floor"):
        Steering.read(path)
    with pytest.raises(RequestError, match=r"missing\.json"):
        Steering.read(tmp_path / "missing.json")
    for no_path in ({"strength": 0.5}, None, 0.5):
        with pytest.raises(RequestError, match=r"^steering is a \w+: expected Steering\(strength="):
            Steering.read(no_path)  # type: ignore[arg-type]


def test_a_generator_that_was_read_already_is_no_silence() -> None:
    wishes = iter(["Be brief."])
    assert normal_preferences(wishes) == (Preference("Be brief."),)
    with pytest.raises(RequestError, match="can be read only once"):
        normal_preferences(wishes)
    assert normal_preferences([]) == ()
