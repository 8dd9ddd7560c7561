"""The benchmark of pairs on vLLM runs, on a tiny random model, and states its claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.vllm_pairs", "--quick", "--pairs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "vllm_pairs"
    what = "tiny, bfloat16, tokens per second in 4 rows: steered / plain vLLM"
    assert [(claim["claim"], claim["bound"]) for claim in result["claims"]] == [
        (f"{what}, greedy, whole answers", "≥ 0.85"),
        (f"{what}, greedy, decoding alone", "shown"),
        (f"{what}, drawn, whole answers", "≥ 0.85"),
        (f"{what}, drawn, decoding alone", "shown"),
    ]
