"""Chooses the question and two preferences for `make demo` from 30 pairs, by a rule.

There are five questions about the demo's documents, each with the facts of its answer, and six
preferences, each with a program's check. Each pair is answered plainly, with the preference in the
prompt alone, and steered with the library's defaults; all answers are printed. The rule takes the
question for which steering most often keeps the preference and states the fact where the prompt
alone fails at one of the two; then the first such preference, and the first other preference for
which steering succeeds at both.

    python -m benchmarks.demo_choice
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from amulet import Amulet
from amulet.evaluation.grounded import holds
from amulet.evaluation.rules import RULES
from benchmarks.measure import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

QUESTIONS = {
    "What can I eat at the Saturday market?": ("smoked trout",),
    "How much is a ticket for the ferry?": ("4 crowns", "7 crowns"),
    "What should I bring for the bog walk?": ("shoes", "jacket"),
    "When is the lighthouse open?": ("Tuesday", "Sunday"),
    "How long can I keep a library book?": ("two weeks",),
}
WISHES = ("one-sentence", "numbered", "bullets", "exclamation", "question", "capitals")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"preference": ""},
    "prompt": {"strength": 0.0},
    "steered": {},
}


def main() -> dict[str, Any]:
    """Print all answers and the rule's choice; return the counts."""
    from minilm import MiniLM
    from rag_two_people import PROMPT, InMemoryVectorStore, join, load_passages

    store = InMemoryVectorStore.from_documents(load_passages(), MiniLM())
    amulet = Amulet.embedded()
    roles = {"system": "system", "human": "user"}
    kept: dict[tuple[str, str, str], bool] = {}
    held: dict[tuple[str, str, str], bool] = {}
    for question, facts in QUESTIONS.items():
        passages = join(store.similarity_search(question, k=1))
        prompt = PROMPT.invoke({"passages": passages, "question": question}).to_messages()
        messages = [{"role": roles[m.type], "content": m.text} for m in prompt]
        for wish in WISHES:
            for way, options in WAYS.items():
                # One by one, as in the demo, because rounding in bfloat16 depends on the batch.
                given = {"preference": RULES[wish].preference, **options}
                text = amulet.chat(messages, max_new_tokens=80, **given).text
                key = question, wish, way
                kept[key] = RULES[wish].check(text)
                held[key] = all(holds(text, [fact]) for fact in facts)
                marks = f"{'kept' if kept[key] else '-':4} {'held' if held[key] else '-':4}"
                print(f"{marks} | {way:7} | {wish:12} | {question} | {text!r}", flush=True)
    both = {key: kept[key] and held[key] for key in kept}
    counts = {
        way: {
            "kept": sum(kept[q, w, way] for q in QUESTIONS for w in WISHES),
            "held": sum(held[q, w, way] for q in QUESTIONS for w in WISHES),
            "both": sum(both[q, w, way] for q in QUESTIONS for w in WISHES),
        }
        for way in WAYS
    }
    gains = {
        q: [w for w in WISHES if both[q, w, "steered"] and not both[q, w, "prompt"]]
        for q in QUESTIONS
    }
    chosen = max(gains, key=lambda q: len(gains[q]))  # the first of several
    first = gains[chosen][0] if gains[chosen] else None
    other = next((w for w in WISHES if both[chosen, w, "steered"] and w != first), None)
    result = {
        "benchmark": "demo_choice",
        "machine": machine(),
        "of": len(QUESTIONS) * len(WISHES),
        "counts": counts,
        "chosen": [chosen, first, other],
    }
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    main()
