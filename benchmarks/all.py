"""Runs all benchmarks, each in its own process, and prints one table of their claims.

Takes under 15 minutes on two cores, and about 5 more with vLLM. Benchmarks that can't run here (no
GPU, no llama.cpp, no vLLM) are skipped with a message.

    python -m benchmarks.all [--quick] [--only decode] [--llamacpp PYTHON] [--vllm PYTHON]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure

ROOT = Path(__file__).parent.parent
RUNS: dict[str, list[str]] = {
    "startup": ["startup", "--rounds", "3"],
    "decode": ["decode", "--rounds", "5", "--tokens", "24"],
    "decode, 0.5B": [
        *("decode", "--model", "qwen2-0.5b", "--dtype", "bfloat16"),
        *("--rounds", "3", "--tokens", "12", "--compile", "off"),
    ],
    "authors": ["authors", "--rounds", "2"],
    "rag_quote": ["rag_quote", "--rounds", "3", "--dtype", "bfloat16"],
    "first_token": ["first_token", "--rounds", "3", "--dtype", "bfloat16"],
    "users": ["users", "--rounds", "2", "--tokens", "32"],
    "shared": ["shared", "--rounds", "3"],
    "lengths": ["lengths", "--rounds", "3"],
    "served": ["served", "--rounds", "3"],
    "llamacpp": ["llamacpp", "--rounds", "5", "--tokens", "32"],
    "gpu": ["gpu"],
    "vllm_pairs": ["vllm_pairs", "--rounds", "5", "--tokens", "48"],
}


def run(arguments: Sequence[str], python: str = sys.executable) -> dict[str, Any] | None:
    """Run one script and show its output; return its JSON, or None if it failed."""
    command = [python, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]
    print(f"\n## {' '.join(command[1:])}\n", flush=True)
    start, last = time.perf_counter(), ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
    print(f"took {time.perf_counter() - start:.0f} s", flush=True)
    if process.returncode != 0:
        return None
    result: dict[str, Any] = json.loads(last)
    return result


def absent(name: str, options: argparse.Namespace) -> str:
    """Return why a benchmark can't run here, or ""."""
    if name == "gpu" and not (torch.cuda.is_available() or options.quick):
        return "no CUDA GPU"
    if name == "llamacpp" and options.llamacpp is None and find_spec("llama_cpp") is None:
        return "no llama-cpp-python; give an environment that has it with --llamacpp"
    if name == "vllm_pairs" and options.vllm is None and find_spec("vllm") is None:
        return "no vLLM; give an environment that has it with --vllm"
    return ""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all, print the table and, on the last line, JSON; return the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only check that they run")
    parser.add_argument("--only", action="append", choices=list(RUNS), help="(default all)")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="an environment with llama-cpp-python")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="an environment with vLLM and this package"
    )
    options = parser.parse_args(arguments)
    start, results, failed = time.perf_counter(), {}, []
    for name in options.only or RUNS:
        if why := absent(name, options):
            print(f"\n## {name}: left out, {why}")
            continue
        given = RUNS[name] if not options.quick else [RUNS[name][0], "--quick"]
        if name == "llamacpp" and options.llamacpp:
            given = [*given, "--python", os.fspath(options.llamacpp)]
        others = [options.vllm] if name == "vllm_pairs" and options.vllm else []
        if (result := run(given, *others)) is None:
            failed.append(name)
        else:
            results[name] = result
    claims = [claim for result in results.values() for claim in result["claims"]]
    print("\n# All claims\n\n" + ", ".join(f"{k} {v}" for k, v in measure.machine().items()))
    print("\n" + measure.table(claims))
    print(f"\n{len(results)} benchmarks in {(time.perf_counter() - start) / 60:.1f} minutes.")
    summary = {"results": results, "failed": failed}
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    sys.exit(1 if main()["failed"] else 0)
