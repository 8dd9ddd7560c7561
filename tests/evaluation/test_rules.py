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
SEA = "The sea is salty. A captain and his ship sail the sea for treasure."
STEPS = "1. Boil water.\n2. Add tea."
CASES: dict[str, tuple[list[str], list[str]]] = {
    "one-sentence": (
        ["Tea is a drink.", "Tea", "It is 3.5 metres long.", "**Tea is hot.**", "Dr. Fox drinks."],
        [
            PROSE,
            "Tea is " + "very " * 40 + "good.",
            "Yes. No.",
            "# Tea\n\n- hot\n- good",
            "**A.** B.",
        ],
    ),
    "few-words": (
        ["Tea is a drink.", "Yes!", "1984", "42.", "**7 days**", "1. tea\n2. milk"],
        [PROSE, "1 2 3 4 5 6 7 8 9 10 11", "!!!", "- - -"],
    ),
    "two-sentences": (
        [
            "Tea is good. I like it.",
            "Is it? It is",
            "1. Tea is hot.\n2. I like it.",
            "**Yes.** No.",
        ],
        ["Tea is good.", PROSE, "Mr. Fox likes tea.", "It costs 3.50, e.g. here."],
    ),
    "bullets": (
        [
            "- tea\n- milk",
            "You need:\n\n- tea\n- milk\n- water",
            "* a\n* b",
            "-tea\n-milk",
            "• a\n• b",
        ],
        [
            "- tea",
            PROSE,
            "1. tea\n2. milk",
            "Tea - and milk - are good.",
            "-5\n-6",
            "So:\n- \n- \n- ",
        ],
    ),
    "numbered": (
        [
            STEPS,
            "Do this:\n1) Boil\n2) Pour\n3) Drink",
            "**1.** Boil\n**2.** Pour",
            "# 1. Tea\n# 2. Milk",
        ],
        [
            "1. Boil water.",
            "1. Boil\n1. Pour",
            "2. Boil\n3. Pour",
            PROSE,
            "1.5 cups\n2.5 cups",
            "1.\n2.",
        ],
    ),
    "no-list": (
        [PROSE, "In 1. place", "It was in\n1984. It was cold.", "**Tea** is hot."],
        ["- tea\n- milk", "So:\n1. Boil\n2. Pour", "**1.** Boil"],
    ),
    "list": (
        ["- tea\n- milk", "So:\n1. Boil\n2. Pour", "**1.** Boil\n**2.** Pour"],
        [PROSE, "- tea", "tea, milk"],
    ),
    "capitals": (
        ["TEA IS GOOD.", "TEA: 5 CUPS!", "**ÉTÉ ET THÉ**"],
        [PROSE, "TEA is good", "12", "茶茶茶"],
    ),
    "lower-case": (["tea is good.", "**tea** at 5"], [PROSE, "teA", "42", "茶茶茶"]),
    "question": (
        [
            "Tea is good. Do you like it?",
            'He asked: "Do you like it?"',
            "**Like it?**",
            "Like it? 😀",
            "Like it?!",
        ],
        ["Do you like it? I do.", PROSE, "?", "Do you like it? 5.", "Like it?..."],
    ),
    "no-question": ([PROSE, "12345"], ["Do you like it? I do.", "...", "好吗？"]),
    "exclamation": (
        ["Tea is great! I love it!", "Wow!!", "**5 cups!**\n**Yes!**"],
        ["Great!", PROSE, "!!!!", "5 != 4 and 3 != 2"],
    ),
    "positive": (
        ["I love this wonderful, happy day, it is a great joy!", "**Great** and wonderful, 10/10!"],
        [PROSE, "A sad, terrible and awful day.", "42", "That is not good at all."],
    ),
    "emoji": (["Tea is good 🍵", "**❤️**"], [PROSE, "Tea is good :-)", "Tea™ © 2020", "* → 5"]),
    "french": (
        [
            "Le thé est une boisson chaude que beaucoup de gens aiment boire le matin.",
            "**Il y a 7 jours** dans une semaine.",
        ],
        [PROSE, "El té es una bebida caliente que le gusta a mucha gente.", "Oui.", "1 2 3"],
    ),
    "spanish": (
        [
            "El té es una bebida caliente que le gusta a mucha gente por la mañana.",
            "- Hay 7 días en una semana\n- Hay 12 meses en un año",
        ],
        [
            PROSE,
            "Le thé est une boisson chaude que beaucoup de gens aiment.",
            "Sí.",
            "Você deve dormir mais cedo e não beber café.",
        ],
    ),
    "german": (
        [
            "Tee ist ein heißes Getränk, das viele Menschen am Morgen gerne trinken.",
            "**Eine Woche** hat 7 Tage und ein Jahr 12 Monate.",
        ],
        [PROSE, "Ja.", "Le thé est une boisson chaude que beaucoup de gens aiment."],
    ),
    "italian": (
        [
            "Il tè è una bevanda calda che piace a molte persone la mattina.",
            "**Una settimana** ha 7 giorni e un anno ha 12 mesi.",
        ],
        [PROSE, "Sì.", "El té es una bebida caliente que le gusta a mucha gente."],
    ),
    "simple": (
        ["The cat sat on the mat. It was a big cat. It ate a fish.", "**We eat** 3 times a day."],
        [ACADEMIC, "A cat.", "1 2 3 4 5 6"],
    ),
    "academic": (
        [ACADEMIC, f"**{ACADEMIC}**"],
        [PROSE, "Photosynthesis.", "word " * 30, "1 " * 30],
    ),
    "no-contractions": (
        [PROSE, "It is the cat's own tea.", "It is **not** 5 o'clock."],
        ["I don't like hot tea.", "Tea.", "I could’ve had some tea.", "Here's the tea for you."],
    ),
    "contractions": (
        ["I don't know, it's tea.", "**Don’t** ask, he’ll come at 5."],
        ["It's tea.", PROSE, "The cat's and dog's."],
    ),
    "name": (
        ["Well, Maria, tea is good.", "**Maria**, 5 cups.", "El té, María."],
        ["Well, Marian, tea is good.", PROSE],
    ),
    "formal-address": (
        ["Yes, Sir, it is.", "Of course, madam.", "**Sir**: 5 cups.", "Dear sir or madam"],
        ["The sirens sound.", PROSE, "Sir Isaac Newton saw an apple."],
    ),
    "first-person": (
        ["I like my tea.", "I'm me.", "**My** tea is mine, 5 cups.", "MY TEA AND ME"],
        ["I like tea.", PROSE, "Tea, i.e. a drink, i.e. hot.", "A.I. and I/O"],
    ),
    "pirate": (
        ["Ahoy, matey!", "Arrr, ye be right.", "**Aye**, the ship has 5 cups."],
        ["Ahoy!", PROSE, SEA],
    ),
    "example": (
        ["Try fruit, for example apples.", "**For example**, 5 cups.", "For\nexample: tea"],
        [PROSE, "For instance, tea."],
    ),
    "no-you": (
        [PROSE, "Young people drink 5 cups a day."],
        ["Do as you like with the tea.", "Tea."],
    ),
    "json": (
        ['{"tea": 1}', '```json\n{"tea": [1, 2]}\n```'],
        [PROSE, "3", '{"tea": }', "[1, 2]", "{}", '{"tea": NaN}', 'Here: {"tea": 1}'],
    ),
    "long": ([LONG, "- tea is 1 drink\n" * 20], [PROSE, "word " * 59, "- - -" * 60]),
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
    with pytest.raises(
        EvaluationError, match=r"no rule 'bulets'.*one-sentence, .*, long .*mean 'bullets'"
    ):
        rule("bulets")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't count 3 or x: l'été!", ["Don't", "count", "3", "or", "x", "l'été"]),
        ("1. tea\n2) **milk**\n- 3.5 cups of 1,000", ["tea", "milk", "3.5", "cups", "of", "1,000"]),
        ("1984.", ["1984"]),
        ("--- !!! 😀 _", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Hi", 1),
        ("Hi.", 1),
        ('He said "no." Then', 2),
        ("Pi is 3.14.", 1),
        ("A?! B…", 2),
        ("**Tea is hot.** It is.", 2),
        ("# Tea\n1. It is hot.\n2. It is wet", 3),
        ("Dr. Fox drinks, e.g. tea, at 7 a.m. in the U.S. with friends.", 1),
        ("He came at 7 a.m. He left.", 2),
        ("茶很好。我喜欢。", 2),
        ("...", 0),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count
