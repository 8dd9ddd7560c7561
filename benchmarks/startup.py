"""Measures the start-up time and the memory of a steered request.

Claims: `import amulet` takes at most 0.2 s and does not load torch; the embedded model, already
converted, is ready at most 4 s after the program's first line, with compile off; and a steered
request takes at most 1.1 times its two caches in addition to the weights. Each figure is from a new
process. Memory is the process's resident set, by the kernel's high-water mark, which is reset
before the request (Linux only).

    python -m benchmarks.startup [--dtype float32] [--rounds 5]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import measure
from benchmarks.measure import Claim, Spread, name_of

IMPORT = """
import json, sys, time
start = time.perf_counter()
import amulet
seconds = time.perf_counter() - start
print(json.dumps({"import_s": seconds, "torch": "torch" in sys.modules}))
"""

READY = """
import json, sys, time
start = time.perf_counter()
from amulet import Amulet
amulet = Amulet.embedded(dtype=sys.argv[1])
ready = time.perf_counter() - start
amulet.chat([{"role": "user", "content": "Hi!"}], preference="Be brief.", max_new_tokens=1)
print(json.dumps({"ready_s": ready, "answer_s": time.perf_counter() - start}))
"""

# A small request first, because the first forward pass allocates permanent memory.
MEMORY = """
import ctypes, json, sys
import torch
from benchmarks import contenders
from benchmarks.passages import rag_chat

name, dtype, length, tokens, kept = sys.argv[1], *sys.argv[2:]
dtype, tokens = getattr(torch, dtype), int(tokens)
model = contenders.load(name, dtype, pack=True)
amulet = contenders.amulet_over(model, prefix_cache_bytes=int(kept))
question, given = "Which is the oldest?", {"preference": "Be brief.", "focus": 0.0}
contenders.chat(amulet, [{"role": "user", "content": question}], 4, **given)
messages = rag_chat(contenders.tokenizer(), int(length), question)
rows = len(amulet.encode_chat(messages)) + tokens

def mebibytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

# Memory that loading freed but glibc still holds would be reused unnoticed.
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = mebibytes("VmRSS")
contenders.chat(amulet, messages, tokens, **given)
taken = mebibytes("VmHWM") - before
two = 2 * contenders.cache_bytes(model.config, dtype, rows) / 2**20
print(json.dumps({"taken_mib": taken, "two_caches_mib": two, "weights_mib": before}))
"""


def fresh(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script in a new process; return the JSON of its last line."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def start_up(options: Any) -> tuple[list[Claim], dict[str, Any]]:
    """Time the import, the load and the first answer."""
    dtype = name_of(options.dtypes[0])
    imports, ready, answer, torch_loaded = [], [], [], False
    fresh(READY, dtype)  # puts the files into the system's cache, as for a repeated run
    for _ in range(options.rounds):
        found = fresh(IMPORT)
        imports.append(found["import_s"])
        torch_loaded |= found["torch"]
        found = fresh(READY, dtype)
        ready.append(found["ready_s"])
        answer.append(found["answer_s"])
    print(f"import {Spread.of(imports)} s, torch loaded: {'yes' if torch_loaded else 'no'}")
    print(f"ready {Spread.of(ready)} s, first token of the first answer {Spread.of(answer)} s")
    claims = [
        Claim("`import amulet`", 0.2, Spread.of(imports), unit=" s"),
        Claim(f"ready to answer, embedded model, {dtype}", 4, Spread.of(ready), unit=" s"),
        Claim(f"first token of the first answer, {dtype}", None, Spread.of(answer), unit=" s"),
    ]
    figures = {
        "import_s": asdict(Spread.of(imports)),
        "ready_s": asdict(Spread.of(ready)),
        "first_answer_s": asdict(Spread.of(answer)),
        "import_loads_torch": torch_loaded,
    }
    return claims, figures


def memory(options: Any) -> tuple[list[Claim], dict[str, Any]]:
    """Measure the memory of a steered request, with and without keeping its rows."""
    claims, figures = [], {}
    length = "128" if options.quick else "2000"
    for dtype in options.dtypes:
        for kept, how, target in (("0", "nothing kept", 1.1), (str(2**29), "rows kept", None)):
            given = (options.model, name_of(dtype), length, str(options.tokens), kept)
            found = [fresh(MEMORY, *given) for _ in range(options.rounds)]
            shares = Spread.of([one["taken_mib"] / one["two_caches_mib"] for one in found])
            print(f"{name_of(dtype)}, {how}: {found[0]}, {shares} of two caches")
            figures[f"memory {name_of(dtype)}, {how}"] = {"runs": found, **asdict(shares)}
            text = (
                f"{options.model}, {name_of(dtype)}, {length} tokens: memory of a steered request "
                f"above weights / two caches, {how}"
            )
            claims.append(Claim(text, target, shares))
    return claims, figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=3, tokens=16)
    options = measure.read_options(parser, arguments, dtypes=["float32"])
    claims, figures = start_up(options)
    if sys.platform == "linux":
        more, memory_figures = memory(options)
        claims, figures = [*claims, *more], figures | memory_figures
    return measure.report("startup", options, claims, figures)


if __name__ == "__main__":
    main()
