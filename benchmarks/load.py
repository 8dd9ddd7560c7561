"""Tests a server under load: steered and plain clients, disconnects, slow readers, bad bodies.

Starts `amulet serve`, lets clients send requests for some minutes, and checks that the server does
not answer wrongly, leave rows in the batch, grow, let a request hang, or fail with a 5xx.

Every complete answer is compared with the same request decoded alone before the load. In float32
the tokens must be identical. In bfloat16 another number of rows rounds differently, which may
decide a near tie the other way: at the first differing token, the decode alone tells by how many
nats it preferred its own. More than rounding explains (`Case.tie`), or a token that it did not
consider at all, counts as a wrong answer. Swapping the answers decoded alone tests whether this
detects an answer to another request.

    python -m benchmarks.load [--minutes 5] [--exact-minutes 1] [--clients 64] [--write FILE.md]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from amulet import Amulet, Request
from amulet.preference import DEFAULT_STEERING
from benchmarks.measure import machine

SPACING = 1 / 8  # of bfloat16 numbers from 16 to 32; logits of likely tokens reach 30
GAP = 10.0  # seconds without activity of the clients' loop that mean it was suspended
SAMPLE = 5.0  # seconds between two samples of the server's memory
CHAT = "/v1/chat/completions"
QUESTIONS = (
    "What is a black hole?",
    "How do I make tea?",
    "Why is the sky blue?",
    "Name three colours.",
    "How do bees make honey?",
    "What does a heart do?",
    "Tell me about the Moon.",
    "How do I learn to swim?",
)
PREFERENCES = (
    "Answer in one short sentence.",
    "Talk like a pirate.",
    "Use a bullet list.",
    "Explain as to a five-year-old.",
    "Be formal and polite.",
    "Be enthusiastic.",
    "Be sceptical.",
    "Give an example.",
    "Use numbered steps.",
    "Write in capitals.",
    "End with a question.",
    "Answer in French.",
    "Be warm and kind.",
    "Use no adjectives.",
    "Mention the sea.",
    "Speak as a teacher would.",
)
BAD: tuple[tuple[str, str, Any, int], ...] = (  # method, path, body, expected status
    ("POST", CHAT, b'{"messages": [', 400),
    ("POST", CHAT, b"\xff\xfe\x00", 400),
    ("POST", CHAT, {"messages": []}, 400),
    ("POST", CHAT, {"messages": "hi"}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "hi"}], "temperature": -1}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "hi"}], "preferences": "x"}, 400),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "hi"}], "strength": "much"}, 400),
    (
        "POST",
        CHAT,
        {
            "messages": [{"role": "user", "content": "hi"}],
            "grammar": {"kind": "regex", "source": "("},
        },
        400,
    ),
    ("POST", CHAT, {"messages": [{"role": "user", "content": "hi " * 20_000}]}, 400),
    ("POST", CHAT, {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}, 404),
    ("POST", CHAT, b'{"messages": "' + b"x" * 5_000_000 + b'"}', 413),
    ("GET", CHAT, None, 405),
    ("GET", "/v1/nothing", None, 404),
)


@dataclass(frozen=True)
class Case:
    """One of the requests that the clients draw from, and its answer decoded alone.

    Attributes:
        body: the request's options for a chat.
        text, ids: the answer.
        likely: for each token, the log-probabilities of the candidates at its position.
    """

    body: Mapping[str, Any]
    text: str
    ids: tuple[int, ...]
    likely: tuple[Mapping[int, float], ...]

    @property
    def steered(self) -> bool:
        """Whether it has a preference."""
        return "preference" in self.body

    @property
    def tie(self) -> float:
        """Nats by which rounding of the logits may shift one token against another.

        Each of two decodes rounds each logit by up to half a spacing, so the distance of two tokens
        in one row may differ by two spacings; as much again is allowed for rounding in the layers
        before the head. Steering multiplies the rows by 1 + g + g·f, -g and -g·f.
        """
        push = DEFAULT_STEERING.strength * (1 + DEFAULT_STEERING.focus)
        return 4 * SPACING * (1 + 2 * push if self.steered else 1)

    def distance(self, ids: Sequence[int]) -> float:
        """Return by how many nats the first differing token was less likely; 0 for an exact tie.

        Infinity for a token that was not a candidate, and for an answer that ends elsewhere.
        """
        if tuple(ids) == self.ids:
            return 0.0
        for given, own, likely in zip(ids, self.ids, self.likely, strict=False):
            if given != own:
                return abs(likely[own] - likely.get(given, -math.inf))
        return math.inf


def make_cases(amulet: Amulet, longest: int, floor: float | None = None) -> list[Case]:
    """Decode each request alone: 24 steered by 16 preferences, 8 plain, of several lengths.

    Args:
        amulet: decodes them.
        longest: tokens of the longest answers.
        floor: plausibility floor; None is the default. A token at its edge may be excluded in one
            decode and not in another, at an unknown distance, so use 0 to compare distances.
    """
    bodies: list[dict[str, Any]] = []
    for i in range(32):
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": QUESTIONS[(i + i // 8) % len(QUESTIONS)]}],
            "max_tokens": max(2, longest * (1 + i % 4) // 4),
        }
        if i % 4:
            body["preference"] = PREFERENCES[(i - i // 4 - 1) % len(PREFERENCES)]
            body["placement"] = "system" if i % 2 else "user"
            if floor is not None:
                body["floor"] = floor
        bodies.append(body)
    return [_case(amulet, body) for body in bodies]


def exchanged(cases: Sequence[Case]) -> tuple[int, int]:
    """Return how many swapped answers would be detected, and of how many.

    Answers are compared over the length of the shorter one; those with equal beginnings are left
    out.
    """
    found = tried = 0
    for case, other in itertools.permutations(cases, 2):
        ids = other.ids[: len(case.ids)]
        if ids != case.ids[: len(ids)]:
            tried += 1
            found += case.distance(ids) > case.tie
    return found, tried


def _case(amulet: Amulet, body: dict[str, Any]) -> Case:
    options = dict(body)
    limit = options.pop("max_tokens")
    request = Request(**options, max_new_tokens=limit, trace=True, top_logprobs=20)
    reply = amulet.start(request).read()
    likely = tuple({id_: logprob for id_, _, logprob in token.top} for token in reply.trace or ())
    return Case(body, reply.text, reply.token_ids, likely)


# --- the clients


class Clock:
    """Seconds, without those for which this process (and the server) was suspended."""

    def __init__(self) -> None:
        self.suspended = 0.0

    def now(self) -> float:
        """Return the seconds since an arbitrary moment."""
        return time.monotonic() - self.suspended

    async def run(self) -> None:
        """Record gaps until cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.5)
            gap = time.monotonic() - before
            if gap > GAP:
                self.suspended += gap


