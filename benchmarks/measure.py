"""Measures contenders in turns, and reports their times, ratios and claims.

Contenders take turns within each round, in one process and on the same prompts. Ratios are computed
per round, so that a temporarily slow machine affects both sides.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

MODELS = ("smollm2", "qwen2-0.5b", "qwen3.5-0.8b", "lfm2-350m", "bloom-560m", "mamba-370m", "tiny")


# --- options


def options_parser(doc: str | None, *, rounds: int, tokens: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every script.

    Args:
        doc: the script's docstring.
        rounds, tokens: the defaults; with `--quick` 1 and 4.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help=f"turns of each contender (default {rounds})")
    parser.add_argument("--tokens", type=int, help=f"tokens of an answer (default {tokens})")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--model", choices=MODELS, help="(default smollm2; with --quick tiny)")
    parser.add_argument(
        "--quick", action="store_true", help="only check that it runs; the figures mean nothing"
    )
    parser.set_defaults(_rounds=rounds, _tokens=tokens)
    return parser


def read_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *, dtypes: Sequence[str]
) -> argparse.Namespace:
    """Return the options with their defaults filled in; `dtypes` is a list of torch dtypes."""
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else options._rounds)
    options.tokens = options.tokens or (4 if options.quick else options._tokens)
    options.model = options.model or ("tiny" if options.quick else "smollm2")
    names = options.dtype or (dtypes[:1] if options.quick else dtypes)
    options.dtypes = [getattr(torch, name) for name in names]
    if options.tokens < 2:
        parser.error("--tokens: expected 2 or more, because the first token is timed separately.")
    return options


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without `torch.`"""
    return str(dtype).removeprefix("torch.")


# --- times


