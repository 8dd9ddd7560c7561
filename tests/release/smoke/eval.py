"""The extra `eval`: a run of two methods on one question, its report, and a strength curve."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from amulet import Amulet

amulet = f"{sys.executable.rpartition('/')[0]}/amulet"
with tempfile.TemporaryDirectory() as folder:
    here = Path(folder)
    (here / "q.json").write_text(json.dumps([{"index": 0, "question": "What is tea?"}]))
    run = [
        "eval",
        "--out",
        "run",
        "-q",
        "q.json",
        "-p",
        "emoji,french",
        "-n",
        "8",
        "--judge",
        "rules",
    ]
    for command in ([*run, "--method", "base", "--method", "pref"], ["report", "run"]):
        done = subprocess.run([amulet, *command], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "What is tea?" in (here / "report.html").read_text("utf-8")

curve = Amulet.embedded().strength_curve("Hi", "Be brief.", strengths=(0, 2), max_new_tokens=8)
assert len(curve.figure().axes) == 3
