"""Tests a server with many users for some minutes: every answer must be correct and the user's own.

Starts `amulet serve` in its own process, twice: with a tiny random model, which answers tens of
requests a second, and with the embedded model. Clients chat, stream, continue text, force tool
calls, request log-probabilities, disconnect halfway, and send bodies and prompts that must be
refused. Every user's messages and preferences contain the user's own marker.

Every complete answer is greedy and is compared with the same request decoded alone before. That is
done in float32, because in bfloat16 the number of rows in a pass changes its rounding, and with it
a near tie. Questions with a tie closer than `TIE` nats are left out. In addition, no answer may
contain another user's marker, no request may fail with a 5xx, the log must not contain any marker,
nothing may be left in the batch, and the server's memory at the end must be within 5 % of that
after a fifth of the time. Server and references compute with one thread each, because the clients
need a core, too.

    python -m benchmarks.soak [--clients 64] [--seconds 300] [--embedded-seconds 60] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from amulet import Amulet, Request
from benchmarks.load import (
    BAD,
    CHAT,
    PREFERENCES,
    QUESTIONS,
    Clock,
    figures_of,
    percentiles,
    serving,
)
from benchmarks.measure import machine
from tests.models import END_OF_TEXT, IM_END, VOCAB_SIZE, byte_tokenizer

TEXT = "/v1/completions"
TIE = 1e-3  # nats; float32 rounds logits to a thousandth of that
GROWTH = 0.05  # of the server's memory
LOOKS = 10  # samples of it during a run
SETTLED = 2  # the sample that the last one is compared with, after a fifth of the time
FULL = (300, 10_000)  # seconds of a full run, and the answers that it must check
PATIENCE = 120.0  # seconds after which a request counts as stuck
MARKER = re.compile(r"zq\d{3}x")
CITIES = ("Rome", "Oslo", "Lima", "Bern")
KINDS = {  # kinds of client by frequency
    "whole": 34,
    "stream": 30,
    "log-probabilities": 8,
    "gone in a stream": 8,
    "gone while waiting": 6,
    "bad body": 5,
    "too long": 2,
    "health": 2,
}


@dataclass(frozen=True)
class Case:
    """One request of a user, and its answer decoded alone.

    Attributes:
        marker: the user's marker, in everything they send.
        path, body: of the request.
        said: the answer's text, or the arguments of its tool call.
    """

    marker: str
    path: str
    body: Mapping[str, Any]
    said: str


def tiny_model(folder: Path) -> None:
    """Save a random model of two layers, whose tokens are bytes, to a folder."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=IM_END,
        pad_token_id=END_OF_TEXT,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_cases(amulet: Amulet, users: int, tokens: int) -> list[list[Case]]:
    """Decode each user's requests alone: steered, two preferences, plain, text, a tool call."""
    return [
        [case for kind in range(4) if (case := _case(amulet, user, kind, tokens)) is not None]
        for user in range(users)
    ]