@dataclass
class Findings:
    """What the clients observed."""

    patience: float = 300.0  # seconds without an end after which a request counts as stuck
    clock: Clock = field(default_factory=Clock)
    ended: Counter[str] = field(default_factory=Counter)  # by kind of client
    wrong: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    same: int = 0  # complete answers with identical tokens
    distances: list[float] = field(default_factory=list)  # of the others
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"first piece": [], "whole, steered": [], "whole, plain": []}
    )
    tokens: int = 0  # of complete answers

    @property
    def compared(self) -> int:
        """The number of complete answers."""
        return self.same + len(self.distances)

    def take(self, case: Case, choice: Mapping[str, Any], text: str, seconds: float | None) -> None:
        """Check a complete answer; None for a time that doesn't count."""
        ids = choice["details"]["token_ids"]
        self.tokens += len(ids)
        distance = case.distance(ids)
        is_same = tuple(ids) == case.ids
        if is_same:
            self.same += 1
        else:
            self.distances.append(distance)
        if seconds is not None:
            self.seconds["whole, steered" if case.steered else "whole, plain"].append(seconds)
        if distance > case.tie or (is_same and text != case.text):
            self.wrong.append(f"{case.body}: {text!r} instead of {case.text!r} ({distance:.2g})")


async def ask(
    http: httpx.AsyncClient, slow: httpx.AsyncClient, case: Case, draw: random.Random, to: Findings
) -> None:
    """Send one request as a random kind of client, and check the response."""
    kind = draw.choices(
        ["whole", "stream", "slow reader", "gone in a stream", "gone while waiting", "bad body"],
        [30, 30, 5, 15, 8, 12],
    )[0]
    try:
        async with asyncio.timeout(to.patience):
            if kind == "bad body":
                await _bad(http, draw, to)
            elif kind == "whole":
                await _whole(http, case, to)
            elif kind == "gone while waiting":
                with contextlib.suppress(httpx.TimeoutException):
                    await http.post(CHAT, json=case.body, timeout=draw.uniform(0.05, 3.0))
            elif kind == "gone in a stream":
                async with contextlib.aclosing(_events(http, case.body)) as events:
                    left = draw.randrange(1, 8)
                    async for _ in events:
                        left -= 1
                        if not left:
                            break
            else:
                await _stream(slow if kind == "slow reader" else http, case, draw, to, kind)
    except TimeoutError:
        to.stuck.append(f"{kind}: {case.body}")
    except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
        to.wrong.append(f"{kind}: {type(error).__name__}: {error}: {case.body}")
    to.ended[kind] += 1


