"""Which question and which two preferences `make demo` shows: a rule chooses them.

Eight questions about the demo's documents, each with what its answer must say, and eight
preferences, each with a program's check, make 64 pairs. Each is answered plainly, with the
preference in the prompt alone, and steered by the library's defaults; all answers are printed.

A steered answer is *good* if it keeps the preference, which the plain answer does not, states the
facts, and has none of the faults of a small model that a program can find (`faults`). A pair
*shows* steering if the steered answer is good, and that of the prompt alone does not both keep the
preference and state the facts. The rule takes the question with the most pairs that show steering,
and its first such preference; then, of all preferences of `amulet.evaluation.rules`, the first
other one with a good answer to that question. The picture of the README has the question and the
first preference.

    python -m benchmarks.demo_choice
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from amulet import Amulet
from amulet.evaluation.grounded import holds
from amulet.evaluation.guards import longest_repeat
from amulet.evaluation.rules import MARK, RULES, words
from benchmarks.measure import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

# What an answer must say.
QUESTIONS = {
    "What can I eat at the Saturday market?": ("smoked trout",),
    "How much is a ticket for the ferry?": ("4 crowns", "7 crowns"),
    "What should I bring for the bog walk?": ("shoes", "jacket"),
    "When is the lighthouse open?": ("Tuesday", "Sunday"),
    "How long can I keep a library book?": ("two weeks",),
    "How much does a guest card for the library cost?": ("3 crowns",),
    "May I bring my dog on the ferry?": ("lead",),
    "Where can I park for the market?": ("railway station",),
}
WISHES = (
    *("one-sentence", "numbered", "bullets", "exclamation", "question", "capitals"),
    *("name", "formal-address"),
)
# A turn of somebody, also within a line; or a line that somebody speaks.
ROLE = re.compile(
    r"\b(?:user|assistant|system|human|ai|bot|question|answer|instructions?)\s*:|^\W*\w+\s*:",
    re.IGNORECASE | re.MULTILINE,
)
NUMBER = re.compile(
    r"\d|^(?:half|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|"
    r"fifty|sixty|hundred|thousand)$"
)
RUN = 3  # words of the preference that an answer may not quote; one more it may not repeat


def faults(text: str, is_whole: bool, preference: str, source: str) -> list[str]:
    """Return what a program finds wrong with an answer.

    Args:
        text: the answer.
        is_whole: whether it ended by itself.
        preference: what it was steered towards.
        source: passage and question.
    """
    said, asked = ([word.lower() for word in words(one)] for one in (text, preference))
    found = {
        "does not end": not is_whole,
        "opens a turn": bool(ROLE.search(text)),
        "quotes the preference": bool(_runs(asked) & _runs(said)),
        "repeats itself": longest_repeat(text) > RUN,
        "has another number": not set(_numbers(text)) <= set(_numbers(source)),
    }
    return [fault for fault, is_there in found.items() if is_there]


def _runs(said: list[str]) -> set[tuple[str, ...]]:
    return {tuple(said[i : i + RUN]) for i in range(len(said) - RUN + 1)}


def _numbers(text: str) -> Iterator[tuple[str, str]]:
    """Yield each number with the word after it: "two days" is none of "two weeks"."""
    said = [word.lower() for line in text.splitlines() for word in words(MARK.sub("", line))]
    return ((one, following) for one, following in pairwise([*said, ""]) if NUMBER.search(one))


def main() -> dict[str, Any]:
    """Answer all pairs, print the answers; return the counts and what the rule chooses."""
    from minilm import MiniLM
    from rag_two_people import PROMPT, InMemoryVectorStore, join, load_passages

    store = InMemoryVectorStore.from_documents(load_passages(), MiniLM())
    amulet = Amulet.embedded()
    roles = {"system": "system", "human": "user"}
    counts = dict.fromkeys(("prompt", "steered", "good"), 0)

    def look(question: str, wishes: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return the preferences with a good answer, and those that show steering."""
        passages = join(store.similarity_search(question, k=1))
        prompt = PROMPT.invoke({"passages": passages, "question": question}).to_messages()
        messages = [{"role": roles[m.type], "content": m.text} for m in prompt]
        plain = amulet.chat(messages, max_new_tokens=80).text
        print(f"plain   | {question} | {plain!r}", flush=True)
        good, shows = [], []
        for rule in map(RULES.__getitem__, wishes):
            both = {}
            for way, options in (("prompt", {"strength": 0.0}), ("steered", {})):
                given: dict[str, Any] = {"preference": rule.preference, **options}
                reply = amulet.chat(messages, max_new_tokens=80, **given)
                held = all(holds(reply.text, [fact]) for fact in QUESTIONS[question])
                both[way] = rule.check(reply.text) and held
                counts[way] += both[way]
                source, is_whole = f"{passages}\n{question}", reply.finish_reason == "stop"
                wrong = faults(reply.text, is_whole, rule.preference, source)
                marks = f"{'both' if both[way] else '-':4} | {', '.join(wrong) or '-'}"
                print(f"{way:7} | {marks} | {rule.name} | {reply.text!r}", flush=True)
            if both["steered"] and not wrong and not rule.check(plain):
                counts["good"] += 1
                good.append(rule.name)
                shows += [] if both["prompt"] else [rule.name]
        return good, shows

    shows = {question: look(question, WISHES)[1] for question in QUESTIONS}
    first_counts = dict(counts)
    question = max(shows, key=lambda q: len(shows[q]))  # the first of several
    first = next(iter(shows[question]), None)
    other = next((name for name in look(question, RULES)[0] if name != first), None)
    result = {
        "benchmark": "demo_choice",
        "machine": machine(),
        "of": len(QUESTIONS) * len(WISHES),
        "counts": first_counts,
        "shows": shows,
        "chosen": [question, first, other],
    }
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    main()
