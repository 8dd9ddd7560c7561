"""Preferences that a program can check: the words for the model, and the check of an answer.

An empty answer keeps no rule. The checks look at the text alone, never at the model.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from amulet.errors import EvaluationError

LANGUAGES = ("de", "en", "es", "fr", "it")
ITEM = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s+\S")
BULLET = re.compile(r"^\s*[-*•–]\s+\S")
NUMBER = re.compile(r"^\s*(\d+)[.)]\s+\S")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)]|$)")
CONTRACTION = re.compile(
    r"\b(?:\w+n['’]t|(?:i|you|we|they|he|she|it|that|there|what|who|let)['’](?:m|s|re|ve|ll|d))\b",
    re.IGNORECASE,
)
PIRATE = re.compile(
    r"\b(?:arrr*|ahoy|matey|mateys|aye|ye|yer|yarr|landlubbers?|scallywags?|scurvy|booty|"
    r"treasure|ship|captain|seas?|sail\w*|pirates?|hearties|avast|doubloons?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rule:
    """A preference and its check.

    Attributes:
        name: as in `RULES`.
        preference: the words to the model, one sentence.
        check: whether an answer keeps it.
        opposite: a preference that asks for the contrary, where there is one.
    """

    name: str
    preference: str
    check: Callable[[str], bool]
    opposite: str | None = None


def words(text: str) -> list[str]:
    """Return the words of a text; digits and signs are none."""
    return WORD.findall(text)


def sentences(text: str) -> int:
    """Return how many sentences a text has; an unfinished last one counts."""
    ends = [match.end() for match in SENTENCE_END.finditer(text.strip())]
    rest = text.strip()[ends[-1] if ends else 0 :]
    return len(ends) + bool(words(rest))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _only_bullets(text: str) -> bool:
    lines = _lines(text)
    found = sum(bool(BULLET.match(line)) for line in lines)
    return found >= 2 and found * 2 >= len(lines)


def _numbered(text: str) -> bool:
    numbers = [int(m.group(1)) for line in _lines(text) if (m := NUMBER.match(line))]
    return len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))


def _capitals(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return len(letters) >= 3 and sum(c.isupper() for c in letters) >= 0.95 * len(letters)


def _lower_case(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return len(letters) >= 3 and not any(c.isupper() for c in letters)


def _in_language(code: str) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        return len(words(text)) >= 3 and _languages().classify(text)[0] == code

    return check


@cache
def _languages() -> Any:
    langid = _package("py3langid.langid")
    languages = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    languages.set_languages(list(LANGUAGES))
    return languages


@cache
def _sentiment() -> Any:
    return _package("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"This rule needs the package {name.split('.')[0]!r}: run "
            '`pip install "amulet-integrations[eval]"`.'
        ) from error


def _positive(text: str) -> bool:
    return bool(_sentiment().polarity_scores(text)["compound"] >= 0.6)


def _has_emoji(text: str) -> bool:
    return bool(_package("emoji").emoji_count(text) >= 1)


def _simple(text: str) -> bool:
    grade = _package("textstat").coleman_liau_index(text)  # letters and sentences: no dictionary
    return len(words(text)) >= 5 and grade <= 7.0


def _advanced(text: str) -> bool:
    grade = _package("textstat").coleman_liau_index(text)
    return len(words(text)) >= 20 and grade >= 13.0


def _json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        return isinstance(json.loads(inner), dict | list)
    except ValueError:
        return False


def _has(pattern: str, least: int = 1) -> Callable[[str], bool]:
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda text: len(compiled.findall(text)) >= least


def _between(least: int, most: int) -> Callable[[str], bool]:
    return lambda text: least <= len(words(text)) <= most


_ALL = (
    Rule(
        "one-sentence",
        "Answer in one short sentence.",
        lambda text: sentences(text) == 1 and 1 <= len(words(text)) <= 30,
        "Answer in great detail, with many sentences.",
    ),
    Rule(
        "few-words",
        "Answer with ten words at most.",
        _between(1, 10),
        "Answer with as many words as you can.",
    ),
    Rule(
        "two-sentences",
        "Answer in exactly two sentences.",
        lambda text: sentences(text) == 2,
        "Answer in many sentences.",
    ),
    Rule(
        "bullets",
        "Answer as a bullet list, each line starting with a dash.",
        _only_bullets,
        "Answer in flowing prose without any list.",
    ),
    Rule(
        "numbered",
        "Answer in numbered steps: 1., 2., 3.",
        _numbered,
        "Answer in flowing prose without any numbers.",
    ),
    Rule(
        "no-list",
        "Answer in plain prose, without any list.",
        lambda text: bool(words(text)) and not any(ITEM.match(line) for line in _lines(text)),
        "Answer as a list.",
    ),
    Rule(
        "capitals",
        "WRITE YOUR WHOLE ANSWER IN CAPITAL LETTERS.",
        _capitals,
        "write in lower case.",
    ),
    Rule(
        "lower-case",
        "write your whole answer in lower case letters, without any capitals.",
        _lower_case,
        "WRITE IN CAPITAL LETTERS.",
    ),
    Rule(
        "question",
        "End your answer with a question to the user.",
        lambda text: text.rstrip(" \n\"'”’*_)").endswith("?") and len(words(text)) >= 2,
        "Never ask the user anything.",
    ),
    Rule(
        "no-question",
        "Never ask a question in your answer.",
        lambda text: bool(words(text)) and "?" not in text,
        "Ask many questions.",
    ),
    Rule(
        "exclamation",
        "Be very enthusiastic and use exclamation marks!",
        lambda text: text.count("!") >= 2,
        "Be calm and dry.",
    ),
    Rule(
        "positive",
        "Be very cheerful and positive.",
        _positive,
        "Be gloomy and negative.",
    ),
    Rule("emoji", "Use emojis in your answer. 😀", _has_emoji, "Use no emojis."),
    Rule("french", "Réponds en français.", _in_language("fr"), "Answer in English."),
    Rule("spanish", "Responde en español.", _in_language("es"), "Answer in English."),
    Rule("german", "Antworte auf Deutsch.", _in_language("de"), "Answer in English."),
    Rule("italian", "Rispondi in italiano.", _in_language("it"), "Answer in English."),
    Rule(
        "simple",
        "Use short, simple words, as for a young child.",
        _simple,
        "Use long, academic words.",
    ),
    Rule(
        "academic",
        "Write in a complex, academic style with long words.",
        _advanced,
        "Use short, simple words.",
    ),
    Rule(
        "no-contractions",
        'Write formally, without contractions such as "don\'t".',
        lambda text: len(words(text)) >= 5 and not CONTRACTION.search(text),
        "Write casually, with many contractions.",
    ),
    Rule(
        "contractions",
        'Write casually, with contractions such as "don\'t" and "it\'s".',
        lambda text: len(CONTRACTION.findall(text)) >= 2,
        "Write formally, without contractions.",
    ),
    Rule(
        "name",
        "Address the user by name: Maria.",
        _has(r"\bMaria\b"),
        "Never use a name.",
    ),
    Rule(
        "formal-address",
        'Address the user as "Sir" or "Madam".',
        _has(r"\b(?:sir|madam|ma['’]am)\b"),
        "Be casual with the user.",
    ),
    Rule(
        "first-person",
        'Write in the first person, with "I" and "my".',
        _has(r"\b(?:I|my|me|I['’](?:m|ve|ll|d))\b", 2),
        "Never speak of yourself.",
    ),
    Rule(
        "pirate",
        "Talk like a pirate.",
        lambda text: len(PIRATE.findall(text)) >= 2,
        "Talk like a news reader.",
    ),
    Rule(
        "example",
        'Give an example, with the words "for example".',
        _has(r"\bfor example\b"),
        "Give no examples.",
    ),
    Rule("json", "Answer as a JSON object.", _json, "Answer in prose."),
    Rule("long", "Answer at great length.", lambda text: len(words(text)) >= 60, "Be brief."),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}

# The halves with which the library's defaults were chosen, and those on which it is reported.
DEV = ("one-sentence", "bullets", "capitals", "question", "french", "positive")
HELD_OUT = ("few-words", "numbered", "exclamation", "spanish", "pirate", "name")


def rule(name: str) -> Rule:
    """Return a rule by its name.

    Raises:
        EvaluationError: there is none; says which are close.
    """
    if name in RULES:
        return RULES[name]
    close = difflib.get_close_matches(name, RULES, n=3) or list(RULES)
    raise EvaluationError(f"{name!r} is no rule: expected such as {', '.join(close)}.")
