"""Times llama.cpp in its own process and environment, by JSON lines on stdin.

It imports nothing from this project, so that llama-cpp-python and torch can be in different
environments.
"""

from __future__ import annotations

import itertools
import json
import sys
import time

import llama_cpp  # type: ignore[import-not-found]


def main() -> None:
    """Answer `{"ids": [...], "tokens": n}` with `{"first_ms": ..., "token_ms": ...}`."""
    path, threads = sys.argv[1], int(sys.argv[2])
    start = time.perf_counter()
    llm = llama_cpp.Llama(
        path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    loaded = {
        "version": llama_cpp.__version__,
        "load_s": time.perf_counter() - start,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(loaded), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llm.reset()  # drops the last answer's prompt
        times = [time.perf_counter()]
        for _ in itertools.islice(llm.generate(asked["ids"], temp=0.0), asked["tokens"]):
            times.append(time.perf_counter())
        token = (times[-1] - times[1]) / (len(times) - 2)
        answer = {"first_ms": (times[1] - times[0]) * 1e3, "token_ms": token * 1e3}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
