"""Generates passages and chats of a given length: facts about places, drawn by a seed."""

from __future__ import annotations

import random
from typing import Any

from transformers import PreTrainedTokenizerBase

STARTS = ("Ar", "Bel", "Cor", "Dun", "Esk", "Fal", "Gar", "Hol", "Inver", "Kil", "Lan", "Mor")
ENDS = ("by", "dale", "ford", "ham", "mouth", "ness", "stead", "ton", "wick", "worth")
KINDS = ("lighthouse", "mill", "library", "bridge", "market hall", "chapel", "ferry", "school")
PEOPLE = ("a retired teacher", "two brothers", "the parish", "a glass maker", "the harbour guild")
FACTS = (
    "The {kind} of {place} was built in {year} by {people} and stands {small} metres high.",
    "It opens at {hour} in the morning, closes at {late} in the evening, and costs {small} crowns.",
    "A fire in {later} took the roof, which was made again of oak from the woods of {other}.",
    "On the first Sunday of the month a guide tells its history for up to {small} visitors.",
    "From {other} a path of {hour} kilometres leads there along the river.",
    "Its bell weighs {year} kilograms and was cast in {other} in {later}.",
    "Nobody has lived there since {later}, when {people} moved to {other} for good.",
    "In winter the door is locked, and the key hangs in the bakery of {other}.",
    "Painters come for the view over {other}, best in the hour before sunset.",
    "The cellar was used as a prison for {small} years and may not be entered today.",
    "Children under {hour} pay nothing if they can name the three colours of its flag.",
    "Storks nest on the chimney, so the fireplace stays cold from March to September.",
    "A book about it, written by {people}, is sold at the entrance for {hour} crowns.",
    "Its walls are of grey stone that was brought by ship from {other}.",
    "Dogs must wait outside, where {people} put up a bowl and a roof for them.",
    "The last repair lasted {late} years and found a wall painting from {year}.",
)

Chat = list[dict[str, Any]]


def passages(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int = 0) -> str:
    """Return numbered passages of at most, and nearly, this many tokens."""
    draw = random.Random(seed)
    text, number = "", 0
    while True:
        number += 1
        for fact in _passage(draw, number):
            longer = f"{text}{fact}"
            if len(tokenizer.encode(longer, add_special_tokens=False)) > tokens:
                return text.strip()
            text = longer


def _passage(draw: random.Random, number: int) -> list[str]:
    kind, people = draw.choice(KINDS), draw.choice(PEOPLE)
    place, other = (draw.choice(STARTS) + draw.choice(ENDS) for _ in range(2))
    year, facts = draw.randint(1500, 1850), [FACTS[0], *draw.sample(FACTS[1:], 3)]
    lines = [
        fact.format(
            kind=kind,
            people=people,
            place=place,
            other=other,
            year=year,
            later=year + draw.randint(10, 150),
            small=draw.randint(12, 60),
            hour=draw.randint(5, 11),
            late=draw.randint(4, 9),
        )
        for fact in facts
    ]
    return [f"\n\nPassage {number}. {lines[0]}", *(f" {line}" for line in lines[1:])]


def rag_chat(tokenizer: PreTrainedTokenizerBase, tokens: int, question: str, seed: int = 0) -> Chat:
    """Return a chat of one user turn, passages then question, with a text of this many tokens."""
    spare = len(tokenizer.encode(question, add_special_tokens=False)) + 32  # and the template
    text = passages(tokenizer, max(tokens - spare, 32), seed)
    return [{"role": "user", "content": f"{text}\n\n{question}"}]
