"""Starts `amulet serve` in a process of its own, with either backend."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

KEY = "secret"


@contextmanager
def serving(options: Sequence[str], log: Path) -> Iterator[str]:
    """Run `amulet serve` with these options and give its address, once it answers.

    At the end it must drain and exit with 0. What it prints is in `log`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    further = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "AMULET_API_KEY": KEY}
    environment = {**os.environ, **further}
    command = [str(Path(sys.executable).parent / "amulet"), "serve", *options]
    common = ["--dtype", "float32", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *common], stdout=out, stderr=out, env=environment)
    try:
        for _ in range(2400):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:  # nobody listens yet, or the model is loading
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, log.read_text()[-4000:]


def metric(url: str, name: str) -> list[float]:
    """Return the values of a metric of the server at `url`, one per set of labels."""
    request = urllib.request.Request(
        url.removesuffix("v1") + "metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    starts = (f"{name} ", f"{name}{{")
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(starts)]


def wait_until_idle(url: str, running: str) -> None:
    """Wait until a gauge of running requests is 0."""
    for _ in range(300):
        if (values := metric(url, running)) and not any(values):
            return
        time.sleep(0.1)
    raise AssertionError(values)
