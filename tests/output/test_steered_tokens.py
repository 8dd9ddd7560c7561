"""What is steered: text for the reader, on scripted sections and grammars."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amulet import Grammar
from amulet.decoding.generation import Generation
from amulet.output.sections import Section
from amulet.output.steered_tokens import Policy, is_answer_steered, is_token_steered
from amulet.request import Request

VOCAB, END = 8, 7
CHOICE, OTHER = Grammar.choice(["yes"]), Grammar.choice(["no"])


class Script:
    """A grammar that permits so many of the ids at each step, and completes after the last."""

    def __init__(self, *permitted: int) -> None:
        self._permitted = list(permitted)
        self.consumed: list[int] = []

    @property
    def complete(self) -> bool:
        return len(self.consumed) == len(self._permitted)

    def allowed(self) -> torch.Tensor:
        return torch.arange(VOCAB) < self._permitted[len(self.consumed)]

    def consume(self, token_id: int) -> None:
        self.consumed.append(token_id)


def led(matcher: Any = None, weights: tuple[float, ...] = (2.0, -1.0)) -> tuple[Generation, Policy]:
    rows = [[1], [2], [3]][: len(weights) + 1]
    generation = Generation(rows, weights, floor=0.1, end_ids=frozenset({END}))
    return generation, Policy(generation, matcher)


def settings(generation: Generation) -> tuple[tuple[float, ...], float]:
    return tuple(generation.weights), generation.floor


def test_only_the_text_for_the_reader_is_steered() -> None:
    generation, policy = led()
    sections: list[Section] = ["reasoning", "text", "call", "text"]
    found = []
    for section in sections:
        policy.prepare(section)
        found.append(settings(generation))
        assert policy.took(0, section) is False
    plain, steered = ((0.0, 0.0), 0.0), ((2.0, -1.0), 0.1)
    assert found == [plain, steered, plain, steered]
    assert generation.allowed is None


def test_under_a_grammar_text_is_steered_where_half_of_the_ids_are_permitted() -> None:
    matcher = Script(VOCAB, 4, 3, 1)
    generation, policy = led(matcher)
    found, complete = [], []
    for token in range(4):
        policy.prepare("text")
        assert generation.allowed is not None
        permitted = generation.allowed()
        assert permitted is not None
        found.append((int(permitted.sum()), any(generation.weights), generation.floor))
        complete.append(policy.took(token, "text"))
    assert found == [(8, True, 0.1), (4, True, 0.1), (3, False, 0.0), (1, False, 0.0)]
    assert complete == [False, False, False, True]
    assert matcher.consumed == [0, 1, 2, 3]


def test_reasoning_is_outside_of_the_grammar_but_may_not_end_the_answer() -> None:
    matcher = Script(1)
    generation, policy = led(matcher)
    policy.prepare("reasoning")
    assert generation.allowed is not None
    permitted = generation.allowed()
    assert permitted is not None
    assert permitted.tolist() == [True] * 7 + [False]
    assert policy.took(5, "reasoning") is False
    assert matcher.consumed == []
    assert settings(generation) == ((0.0, 0.0), 0.0)


def test_a_plain_answer_keeps_its_rows_as_they_are() -> None:
    generation, policy = led(Script(1), ())
    policy.prepare("text")
    assert settings(generation) == ((), 0.1)


@pytest.mark.parametrize(
    ("section", "permitted", "steered"),
    [
        ("text", None, True),
        ("text", 4, True),
        ("text", 3, False),
        ("reasoning", None, False),
        ("reasoning", VOCAB, False),
        ("call", None, False),
    ],
)
def test_the_rule_for_a_token(section: Section, permitted: int | None, steered: bool) -> None:
    mask = None if permitted is None else torch.arange(VOCAB) < permitted
    assert is_token_steered(section, mask) is steered


@pytest.mark.parametrize(
    ("own", "steer_grammar", "grammar", "steered"),
    [
        (None, False, None, True),
        (CHOICE, False, CHOICE, False),
        (CHOICE, True, CHOICE, True),
        (CHOICE, True, OTHER, False),  # a grammar of tool calls, made of the request's own
        (None, True, OTHER, False),
    ],
)
def test_the_rule_for_an_answer(
    own: Grammar | None, steer_grammar: bool, grammar: Grammar | None, steered: bool
) -> None:
    request = Request(prompt="x", grammar=own, steer_grammar=steer_grammar)
    assert is_answer_steered(request, grammar) is steered
