"""Sixteen steered users of `amulet serve` against the engine's own `batch`, tokens per second.

Claim: the server's throughput is at least .9 of it. The server is a process of its own on the same
cores; the two take turns, on questions that differ from round to round, so that nothing is kept.

    python -m benchmarks.served [--rounds 5] [--tokens 48]
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from amulet import Amulet
from benchmarks import measure
from benchmarks.load import PREFERENCES, serving
from benchmarks.measure import Claim, Spread

USERS = 16


def bodies(turn: int, tokens: int) -> list[dict[str, Any]]:
    """Return one request per user, as the protocol has it."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Tell me {turn + 2} things about number {user + 7}."}
            ],
            "preference": PREFERENCES[user % len(PREFERENCES)],
            "max_tokens": tokens,
        }
        for user in range(USERS)
    ]


def by_batch(amulet: Amulet, asked: Sequence[dict[str, Any]]) -> float:
    """Return tokens per second."""
    requests = [
        {"max_new_tokens": body["max_tokens"], **{k: body[k] for k in ("messages", "preference")}}
        for body in asked
    ]
    start = time.perf_counter()
    replies = amulet.batch(requests)
    return sum(reply.usage.completion_tokens for reply in replies) / (time.perf_counter() - start)


async def by_server(url: str, asked: Sequence[dict[str, Any]]) -> float:
    """Return tokens per second of clients that ask all at once."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body) for body in asked)
        )
        took = time.perf_counter() - start
    return sum(answer.json()["usage"]["completion_tokens"] for answer in answers) / took


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, as the last line, JSON; return that."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=48)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    (dtype,) = map(measure.name_of, options.dtypes)
    amulet = Amulet.embedded(dtype=dtype)
    own, served = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(dtype, Path(folder) / "log") as (url, _),
    ):
        for turn in range(-1, options.rounds):  # the first warms up
            asked = bodies(turn + 1, options.tokens)
            for kind in ("own", "served") if turn % 2 else ("served", "own"):
                if kind == "own":
                    own.append(by_batch(amulet, asked))
                else:
                    served.append(asyncio.run(by_server(url, asked)))
    own, served = own[1:], served[1:]
    rates = {"amulet, batch": Spread.of(own), "amulet serve": Spread.of(served)}
    for name, rate in rates.items():
        print(f"{name:20} {rate} tokens per second, prefill included")
    claim = Claim(
        f"smollm2, {dtype}, tokens per second of {USERS} steered users: amulet serve / batch",
        0.9,
        Spread.of(measure.ratios(served, own)),
        at_most=False,
    )
    shown = {name: vars(rate) for name, rate in rates.items()}
    return measure.report("served", options, [claim], {"tokens_per_s": shown})


if __name__ == "__main__":
    main()
