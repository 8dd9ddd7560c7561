"""Each rule on answers that keep it and answers that don't."""

from __future__ import annotations

import pytest

from amulet.errors import EvaluationError
from amulet.evaluation.rules import DEV, HELD_OUT, RULES, rule, sentences, words

LONG = "The history of the village is long, and " * 12 + "it ends here."
ACADEMIC = (
    "Photosynthesis constitutes an extraordinarily sophisticated biochemical transformation, "
    "whereby photoautotrophic organisms systematically convert electromagnetic radiation into "
    "carbohydrate molecules, releasing molecular oxygen."
)
PROSE = "Tea is a drink. It is made of leaves and hot water. Many people like it."
CASES: dict[str, tuple[list[str], list[str]]] = {
    "one-sentence": (
        ["Tea is a drink.", "Tea", "It is 3.5 metres long."],
        [PROSE, "Tea is " + "very " * 40 + "good.", "Yes. No."],
    ),
    "few-words": (["Tea is a drink.", "Yes!"], [PROSE, "12345"]),
    "two-sentences": (["Tea is good. I like it.", "Is it? It is"], ["Tea is good.", PROSE]),
    "bullets": (
        ["- tea\n- milk", "You need:\n\n- tea\n- milk\n- water", "* a\n* b"],
        ["- tea", PROSE, "1. tea\n2. milk", "Tea - and milk - are good."],
    ),
    "numbered": (
        ["1. Boil water.\n2. Add tea.", "Do this:\n1) Boil\n2) Pour\n3) Drink"],
        ["1. Boil water.", "1. Boil\n1. Pour", "2. Boil\n3. Pour", PROSE],
    ),
    "no-list": ([PROSE, "In 1. place"], ["- tea\n- milk", "So:\n1. Boil\n2. Pour"]),
    "capitals": (["TEA IS GOOD.", "TEA: 5 CUPS!"], [PROSE, "TEA is good", "12"]),
    "lower-case": (["tea is good."], [PROSE, "teA", "42"]),
    "question": (
        ["Tea is good. Do you like it?", 'He asked: "Do you like it?"'],
        ["Do you like it? I do.", PROSE, "?"],
    ),
    "no-question": ([PROSE], ["Do you like it? I do.", "..."]),
    "exclamation": (["Tea is great! I love it!", "Wow!!"], ["Great!", PROSE]),
    "positive": (
        ["I love this wonderful, happy day, it is a great joy!"],
        [PROSE, "A sad, terrible and awful day."],
    ),
    "emoji": (["Tea is good 🍵"], [PROSE, "Tea is good :-)"]),
    "french": (
        ["Le thé est une boisson chaude que beaucoup de gens aiment boire le matin."],
        [PROSE, "El té es una bebida caliente que le gusta a mucha gente.", "Oui."],
    ),
    "spanish": (
        ["El té es una bebida caliente que le gusta a mucha gente por la mañana."],
        [PROSE, "Le thé est une boisson chaude que beaucoup de gens aiment."],
    ),
    "german": (
        ["Tee ist ein heißes Getränk, das viele Menschen am Morgen gerne trinken."],
        [PROSE],
    ),
    "italian": (
        ["Il tè è una bevanda calda che piace a molte persone la mattina."],
        [PROSE],
    ),
    "simple": (
        ["The cat sat on the mat. It was a big cat. It ate a fish."],
        [ACADEMIC, "A cat."],
    ),
    "academic": ([ACADEMIC], [PROSE, "Photosynthesis."]),
    "no-contractions": ([PROSE, "It is the cat's own tea."], ["I don't like hot tea.", "Tea."]),
    "contractions": (["I don't know, it's tea."], ["It's tea.", PROSE, "The cat's and dog's."]),
    "name": (["Well, Maria, tea is good."], ["Well, Marian, tea is good.", PROSE]),
    "formal-address": (["Yes, Sir, it is.", "Of course, madam."], ["The sirens sound.", PROSE]),
    "first-person": (["I like my tea."], ["I like tea.", PROSE]),
    "pirate": (["Ahoy, matey!", "Arrr, ye be right."], ["Ahoy!", PROSE]),
    "example": (["Try fruit, for example apples."], [PROSE]),
    "json": (['{"tea": 1}', "```json\n[1, 2]\n```"], [PROSE, "3", '{"tea": }']),
    "long": ([LONG], [PROSE]),
}


def test_every_rule_has_its_cases() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_tells_kept_from_broken(name: str) -> None:
    kept, broken = CASES[name]
    for text in kept:
        assert rule(name).check(text), text
    for text in [*broken, "", "  \n "]:
        assert not rule(name).check(text), text


def test_the_halves_are_rules_and_share_none() -> None:
    assert len(DEV) == len(HELD_OUT) == 6
    assert not set(DEV) & set(HELD_OUT)
    assert set(DEV + HELD_OUT) <= set(RULES)
    assert all(rule(name).opposite for name in DEV + HELD_OUT)


def test_an_unknown_rule_names_its_neighbours() -> None:
    with pytest.raises(EvaluationError, match="'bulets' is no rule: expected such as bullets"):
        rule("bulets")


def test_words_and_sentences() -> None:
    assert words("Don't count 3 or x: l'été!") == ["Don't", "count", "or", "x", "l'été"]
    counted = [
        sentences(t) for t in ("", "Hi", "Hi.", 'He said "no." Then', "Pi is 3.14.", "A?! B…")
    ]
    assert counted == [0, 1, 1, 2, 1, 2]
