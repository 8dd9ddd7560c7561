"""A reply's pieces concatenate to what its reader sees, whatever the tokens cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, Reply, TokenTrace
from amulet.rendering.pieces import BOUNDS, Piece, harmless, pieces_of
from tests.models import byte_tokenizer, random_model
from tests.rendering.replies import reply, token

PARTIAL = token("\N{REPLACEMENT CHARACTER}", 1.0)


def texts(given: Reply) -> list[tuple[str, int]]:
    """The pieces' texts, and how many tokens wrote each."""
    return [(piece.text, len(piece.tokens)) for piece in pieces_of(given)]


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Hi you", ["Hi", " you", "<|im_end|>"], [("Hi", 1), (" you", 1)]),
        ("Hi", ["Hi", "\n\nQ"], [("Hi", 1)]),  # a stop string was cut off
        ("Hi th", ["Hi", " there"], [("Hi", 1), (" th", 1)]),  # and one within a token
        ("Hi you", ["Hi", "you"], [("Hi", 1), (" you", 1)]),  # SentencePiece decodes so
        ("Hi", ["", "Hi", ""], [("Hi", 1)]),
        ("Hi", ["Hello"], [("Hi", 0)]),  # a trace that says something else
        ("", ["<|im_end|>"], []),
    ],
)
def test_tokens_are_found_in_the_text(
    text: str, tokens: list[str], expected: list[tuple[str, int]]
) -> None:
    assert texts(reply(text, *map(token, tokens))) == expected


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("a🌍b", [token("a"), PARTIAL, PARTIAL, PARTIAL, token("b")], [1, 3, 1]),
        ("🌍", [PARTIAL, PARTIAL], [2]),
        ("a🌍🌟", [token("a"), PARTIAL, PARTIAL, PARTIAL, PARTIAL], [1, 4]),
        ("a\N{REPLACEMENT CHARACTER}", [token("a"), PARTIAL], [1, 1]),  # cut off within one
    ],
)
def test_the_tokens_of_one_character_stay_together(
    text: str, tokens: list[TokenTrace], expected: list[int]
) -> None:
    found = texts(reply(text, *tokens))
    assert [count for _, count in found] == expected
    assert "".join(piece for piece, _ in found) == text


def test_reasoning_comes_first_and_is_told_apart() -> None:
    given = reply(
        "Eight.",
        *map(token, ["<think>", "Eight", " it is", "</think>", "\n\n", "Eight", "."]),
        reasoning="Eight it is",
    )
    assert [(piece.text, piece.is_reasoning) for piece in pieces_of(given)] == [
        ("Eight", True),
        (" it is", True),
        ("Eight", False),
        (".", False),
    ]


def test_without_a_trace_the_text_is_one_piece() -> None:
    given = reply("Hi you", reasoning="Hm")
    assert pieces_of(given) == [Piece("Hm", is_reasoning=True), Piece("Hi you")]


def test_pieces_of_a_decoded_answer_add_up_to_it() -> None:
    """Random weights emit bytes that are rarely whole characters."""
    amulet = Amulet(random_model("qwen2"), byte_tokenizer())
    messages = [{"role": "user", "content": "What is tea?"}]
    given = amulet.chat(messages, preference="Be brief.", trace=True, max_new_tokens=60)
    shown = pieces_of(given)
    assert "".join(piece.text for piece in shown) == given.text
    assert sum(bool(piece.tokens) for piece in shown) > 10


def test_a_real_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Tee für 3 €: 茶 🍵."
    written = [tokenizer.decode([id_]) for id_ in tokenizer.encode(text, add_special_tokens=False)]
    shown = pieces_of(reply(text, *map(token, written)))
    assert "".join(piece.text for piece in shown) == text
    assert [piece.text for piece in shown if len(piece.tokens) > 1] == ["ü", "€", "茶", "🍵"]


@pytest.mark.parametrize(
    ("raised", "level"),
    [(0.0, 0), (BOUNDS[0] - 0.01, 0), *zip(BOUNDS, (1, 2, 3, 4), strict=True), (99.0, 4),
     (-BOUNDS[1], -2), (-99.0, -4), (math.inf, 4), (-math.inf, -4)],
)  # fmt: skip
def test_levels(raised: float, level: int) -> None:
    assert Piece("x", (token("x", raised, base=0.0),)).level == level


def test_what_is_unknown_has_no_colour() -> None:
    unknown = replace(token("x"), base=-math.inf, steered=-math.inf)
    assert Piece("x", (unknown,)).level == Piece("x").level == 0


def test_a_piece_of_several_tokens_is_raised_by_their_sum() -> None:
    piece = Piece("x", (token("a", 1.0), token("b", 2.0, unsteered="c")))
    assert (piece.raised, piece.differs, piece.unsteered) == (3.0, True, "ac")


def test_control_characters_are_cut() -> None:
    given = "a\tb\nc\x00\x1b[2J\x7f\x9b\u202egnp.exe\u2066\u2069"
    mark = "\N{REPLACEMENT CHARACTER}"
    assert harmless(given) == f"a\tb\nc{mark}{mark}[2J{mark}{mark}{mark}gnp.exe{mark}{mark}"
