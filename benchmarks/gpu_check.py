"""Checks on a GPU, in at most eight minutes, what a CPU can't show, and prints one table.

Oracles (CUDA graphs and Triton's attention against Transformers), a short soak of the server, and
the claims of `benchmarks.gpu` with the shape of Llama 1B, each in its own process and with its own
time limit. What fails or takes too long does not stop the rest.

    python -m benchmarks.gpu_check [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.all import ROOT


class Check(NamedTuple):
    """A command of this Python, and the seconds that it may take."""

    name: str
    arguments: list[str]
    seconds: int


TESTS = ["tests/oracles/test_graphs.py", "tests/backends/transformers/cuda"]
CHECKS = [
    Check("oracles", ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS], 150),
    Check(
        "soak",
        ["-m", "benchmarks.soak", "--device", "cuda", "--seconds", "40", "--embedded-seconds", "0"],
        100,
    ),
    Check(
        "speed",
        ["-m", "benchmarks.gpu", "--shape", "llama-1b", "--rounds", "3", "--tokens", "48"],
        220,
    ),
]
QUICK = [
    Check("oracles", ["-m", "pytest", "-q", "-k", "cast", *TESTS], 300),
    Check(
        "soak",
        ["-m", "benchmarks.soak", "--clients", "2", "--seconds", "1", "--embedded-seconds", "0"],
        300,
    ),
    Check("speed", ["-m", "benchmarks.gpu", "--quick"], 300),
]


def run(check: Check) -> dict[str, Any]:
    """Run one check; return its outcome, its time, its last lines, and its claims."""
    print(f"\n## {check.name}: {' '.join(check.arguments)}\n", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *check.arguments],
            cwd=ROOT,
            timeout=check.seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        outcome, output = ("passed" if done.returncode == 0 else "FAILED"), done.stdout
    except subprocess.TimeoutExpired as error:
        outcome = f"FAILED: not over after {check.seconds} s"
        output = (error.stdout or b"").decode(errors="replace")
    lines = output.rstrip().splitlines() or [""]
    claims = json.loads(lines.pop()).get("claims", []) if lines[-1].startswith("{") else []
    print("\n".join(lines[-40:]), flush=True)
    return {
        "check": check.name,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - start),
        "said": next((line for line in reversed(lines) if line.strip()), "").replace("|", ""),
        "claims": claims,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all, print the table and, on the last line, JSON; return the JSON.

    Raises:
        SystemExit: there is no GPU.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only check that it runs, on a CPU")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.quick):
        raise SystemExit("no CUDA GPU here; --quick checks on a CPU that this script runs")
    results = [run(check) for check in (QUICK if options.quick else CHECKS)]
    print("\n# All checks\n\n" + ", ".join(f"{k} {v}" for k, v in measure.machine().items()))
    print("\n| check | outcome | seconds | its last line |\n|---|---|---|---|")
    for found in results:
        print("| {check} | {outcome} | {seconds} | {said} |".format(**found))
    if claims := [claim for found in results for claim in found["claims"]]:
        print("\n" + measure.table(claims))
    summary = {
        "benchmark": "gpu_check",
        "checks": results,
        "failed": [found["check"] for found in results if found["outcome"] != "passed"],
    }
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