async def _whole(http: httpx.AsyncClient, case: Case, to: Findings) -> None:
    begun = to.clock.now()
    response = await http.post(CHAT, json={**case.body, "return_details": True})
    assert response.status_code == 200, f"{response.status_code} {response.text[:300]}"
    choice = response.json()["choices"][0]
    text = choice["message"]["content"] or ""
    to.take(case, choice, text, to.clock.now() - begun)


async def _stream(
    http: httpx.AsyncClient, case: Case, draw: random.Random, to: Findings, kind: str
) -> None:
    begun = to.clock.now()
    body: dict[str, Any] = {**case.body, "return_details": True}
    if kind == "slow reader":  # its response is larger than the socket buffers
        body |= {"trace": True, "logprobs": True, "top_logprobs": 20}
    text, last = "", None
    async with contextlib.aclosing(_events(http, body)) as events:
        async for event in events:
            if kind == "stream" and last is None:
                to.seconds["first piece"].append(to.clock.now() - begun)
            last = event["choices"][0]
            text += last["delta"].get("content") or ""
            if kind == "slow reader":
                await asyncio.sleep(draw.uniform(0, 0.5))
    assert last is not None, "no event"
    seconds = to.clock.now() - begun
    # The time of a slow client says nothing about the server.
    to.take(case, last, text, seconds if kind == "stream" else None)


async def _events(http: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncIterator[Any]:
    async with http.stream("POST", CHAT, json={**body, "stream": True}) as response:
        assert response.status_code == 200, f"{response.status_code} {await response.aread()!r}"
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):  # otherwise a comment, which keeps the connection alive
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event
    raise AssertionError("the stream broke off")


async def _bad(http: httpx.AsyncClient, draw: random.Random, to: Findings) -> None:
    method, path, body, status = draw.choice(BAD)
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    if body is None:
        sent = {}
    response = await http.request(
        method, path, headers={"Content-Type": "application/json"}, **sent
    )
    assert response.status_code == status, f"{response.status_code}, not {status}: {body!r:.80}"
    assert response.json()["error"]["message"]


