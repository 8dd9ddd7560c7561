"""Compares sixteen steered users of `amulet serve` with `batch`, in tokens per second.

Claim: the server's throughput is at least .9 of that of `batch`. The server is a separate process
on the same cores; the two take turns, with new questions in every round, so that nothing is kept.

    python -m benchmarks.served [--rounds 5] [--tokens 48]
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from amulet import Amulet
from benchmarks import measure
from benchmarks.load import PREFERENCES, serving
from benchmarks.measure import Claim, Spread

USERS = 16
BATCH, SERVED = "amulet, batch", "amulet serve"


def bodies(turn: int, tokens: int) -> list[dict[str, Any]]:
    """Return one request per user, in the protocol's form."""
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


def by_batch(amulet: Amulet, asked: Sequence[dict[str, Any]]) -> int:
    """Return the tokens of all answers."""
    requests = [
        {"max_new_tokens": body["max_tokens"], **{k: body[k] for k in ("messages", "preference")}}
        for body in asked
    ]
    return sum(reply.usage.completion_tokens for reply in amulet.batch(requests))


async def by_server(url: str, asked: Sequence[dict[str, Any]]) -> int:
    """Return the tokens of all answers to concurrent clients."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=body) for body in asked)
        )
    return sum(answer.json()["usage"]["completion_tokens"] for answer in answers)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=48)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    (dtype,) = map(measure.name_of, options.dtypes)
    amulet = Amulet.embedded(dtype=dtype)
    tokens: dict[str, list[int]] = {BATCH: [], SERVED: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(dtype, Path(folder) / "log") as (url, _),
    ):
        runs = {
            BATCH: lambda turn: tokens[BATCH].append(
                by_batch(amulet, bodies(turn, options.tokens))
            ),
            SERVED: lambda turn: tokens[SERVED].append(
                asyncio.run(by_server(url, bodies(turn, options.tokens)))
            ),
        }
        for name, run in runs.items():
            run(options.rounds)  # warm-up with other questions
            tokens[name].clear()
        times = measure.in_turns(runs, options.rounds)
    rates = {
        name: [1e3 * rate for rate in measure.ratios(tokens[name], times[name])] for name in runs
    }
    spreads = {name: Spread.of(rate) for name, rate in rates.items()}
    for name, spread in spreads.items():
        print(f"{name:20} {spread} tokens per second, prefill included")
    claim = Claim(
        f"smollm2, {dtype}, tokens per second of {USERS} steered users: amulet serve / batch",
        0.9,
        Spread.of(measure.ratios(rates[SERVED], rates[BATCH])),
        at_most=False,
    )
    shown = {name: asdict(spread) for name, spread in spreads.items()}
    return measure.report("served", options, [claim], {"tokens_per_s": shown})


if __name__ == "__main__":
    main()