@dataclass(frozen=True)
class Spread:
    """The median, minimum and maximum of the rounds' figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one figure."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.most:.3g})"


@dataclass
class Times:
    """Milliseconds by round: to the first token, and for each token after it."""

    first: list[float]
    token: list[float]

    def whole(self, tokens: int) -> list[float]:
        """Return the milliseconds of a whole answer of this many tokens, by round."""
        return [f + t * (tokens - 1) for f, t in zip(self.first, self.token, strict=True)]


def milliseconds(run: Callable[[], object]) -> float:
    """Return how long a call takes, including work still queued on the GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def in_turns(runs: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Return each contender's milliseconds by round; `run` is given the round's number.

    A different contender starts each round, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn, names in enumerate(_orders(list(runs), rounds)):
        for name in names:
            times[name].append(milliseconds(lambda: runs[name](turn)))  # noqa: B023
    return times


def per_token(
    runs: Mapping[str, Callable[[int], object]], rounds: int, tokens: int
) -> dict[str, Times]:
    """Return each contender's times; `run` decodes exactly the given number of tokens.

    A token's time is the difference between a long answer and a one-token answer, divided by the
    further tokens. Prefill, tokenizer and set-up count towards the first token.
    """
    times = {name: Times([], []) for name in runs}
    for names in _orders(list(runs), rounds):
        for name in names:
            first, whole = (milliseconds(lambda: runs[name](n)) for n in (1, tokens))  # noqa: B023
            times[name].first.append(first)
            times[name].token.append((whole - first) / (tokens - 1))
    return times


def warm_up(runs: Mapping[str, Callable[[int], object]], tokens: int = 4) -> dict[str, float]:
    """Run each contender once, which also compiles; return the seconds."""
    seconds = {name: milliseconds(lambda: run(tokens)) / 1e3 for name, run in runs.items()}  # noqa: B023
    print("warm-up, s: " + ", ".join(f"{name} {took:.1f}" for name, took in seconds.items()))
    return seconds


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours / theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _orders(names: list[str], rounds: int) -> list[list[str]]:
    starts = [turn % len(names) for turn in range(rounds)]
    return [names[start:] + names[:start] for start in starts]


# --- the machine


def bandwidth(quick: bool = False, device: str = "cpu") -> dict[str, float]:
    """Return the speed of a large torch read and of a copy (read and written), in GB/s.

    It is the best of several, so that other programs don't inflate shares of it.
    """
    size = 2**24 if quick else 2**29  # bytes; beyond any processor's cache
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = in_turns(
        {"read": lambda _: source.sum(), "copy": lambda _: target.copy_(source)}, 3 if quick else 9
    )
    moved = {"read": size, "copy": 2 * size}
    return {name: moved[name] / min(took[1:]) / 1e6 for name, took in times.items()}


def machine() -> dict[str, str]:
    """Return processor, threads, device and versions, on which the figures depend."""
    found = {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> dict[str, float]:
    """Return the peak memory of this process in MiB, including loading and all contenders."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


# --- the report


@dataclass(frozen=True)
class Claim:
    """One line of the table: the claim, its bound, and the measurement.

    Args:
        text: what is compared with what.
        target: the bound, or None if the figure is only shown.
        measured: the figure's spread over the rounds.
        at_most: whether the bound is an upper one.
        unit: appended to the figures, such as " s".
    """

    text: str
    target: float | None
    measured: Spread
    at_most: bool = True
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median is within the bound; None without a bound."""
        if self.target is None:
            return None
        median = self.measured.median
        return median <= self.target if self.at_most else median >= self.target

    def bound(self) -> str:
        """Return the bound as text, or "shown" without a bound."""
        if self.target is None:
            return "shown"
        return f"{'≤' if self.at_most else '≥'} {self.target:g}{self.unit}"


def at_least(
    text: str, target: float | None, theirs: Sequence[float], ours: Sequence[float]
) -> Claim:
    """Return the claim that theirs takes at least this many times as long as ours."""
    return Claim(text, target, Spread.of(ratios(theirs, ours)), at_most=False)


def at_most(
    text: str, target: float | None, ours: Sequence[float], theirs: Sequence[float]
) -> Claim:
    """Return the claim that ours takes at most this share of their time."""
    return Claim(text, target, Spread.of(ratios(ours, theirs)))


def table(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return claims, in the JSON form of `report`, as a Markdown table."""
    lines = ["| claim | target | measured | spread | met |", "|---|---|---|---|---|"]
    for claim in claims:
        met = {True: "yes", False: "no", None: ""}[claim["met"]]
        low, high, unit = f"{claim['least']:.3g}", f"{claim['most']:.3g}", claim["unit"]
        lines.append(
            f"| {claim['claim']} | {claim['bound']} | {claim['median']:.3g}{unit} "
            f"| {low} to {high} | {met} |"
        )
    return "\n".join(lines)


def report(
    name: str,
    options: argparse.Namespace,
    claims: Sequence[Claim],
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """Print machine, claims and, on the last line, JSON with everything; return the JSON."""
    given = {key: value for key, value in vars(options).items() if not key.startswith("_")}
    given["dtypes"] = [name_of(dtype) for dtype in options.dtypes]
    given.pop("dtype")
    result = {
        "benchmark": name,
        "machine": machine(),
        "options": given,
        "peak_memory_mib": peak_memory(),
        **figures,
        "claims": [
            {
                "claim": claim.text,
                "target": claim.target,
                "bound": claim.bound(),
                "unit": claim.unit,
                **asdict(claim.measured),
                "met": claim.met,
            }
            for claim in claims
        ],
    }
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"peak memory of the process: {peak_memory()['process']:.0f} MiB")
    if options.quick:
        print("--quick: the figures mean nothing.")
    print("\n" + table(result["claims"]) + "\n")
    print(json.dumps(result))
    return result


def print_times(times: Mapping[str, Times], against: str) -> dict[str, dict[str, dict[str, float]]]:
    """Print each contender's times and ratios for prefill and decode; return them for JSON."""
    print(
        f"\n{'ms, median (least to most)':36} {'first token':>26} {'per token':>26} {'ratio':>22}"
    )
    figures = {}
    for name, own in times.items():
        spreads = {
            "first_ms": Spread.of(own.first),
            "token_ms": Spread.of(own.token),
            "ratio": Spread.of(ratios(own.token, times[against].token)),
        }
        first, token, ratio = spreads.values()
        print(f"{name:36} {first!s:>26} {token!s:>26} {ratio!s:>22}")
        figures[name] = {key: asdict(spread) for key, spread in spreads.items()}
    return figures