async def clients(
    url: str,
    cases: Sequence[Case],
    number: int,
    seconds: float,
    *,
    each: float = math.inf,
    seed: int = 0,
    findings: Findings | None = None,
) -> Findings:
    """Let this many clients send requests in sequence, for some time or `each` times."""
    findings = findings or Findings()
    ticking = asyncio.create_task(findings.clock.run())
    until = findings.clock.now() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    small = httpx.AsyncHTTPTransport(
        socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)], limits=limits
    )

    async def one(index: int) -> None:
        draw = random.Random(f"{seed} {index}")
        asked = 0
        while findings.clock.now() < until and asked < each:
            asked += 1
            await ask(http, slow, draw.choice(cases), draw, findings)

    options: dict[str, Any] = {"base_url": url, "timeout": None}
    async with (
        httpx.AsyncClient(limits=limits, **options) as http,
        httpx.AsyncClient(transport=small, **options) as slow,
    ):
        await asyncio.gather(*(one(index) for index in range(number)))
    ticking.cancel()
    return findings


# --- the server


@contextlib.contextmanager
def serving(dtype: str, log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run `amulet serve` with further options on a free loopback port, in its own process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from amulet.cli import app; app()", "serve"]
    command += ["--port", str(port), "--dtype", dtype, "--max-tokens", "256", "--queue", "256"]
    command += options
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=60).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"The server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(600)


def figures_of(url: str) -> dict[str, float]:
    """Return the server's metrics, by name and labels."""
    lines = httpx.get(f"{url}/metrics", timeout=600).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


async def watch(url: str, clock: Clock) -> list[tuple[float, float, float]]:
    """Sample (seconds, MiB resident, rows) until cancelled."""
    samples: list[tuple[float, float, float]] = []
    begun = clock.now()
    try:
        while True:
            now = await asyncio.to_thread(figures_of, url)  # not through the clients' loop
            mib = now["process_resident_memory_bytes"] / 2**20
            samples.append((clock.now() - begun, mib, now["amulet_rows"]))
            await asyncio.sleep(SAMPLE)
    except asyncio.CancelledError:
        return samples


@dataclass
class Outcome:
    """The results of one run of the server."""

    dtype: str
    clients: int
    seconds: float
    findings: Findings
    memory: list[tuple[float, float, float]]
    metrics: dict[str, float]
    exit_code: int | None
    before: Mapping[str, float] = field(default_factory=dict)  # metrics at the start of the load
    exchange: tuple[int, int] = (0, 0)  # see `exchanged`

    @property
    def errors(self) -> float:
        """Responses with a status of 500 or more since the start of the load."""
        return sum(
            value - self.before.get(name, 0.0)
            for name, value in self.metrics.items()
            if name.startswith("amulet_requests_total") and 'status="5' in name
        )

    @property
    def growth(self) -> float:
        """The server's growth in MiB per minute in the second half, by least squares."""
        half = [
            (at / 60, mib)
            for at, mib, _ in self.memory
            if at > self.seconds / 2 and at < self.seconds
        ]
        if len(half) < 3:
            return math.nan
        return statistics.linear_regression(*zip(*half, strict=True)).slope

    @property
    def left(self) -> dict[str, float]:
        """What the server still held after the last client had left."""
        return {
            name: self.metrics[f"amulet_{name}"]
            for name in ("rows", "cache_bytes", "requests_in_flight", "requests_waiting")
        }

    def faults(self, exact: bool) -> list[str]:
        """Return descriptions of all faults."""
        found = [f"wrong: {text}" for text in self.findings.wrong]
        found += [f"stuck: {text}" for text in self.findings.stuck]
        if exact and self.findings.distances:
            found.append(f"{len(self.findings.distances)} answers differ from those decoded alone")
        if self.errors:
            found.append(f"{self.errors:g} answers with a 5xx")
        found += [f"{value:g} {name} left" for name, value in self.left.items() if value]
        if self.exit_code != 0:
            found.append(f"the server ended with {self.exit_code}")
        return found


