"""Preferences that a program can check: the text for the model, and the check of an answer.

An empty answer satisfies no rule. The checks use only the text, never the model.
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

LANGUAGES = (
    "de",
    "en",
    "es",
    "fr",
    "it",
    "pt",
)  # without pt, Portuguese would be taken for Spanish
MARKS = r"[ \t>#*_]*"  # a quote, heading or bold mark may precede an item's own mark
ITEM = re.compile(rf"^{MARKS}(?:[-*•–]|\d{{1,2}}[.)])[*_]*\s+\S")
BULLET = re.compile(r"^\s*(?:[-*•–]\s+\S|[-•–][^\W\d_])")
NUMBER = re.compile(rf"^{MARKS}(\d+)[.)](?!\d)[*_]*\s*[^\s\d]")
WORD = re.compile(r"[^\W_]+(?:['’.,][^\W_]+)*")
MARK = re.compile(rf"^{MARKS}(?:[-•–]\s+|\d{{1,2}}[.)](?!\d)\s*(?=\S))?{MARKS}")
# Dots that don't end a sentence: of titles, of "e.g.", of initials before a lower-case word.
DOTTED = re.compile(
    r"\b(?:(?:Dr|Mr|Mrs|Ms|Prof|St|vs|approx)\.|(?i:e\.\s?g\.|i\.\s?e\.)|"
    r"(?:[A-Za-z]\.){2,}(?=\W*\s[^\W\d_A-Z])|[A-Z]\.(?=[A-Z]\.))"
)
SENTENCE_END = re.compile(r"(?:[.!?…]+(?=[\s\"'”’)*_]|$)|[。！？]+)[\"'”’)*_]*")
CONTRACTION = re.compile(
    r"\b(?:\w+n['’]t|(?:could|should|would|might|must)['’]ve|y['’]all|"
    r"(?:i|you|we|they|he|she|it|that|there|here|what|who|how|where|when|let)"
    r"['’](?:m|s|re|ve|ll|d))\b",
    re.IGNORECASE,
)
QUESTION = re.compile(r"[?？]!*[^\w?!.？]*$")  # quotes, bold marks or an emoji may follow
# Nautical words alone are not enough, because an answer about ships has them, too.
PIRATE = re.compile(
    r"\b(?:arrr*|ahoy|matey|mateys|aye|ye|yer|yarr|landlubbers?|scallywags?|scurvy|hearties|avast|"
    r"doubloons?)\b",
    re.IGNORECASE,
)
SEA = re.compile(r"\b(?:booty|treasure|ship|captain|seas?|sail\w*|pirates?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """A preference and its check.

    Attributes:
        name: its key in `RULES`.
        preference: the text for the model, one sentence.
        checks: a description of what is checked.
        check: tells whether an answer satisfies the rule.
        opposite: the opposite preference, if there is one.
    """

    name: str
    preference: str
    checks: str
    check: Callable[[str], bool]
    opposite: str | None = None


def words(text: str) -> list[str]:
    """Return the words and numbers of a text, without the numbers of list items."""
    return WORD.findall("\n".join(MARK.sub("", line) for line in text.splitlines()))


def sentences(text: str) -> int:
    """Return the number of sentences of a text.

    A sentence without a full stop counts, too, and ends with its line, as in headings and lists.
    """
    count = 0
    for line in _lines(text):
        line = DOTTED.sub(lambda match: match.group().replace(".", ""), MARK.sub("", line))
        pieces = SENTENCE_END.split(line)
        count += sum(bool(words(piece)) for piece in pieces)
    return count


def _spelled(text: str) -> int:
    """Return the number of words with a letter; numbers belong to no language."""
    return sum(any(c.isalpha() for c in word) for word in words(text))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _bullets(text: str) -> bool:
    lines = _lines(text)
    found = sum(bool(BULLET.match(line)) for line in lines)  # an introduction is permitted
    return found >= 2 and found * 2 >= len(lines)


def _numbered(text: str) -> bool:
    numbers = [int(m.group(1)) for line in _lines(text) if (m := NUMBER.match(line))]
    return len(numbers) >= 2 and numbers == list(range(1, len(numbers) + 1))


def _capitals(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return len(letters) >= 3 and sum(c.isupper() for c in letters) >= 0.95 * len(letters)


def _lower_case(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return sum(c.islower() for c in letters) >= 3 and not any(c.isupper() for c in letters)


def _in_language(code: str) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        return _spelled(text) >= 3 and _languages().classify(text)[0] == code

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
    found = {entry["emoji"] for entry in _package("emoji").emoji_list(text)}
    return bool(found - {"©", "®", "™"})  # emojis by Unicode, but used as legal signs


def _simple(text: str) -> bool:
    grade = _package("textstat").coleman_liau_index(
        text
    )  # uses letters and sentences, no dictionary
    return _spelled(text) >= 5 and grade <= 7.0


def _advanced(text: str) -> bool:
    grade = _package("textstat").coleman_liau_index(text)
    return _spelled(text) >= 20 and grade >= 13.0


def _json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        found = json.loads(inner, parse_constant=_no_constant)
    except ValueError:
        return False
    return isinstance(found, dict) and bool(found)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")


def _question(text: str) -> bool:
    return len(words(text)) >= 2 and QUESTION.search(text.rstrip()) is not None


def _pirate(text: str) -> bool:
    own = len(PIRATE.findall(text))
    return own >= 1 and own + len(SEA.findall(text)) >= 2


def _has(pattern: str, least: int = 1) -> Callable[[str], bool]:
    compiled = re.compile(pattern, re.IGNORECASE)
    return lambda text: len(compiled.findall(text)) >= least


def _between(least: int, most: int) -> Callable[[str], bool]:
    return lambda text: least <= len(words(text)) <= most


_ALL = (
    Rule(
        "one-sentence",
        "Answer in one short sentence.",
        "one sentence of 30 words at most",
        lambda text: sentences(text) == 1 and 1 <= len(words(text)) <= 30,
        "Answer in great detail, with many sentences.",
    ),
    Rule(
        "few-words",
        "Answer with ten words at most.",
        "ten words at most",
        _between(1, 10),
        "Answer with as many words as you can.",
    ),
    Rule(
        "two-sentences",
        "Answer in exactly two sentences.",
        "two sentences",
        lambda text: sentences(text) == 2,
        "Answer in many sentences.",
    ),
    Rule(
        "bullets",
        "Answer as a bullet list, each line starting with a dash.",
        "two lines or more, and half of all, begin with a bullet",
        _bullets,
        "Answer in flowing prose without any list.",
    ),
    Rule(
        "numbered",
        "Answer in numbered steps: 1., 2., 3.",
        "two lines or more begin with numbers that count up from 1",
        _numbered,
        "Answer in flowing prose without any numbers.",
    ),
    Rule(
        "no-list",
        "Answer in plain prose, without any list.",
        "no line begins with a bullet or a number",
        lambda text: bool(words(text)) and not any(ITEM.match(line) for line in _lines(text)),
        "Answer as a list.",
    ),
    Rule(
        "capitals",
        "WRITE YOUR WHOLE ANSWER IN CAPITAL LETTERS.",
        "95 % of the letters are capitals",
        _capitals,
        "write in lower case.",
    ),
    Rule(
        "lower-case",
        "write your whole answer in lower case letters, without any capitals.",
        "no capital letter",
        _lower_case,
        "WRITE IN CAPITAL LETTERS.",
    ),
    Rule(
        "question",
        "End your answer with a question to the user.",
        "the last sentence ends with a question mark",
        _question,
        "Never ask the user anything.",
    ),
    Rule(
        "no-question",
        "Never ask a question in your answer.",
        "no question mark",
        lambda text: bool(words(text)) and not re.search("[?？]", text),
        "Ask many questions.",
    ),
    Rule(
        "exclamation",
        "Be very enthusiastic and use exclamation marks!",
        "two exclamation marks or more",
        lambda text: bool(words(text)) and len(re.findall("!(?!=)", text)) >= 2,
        "Be calm and dry.",
    ),
    Rule(
        "positive",
        "Be very cheerful and positive.",
        "VADER's sentiment is .6 or more",
        _positive,
        "Be gloomy and negative.",
    ),
    Rule(
        "emoji", "Use emojis in your answer. 😀", "an emoji or more", _has_emoji, "Use no emojis."
    ),
    Rule(
        "french",
        "Réponds en français.",
        "py3langid finds French",
        _in_language("fr"),
        "Answer in English.",
    ),
    Rule(
        "spanish",
        "Responde en español.",
        "py3langid finds Spanish",
        _in_language("es"),
        "Answer in English.",
    ),
    Rule(
        "german",
        "Antworte auf Deutsch.",
        "py3langid finds German",
        _in_language("de"),
        "Answer in English.",
    ),
    Rule(
        "italian",
        "Rispondi in italiano.",
        "py3langid finds Italian",
        _in_language("it"),
        "Answer in English.",
    ),
    Rule(
        "simple",
        "Use short, simple words, as for a young child.",
        "Coleman-Liau grade of 7 or less",
        _simple,
        "Use long, academic words.",
    ),
    Rule(
        "academic",
        "Write in a complex, academic style with long words.",
        "Coleman-Liau grade of 13 or more",
        _advanced,
        "Use short, simple words.",
    ),
    Rule(
        "no-contractions",
        'Write formally, without contractions such as "don\'t".',
        "five words or more and no contraction",
        lambda text: len(words(text)) >= 5 and not CONTRACTION.search(text),
        "Write casually, with many contractions.",
    ),
    Rule(
        "contractions",
        'Write casually, with contractions such as "don\'t" and "it\'s".',
        "two contractions or more",
        lambda text: len(CONTRACTION.findall(text)) >= 2,
        "Write formally, without contractions.",
    ),
    Rule(
        "name",
        "Address the user by name: Maria.",
        'the name "Maria"',
        _has(r"\bMar[ií]a\b"),
        "Never use a name.",
    ),
    Rule(
        "formal-address",
        'Address the user as "Sir" or "Madam".',
        '"sir", "madam" or "ma\'am"',
        _has(r"\b(?:sir(?!\s+(?-i:[A-Z]))|madam|ma['’]am)\b"),
        "Be casual with the user.",
    ),
    Rule(
        "first-person",
        'Write in the first person, with "I" and "my".',
        'two of "I", "my", "me", "mine" and "myself"',
        _has(r"(?<![\w./])(?:(?-i:I)(?![\w./])|(?:my|me|mine|myself)\b)", 2),
        "Never speak of yourself.",
    ),
    Rule(
        "pirate",
        "Talk like a pirate.",
        "a pirate's word, and a second one or a word of the sea",
        _pirate,
        "Talk like a news reader.",
    ),
    Rule(
        "example",
        'Give an example, with the words "for example".',
        'the words "for example"',
        _has(r"\bfor\s+example\b"),
        "Give no examples.",
    ),
    Rule(
        "no-you",
        'Never use the word "you" in your answer.',
        'five words or more, none of them "you"',
        lambda text: len(words(text)) >= 5 and not re.search(r"\byou\b", text, re.IGNORECASE),
        'Use the word "you" often.',
    ),
    Rule(
        "list",
        "Answer as a list, with one item per line.",
        "two lines or more begin with a bullet or a number",
        lambda text: sum(bool(ITEM.match(line)) for line in _lines(text)) >= 2,
        "Answer in flowing prose without any list.",
    ),
    Rule(
        "json",
        "Answer as a JSON object.",
        "a JSON object that is not empty, alone or in a code block",
        _json,
        "Answer in prose.",
    ),
    Rule(
        "long",
        "Answer at great length.",
        "60 words or more",
        lambda text: len(words(text)) >= 60,
        "Be brief.",
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}

# The half for choosing the library's defaults, and the held-out half for reporting.
DEV = ("one-sentence", "bullets", "capitals", "question", "french", "positive")
HELD_OUT = ("few-words", "numbered", "exclamation", "spanish", "pirate", "name")


def rule(name: str) -> Rule:
    """Return a rule by its name.

    Raises:
        EvaluationError: there is no such rule; suggests close names.
    """
    if name in RULES:
        return RULES[name]
    raise EvaluationError(unknown_rule(name))


def unknown_rule(name: str) -> str:
    """Return the error message for an unknown rule: all names, and the close ones."""
    close = difflib.get_close_matches(name, RULES, n=3)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return (
        f"There is no rule {name!r}: expected one of {', '.join(RULES)} "
        f"(`amulet tune --list-rules` says what they check).{meant}"
    )