def _case(amulet: Amulet, user: int, kind: int, tokens: int) -> Case | None:
    marker, number = f"zq{user:03d}x", 4 * user + kind
    wish = f"{PREFERENCES[number % len(PREFERENCES)]} I am {marker}."
    limit = max(2, tokens * (1 + number % 3) // 3)
    steered: dict[str, Any] = {"preference": wish, "strength": 0.5 + number % 2}
    steered["placement"] = "system" if number % 3 else "user"
    if kind == 1:
        steered["preference"] = [wish, {"text": f"Mention {marker}.", "weight": 0.5}]
    for question in QUESTIONS[number % len(QUESTIONS) :] + QUESTIONS:
        asked = f"{marker}: {question}"
        body: dict[str, Any] = {"max_tokens": limit, **(steered if kind < 2 or user % 2 else {})}
        if kind == 3 and user % 4:
            path, body["prompt"] = TEXT, asked
        else:
            path, body["messages"] = CHAT, [{"role": "user", "content": asked}]
        if kind == 3 and not user % 4:
            city = {"type": "object", "properties": {"city": {"enum": list(CITIES)}}}
            function = {"name": "weather", "parameters": {**city, "required": ["city"]}}
            body |= {"tools": [{"type": "function", "function": function}], "max_tokens": 120}
            body |= {"tool_choice": "required", "tools_prompt": "fallback"}
        options = {name: value for name, value in body.items() if name != "max_tokens"}
        if "tool_choice" in options:
            options["tool_choice"] = "any"
        request = Request(**options, max_new_tokens=body["max_tokens"], trace=True, top_logprobs=2)
        reply = amulet.start(request).read()
        gaps = [token.top[0][2] - token.top[1][2] for token in reply.trace or ()]
        if min(gaps) > TIE:
            calls = [json.dumps(call.arguments) for call in reply.tool_calls]
            return Case(marker, path, body, calls[0] if calls else reply.text)
    return None


@dataclass
class Findings:
    """What the clients observed."""

    clock: Clock = field(default_factory=Clock)
    asked: Counter[str] = field(default_factory=Counter)  # by kind of client
    checked: int = 0  # complete answers that were compared
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of whole answers


class User:
    """One client with its own requests."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        cases: Sequence[Case],
        seed: str,
        to: Findings,
        too_many: int = 3000,  # words, for the model's context window
    ) -> None:
        self._http = http
        self._too_many = too_many
        self._cases = cases
        self._draw = random.Random(seed)
        self._to = to

    async def everything(self) -> None:
        """Ask each request once."""
        for case in self._cases:
            await self._tried("whole", case)

    async def until(self, end: float) -> None:
        """Ask one request after the other."""
        while self._to.clock.now() < end:
            (kind,) = self._draw.choices(list(KINDS), list(KINDS.values()))
            await self._tried(kind, self._draw.choice(self._cases))

    async def _tried(self, kind: str, case: Case) -> None:
        self._to.asked[kind] += 1
        try:
            async with asyncio.timeout(PATIENCE):
                await self._ask(kind, case)
        except TimeoutError:
            self._to.wrong.append(f"{kind}: stuck: {case.body}")
        except (httpx.HTTPError, AssertionError, KeyError, IndexError, ValueError) as error:
            self._to.wrong.append(f"{kind}: {type(error).__name__}: {error}: {case.body}")

    async def _ask(self, kind: str, case: Case) -> None:
        draw = self._draw
        if kind == "health":
            response = await self._http.request(draw.choice(["GET", "HEAD"]), "/health")
            assert response.status_code == 200, response.status_code
        elif kind == "bad body":
            method, path, body, status = draw.choice(BAD)
            await self._refused(case, method, path, body, status)
        elif kind == "too long":
            asked = [{"role": "user", "content": f"{case.marker} " * self._too_many}]
            body = {"messages": asked, "preference": case.marker}
            await self._refused(case, "POST", CHAT, body, 400)
        elif kind == "gone while waiting":
            with contextlib.suppress(httpx.TimeoutException):
                timeout = draw.uniform(0.002, 0.5)
                await self._http.post(case.path, json=case.body, timeout=timeout)
        elif kind == "gone in a stream":
            async with contextlib.aclosing(self._events(case, {})) as events:
                async for _ in first_of(events, draw.randrange(1, 6)):
                    pass
        elif kind == "whole":
            await self._whole(case)
        else:
            await self._streamed(case, kind == "log-probabilities")

    async def _refused(self, case: Case, method: str, path: str, body: Any, status: int) -> None:
        sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"Content-Type": "application/json"}
        response = await self._http.request(
            method, path, headers=headers, **({} if body is None else sent)
        )
        assert response.status_code == status, f"{response.status_code}, not {status}"
        assert response.json()["error"]["message"]
        self._own(case, response.text)

    async def _whole(self, case: Case) -> None:
        begun, id_ = self._to.clock.now(), f"{case.marker}-{self._draw.random():.12f}"
        response = await self._http.post(case.path, json=case.body, headers={"x-request-id": id_})
        assert response.status_code == 200, f"{response.status_code} {response.text[:300]}"
        assert response.headers["x-request-id"] == id_
        choice = response.json()["choices"][0]
        message = choice.get("message", choice)
        calls = message.get("tool_calls")
        said = message.get("content", message.get("text"))
        self._check(case, calls[0]["function"]["arguments"] if calls else said, response.text)
        self._to.seconds.append(self._to.clock.now() - begun)

    async def _streamed(self, case: Case, logprobs: bool) -> None:
        wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if logprobs else {}
        said, tokens, raw = "", b"", ""
        async with contextlib.aclosing(self._events(case, wanted)) as events:
            async for event in events:
                raw += json.dumps(event)
                for choice in event["choices"]:
                    delta = choice.get("delta", choice)
                    said += delta.get("content") or delta.get("text") or ""
                    for call in delta.get("tool_calls") or ():
                        said += call["function"]["arguments"]
                    for entry in (choice.get("logprobs") or {}).get("content") or ():
                        tokens += bytes(entry["bytes"])
        if tokens:
            assert tokens.decode("utf-8", "replace") == said, "log-probabilities of other tokens"
        self._check(case, said, raw)

    async def _events(self, case: Case, wanted: Mapping[str, Any]) -> AsyncIterator[Any]:
        body = {**case.body, "stream": True, **wanted}
        async with self._http.stream("POST", case.path, json=body) as response:
            assert response.status_code == 200, f"{response.status_code} {await response.aread()!r}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    yield event
        raise AssertionError("the stream broke off")

    def _check(self, case: Case, said: str, raw: str) -> None:
        self._to.checked += 1
        assert said == case.said, f"{said!r} instead of {case.said!r}"
        self._own(case, raw)

    @staticmethod
    def _own(case: Case, raw: str) -> None:
        others = set(MARKER.findall(raw)) - {case.marker}
        assert not others, f"it holds {others}, which is another user's"


async def first_of(events: AsyncIterator[Any], count: int) -> AsyncIterator[Any]:
    """Yield the first events."""
    async for event in events:
        yield event
        count -= 1
        if not count:
            return


@dataclass
class Outcome:
    """The results of one run.

    Attributes:
        name: of the model.
        memory: MiB of the server, during the run.
        errors: answers with a 5xx.
        left: what the server still held at the end.
        leaks, mistakes: markers and internal errors in its log.
    """

    name: str
    clients: int
    seconds: float
    findings: Findings
    memory: Sequence[float]
    errors: float
    left: Mapping[str, float]
    leaks: int
    mistakes: int
    exit_code: int | None

    @property
    def faults(self) -> list[str]:
        """Descriptions of all faults."""
        found = [f"wrong: {text[:1000]}" for text in self.findings.wrong]
        if self.errors:
            found.append(f"{self.errors:g} answers with a 5xx")
        before, after = self.memory[SETTLED], self.memory[-1]
        if after > (1 + GROWTH) * before:
            found.append(f"memory grew from {before:.0f} to {after:.0f} MiB")
        found += [f"{value:g} {name} left" for name, value in self.left.items() if value]
        if self.leaks:
            found.append(f"{self.leaks} markers in the server's log")
        if self.mistakes:
            found.append(f"{self.mistakes} errors in the server's log")
        if self.exit_code != 0:
            found.append(f"the server ended with {self.exit_code}")
        return [f"{self.name}: {fault}" for fault in found]

    def rows(self) -> Iterator[str]:
        """Yield the lines of its table."""
        found = self.findings
        yield f"## {self.name}, float32, {self.clients} clients, {self.seconds:.0f} s\n"
        yield "| | |\n|---|---|"
        yield f"| requests | {found.asked.total()} |"
        for kind in KINDS:
            yield f"| of these: {kind} | {found.asked[kind]} |"
        yield f"| answers checked against those decoded alone | {found.checked} |"
        yield f"| **wrong, stuck, or with another user's marker** | **{len(found.wrong)}** |"
        yield f"| **5xx** | **{self.errors:g}** |"
        yield f"| **markers in the log** | **{self.leaks}** |"
        left = ", ".join(f"{value:g} {name}" for name, value in self.left.items())
        yield f"| left at the end | {left} |"
        memory = ", ".join(f"{mib:.0f}" for mib in self.memory)
        yield f"| the server's memory in the course of the run, MiB | {memory} |"
        yield f"| whole answers, seconds: median, 90 %, 99 %, most | {percentiles(found.seconds)} |"


async def load(
    url: str, cases: list[list[Case]], seconds: float, seed: int, too_many: int = 3000
) -> tuple[Findings, float, list[float]]:
    """Send every request once, then run the clients for this many seconds.

    Returns:
        What they observed, the seconds it took, and the server's memory during it.
    """
    findings = Findings()
    ticking = asyncio.create_task(findings.clock.run())
    limits = httpx.Limits(max_keepalive_connections=len(cases))
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        users = [
            User(http, own, f"{seed} {number}", findings, too_many)
            for number, own in enumerate(cases)
        ]
        await asyncio.gather(*(user.everything() for user in users))
        begun = findings.clock.now()
        asking = asyncio.gather(*(user.until(begun + seconds) for user in users))
        memory = []
        for look in range(LOOKS):
            await asyncio.sleep(max(0.0, begun + seconds * look / LOOKS - findings.clock.now()))
            memory.append(await _memory(url))
        await asking
        took = findings.clock.now() - begun
    for _ in range(60):  # the server notices the last disconnects within a step
        now = await asyncio.to_thread(figures_of, url)
        if not now["amulet_rows"] and not now["amulet_requests_in_flight"]:
            break
        await asyncio.sleep(0.5)
    ticking.cancel()
    return findings, took, [*memory, await _memory(url)]


async def _memory(url: str) -> float:
    figures = await asyncio.to_thread(figures_of, url)  # not through the clients' loop
    return figures["process_resident_memory_bytes"] / 2**20


def run(name: str, folder: Path | None, options: argparse.Namespace, seconds: float) -> Outcome:
    """Decode the references, start a server, load it, and check what is left.

    Args:
        name: of the model, for the table.
        folder: the model; None is the embedded one.
        options: of the command line.
        seconds: duration of the load.
    """
    if folder is None:
        amulet = Amulet.embedded(dtype="float32", device=options.device)
        users, tokens, further = min(options.clients, 8), 8, ("--device", options.device)
        too_many = 3000
    else:
        amulet = Amulet.from_pretrained(str(folder), dtype="float32", device=options.device)
        users, tokens = options.clients, 9
        further = ("--model", str(folder), "--device", options.device)
        too_many = 400
    own = make_cases(amulet, users, tokens)
    cases = [own[client % users] for client in range(options.clients)]
    del amulet
    print(f"{name}: {sum(map(len, own))} references decoded", flush=True)
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "log"
        with serving("float32", log, *further) as (url, process):
            start = figures_of(url)  # 503 was correct while it was loading
            findings, took, memory = asyncio.run(load(url, cases, seconds, options.seed, too_many))
            end = figures_of(url)
        # A request id starts with the marker and is in the log, which is not a leak.
        told = re.sub(r"zq\d{3}x-[01]\.\d{12}", "", log.read_text(errors="replace"))
    errors = sum(
        value - start.get(key, 0.0)
        for key, value in end.items()
        if key.startswith("amulet_requests_total") and 'status="5' in key
    )
    names = ("rows", "cache_bytes", "requests_in_flight", "requests_waiting")
    left = {key.replace("_", " "): end[f"amulet_{key}"] for key in names}
    return Outcome(
        name,
        options.clients,
        took,
        findings,
        memory,
        errors,
        left,
        len(MARKER.findall(told)),
        len(re.findall(r"in a request:|^Traceback", told, re.MULTILINE)),
        process.returncode,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both models, print tables and, on the last line, JSON; return the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0, help="with the tiny model")
    parser.add_argument("--embedded-seconds", type=float, default=60.0, help="0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="of the server and of the references")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(Path(folder))
        outcomes.append(run("tiny", Path(folder), options, options.seconds))
    if options.embedded_seconds:
        outcomes.append(run("SmolLM2-135M", None, options, options.embedded_seconds))
    faults = list(itertools.chain.from_iterable(outcome.faults for outcome in outcomes))
    checked = sum(outcome.findings.checked for outcome in outcomes)
    seconds, least = FULL
    if options.seconds >= seconds and checked < least:
        faults.append(f"{checked} answers were checked: expected {least}")
    for outcome in outcomes:
        print("\n" + "\n".join(outcome.rows()))
    print("\nEverything held." if not faults else "\nWhat went wrong:")
    for fault in faults[:20]:
        print(f"- {fault}")
    result = {
        "benchmark": "soak",
        "machine": machine(),
        "checked": checked,
        "runs": {
            outcome.name: {
                "requests": outcome.findings.asked.total(),
                "checked": outcome.findings.checked,
                "wrong": len(outcome.findings.wrong),
                "errors": outcome.errors,
                "memory_mib": outcome.memory,
                "seconds": outcome.seconds,
            }
            for outcome in outcomes
        },
        "faults": faults,
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(1 if main()["faults"] else 0)