def run(
    dtype: str, seconds: float, number: int, longest: int, patience: float, log: Path
) -> Outcome:
    """Decode the references, start a server, load it, and check what is left."""
    amulet = Amulet.embedded(dtype=dtype)
    cases = make_cases(amulet, longest, None if dtype == "float32" else 0.0)
    del amulet
    gc.collect()
    print(f"{dtype}: {len(cases)} references decoded", flush=True)

    async def load(url: str) -> tuple[Findings, list[tuple[float, float, float]], float]:
        findings = Findings(patience)
        begun = findings.clock.now()
        watcher = asyncio.create_task(watch(url, findings.clock))
        await clients(url, cases, number, seconds, findings=findings)
        took = findings.clock.now() - begun
        for _ in range(60):  # the server notices the last disconnects within a step
            now = await asyncio.to_thread(figures_of, url)
            if not now["amulet_rows"] and not now["amulet_requests_in_flight"]:
                break
            await asyncio.sleep(0.5)
        watcher.cancel()
        return findings, await watcher, took

    with serving(dtype, log) as (url, process):
        before = figures_of(url)  # 503 was correct while it was loading
        findings, memory, took = asyncio.run(load(url))
        metrics = figures_of(url)
    outcome = Outcome(
        dtype,
        number,
        took,
        findings,
        memory,
        metrics,
        process.returncode,
        before,
        exchanged(cases),
    )
    print(f"{dtype}: {outcome.findings.ended.total()} requests in {took:.0f} s", flush=True)
    return outcome


# --- the report


def percentiles(values: Sequence[float]) -> str:
    """Return median, 90th and 99th percentile and maximum, as cells of a table."""
    if len(values) < 2:
        return "– | – | – | –"
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " | ".join(f"{value:.2f}" for value in (cuts[49], cuts[89], cuts[98], max(values)))


