"""Measures whether steered answers keep facts, from invented passages and from memory.

Each of 100 questions about passages, and of 76 plain facts, is answered plainly and under held-out
preferences: with the preference in the prompt alone with the same placement, steered with the
library's defaults, and with the defaults at strength 0.5 without focus and loop guard. Intervals
are bootstrapped over questions, for the difference to the prompt alone.

    python -m benchmarks.grounded [--preferences pirate,exclamation]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from amulet import Amulet, Steering
from amulet.evaluation.bootstrap import difference
from amulet.evaluation.grounded import answered, memory, passages
from amulet.evaluation.rules import RULES
from benchmarks.measure import machine

DEFAULT = Steering()
SETTINGS = {
    "prompt alone": DEFAULT.model_copy(update={"strength": 0.0}),
    "default": DEFAULT,
    "strength 0.5 alone": DEFAULT.model_copy(
        update={"strength": 0.5, "focus": 0.0, "loop_guard": 0}
    ),
}


def main() -> dict[str, Any]:
    """Decode, print a table per set, and return the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preferences", default="pirate,exclamation")
    names = parser.parse_args().preferences.split(",")
    amulet = Amulet.embedded(dtype="bfloat16")
    shares: dict[str, dict[str, float]] = {}
    for title, asked in (("passages", passages()), ("memory", memory())):
        held = {"plain": [[float(yes)] for _, _, yes in answered(amulet, asked)]}
        for way, steering in SETTINGS.items():
            columns = [
                [float(yes) for _, _, yes in answered(amulet, asked, wanted, steering)]
                for wanted in (RULES[name].preference for name in names)
            ]
            held[way] = [list(row) for row in zip(*columns, strict=True)]
        means = {way: [sum(row) / len(row) for row in rows] for way, rows in held.items()}
        print(f"## {title}: {len(asked)} questions, preferences {', '.join(names)}\n")
        print("| | fact held | against the prompt alone |\n|---|---|---|")
        for way, own in means.items():
            mean, low, high = difference(own, means["prompt alone"])
            print(f"| {way} | {sum(own) / len(own):.3f} | {mean:+.3f} ({low:+.3f}, {high:+.3f}) |")
        print(flush=True)
        shares[title] = {way: sum(own) / len(own) for way, own in means.items()}
    result = {"benchmark": "grounded", "machine": machine(), "held": shares}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