def section(outcome: Outcome, exact: bool) -> str:
    """Return one run as Markdown."""
    found, memory = outcome.findings, outcome.memory
    ties = sorted(found.distances)
    lines = [
        f"## {outcome.dtype}, {outcome.clients} clients, {outcome.seconds / 60:.1f} minutes",
        "",
        "| | |",
        "|---|---|",
        f"| requests | {found.ended.total()} |",
        *(f"| of these: {kind} | {found.ended[kind]} |" for kind in sorted(found.ended)),
        f"| complete answers, compared | {found.compared} |",
        f"| the same to the token as alone | {found.same} |",
    ]
    if not exact:
        lines.append(f"| another token somewhere | {len(ties)} |")
        if ties:
            lines.append(
                f"| its distance, nats: median, 99 %, most | {statistics.median(ties):.3f}, "
                f"{ties[int(0.99 * (len(ties) - 1))]:.3f}, {ties[-1]:.3f} |"
            )
        lines.append(
            "| exchanged answers that the comparison finds | {} of {} |".format(*outcome.exchange)
        )
    lines += [
        f"| **wrong answers** | **{len(found.wrong)}** |",
        f"| **stuck requests** | **{len(found.stuck)}** |",
        f"| **5xx** | **{outcome.errors:g}** |",
        f"| **left at the end: rows, bytes of cache, requests** | **"
        f"{outcome.left['rows']:g}, {outcome.left['cache_bytes']:g}, "
        f"{outcome.left['requests_in_flight']:g}** |",
        f"| rows at once, most | {max(rows for _, _, rows in memory):g} |",
        f"| tokens per second of complete answers | {found.tokens / outcome.seconds:.1f} |",
        f"| exit code after SIGTERM | {outcome.exit_code} |",
        f"| seconds suspended, left out | {found.clock.suspended:.0f} |",
        "",
        "| seconds | median | 90 % | 99 % | most |",
        "|---|---|---|---|---|",
        *(f"| {name} | {percentiles(values)} |" for name, values in found.seconds.items()),
        "",
        "Resident memory of the server, MiB:",
        "",
    ]
    every = max(1, len(memory) // 12)
    shown = [*memory[::every], memory[-1]]
    lines += [
        "| minute | " + " | ".join(f"{at / 60:.1f}" for at, _, _ in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
        "| MiB | " + " | ".join(f"{mib:.0f}" for _, mib, _ in shown) + " |",
        "",
        f"In the second half it grew by {outcome.growth:+.1f} MiB per minute.",
    ]
    return "\n".join(lines)


HEAD = """# The server under load

Written by `python -m benchmarks.load`; {when}. SmolLM2-135M-Instruct in `amulet serve`, over
loopback, {machine}.

{clients} clients send one request after the other: whole answers, streams, slow readers (a small
receive buffer, pauses between pieces, a trace with 20 alternatives per token), clients that
disconnect during a stream or before the answer, and bodies that must be refused with a given 4xx.
The 32 different requests are steered by 16 preferences or plain, greedy, of {least} to {tokens}
tokens.

Every complete answer is compared with the same request decoded alone before the load. In float32
the tokens must be identical. In bfloat16 the number of rows in a pass changes its rounding, which
may decide a near tie the other way: at the first token that differs, the decode alone says by how
many nats it preferred its own. A logit between 16 and 32 has a precision of 1/16, so rounding of
the logits alone shifts two tokens of a row by up to 1/4 against each other, and as much again is
allowed for rounding in earlier layers: {plain:g} nats in a plain answer, and {steered:g} in a
steered one, which weighs three rows by 1 + g + g·f, −g and −g·f. More, or a token that was not
among the 20 likeliest, counts as a wrong answer. (In bfloat16 the requests have no floor, because a
token excluded at its edge has no distance.) Swapping the answers shows whether the comparison
detects an answer to another request.
"""


def page_of(options: argparse.Namespace, sections: Sequence[str], faults: Sequence[str]) -> str:
    """Return the report."""
    head = HEAD.format(
        when=time.strftime("%Y-%m-%d"),
        machine=", ".join(f"{name} {value}" for name, value in machine().items()),
        clients=options.clients,
        plain=4 * SPACING,
        steered=4 * SPACING * (1 + 2 * DEFAULT_STEERING.strength * (1 + DEFAULT_STEERING.focus)),
        least=options.tokens // 4,
        tokens=options.tokens,
    )
    note = [options.note] if options.note else []
    held = ["Everything held."]
    if faults:
        held = ["What went wrong:", "\n".join(f"- {fault}" for fault in faults[:20])]
    return "\n\n".join([head.rstrip(), *note, *sections, *held]) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both dtypes, write the report, print a summary as JSON and return it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="in bfloat16")
    parser.add_argument("--exact-minutes", type=float, default=1.0, help="in float32; 0 is none")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of the longest answers")
    parser.add_argument(
        "--patience", type=float, default=300.0, help="seconds after which a request is stuck"
    )
    parser.add_argument("--write", type=Path, help="a Markdown file for the report")
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="the server's log")
    options = parser.parse_args(arguments)
    plan = [("bfloat16", options.minutes, False), ("float32", options.exact_minutes, True)]
    faults: list[str] = []
    figures: dict[str, Any] = {}
    pages: list[str] = []
    for dtype, minutes, exact in plan:
        if minutes:
            outcome = run(
                dtype,
                60 * minutes,
                options.clients,
                options.tokens,
                options.patience,
                options.log,
            )
            faults += [f"{dtype}: {fault}" for fault in outcome.faults(exact)]
            pages.append(section(outcome, exact))
            figures[dtype] = {
                "answers": outcome.findings.compared,
                "wrong": len(outcome.findings.wrong),
                "stuck": len(outcome.findings.stuck),
                "left": outcome.left,
                "mib_per_minute": outcome.growth,
            }
            page = page_of(options, pages, faults)
            print(page, flush=True)
            if options.write:
                options.write.write_text(page, encoding="utf-8")
    result = {"benchmark": "load", "machine": machine(), **figures, "faults": faults}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
