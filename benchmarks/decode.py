"""Compares the cost of a steered token with Transformers' plain `generate` and guidance.

Claim: per token, a steered answer costs at most 1.03 (bfloat16) or 1.07 (float32) of plain
`generate`, compiled 0.58, with int8 weights 0.45; and guidance takes 1.9 and 2.8 times as long.
Drafts are off and nothing is kept between answers. Compiled, int8 and int4 contenders run only in
bfloat16.

    python -m benchmarks.decode [--model smollm2] [--dtype bfloat16] [--rounds 5] [--tokens 32]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from amulet import Preference
from amulet.preference import DEFAULT_STEERING, Placement
from amulet.prompting.prompts import encode_chat
from benchmarks import contenders, measure
from benchmarks.measure import Claim, Times, at_least, at_most, name_of

QUESTION = (
    "My neighbour wants to plant a small orchard behind her house. Explain which fruit trees do "
    "well in a cool and rainy place, how far apart they should stand, when to prune them, and "
    "what to do about birds. She has little time on workdays and no experience at all."
)
CHAT = [{"role": "user", "content": QUESTION}]
PREFERENCE = Preference("Talk like a pirate.")

PLAIN, GUIDANCE = "transformers plain", "transformers guidance"
STEERED, COMPILED = "amulet steered", "amulet steered, compiled"
INT8, INT8_COMPILED = "amulet steered, int8", "amulet steered, int8, compiled"
INT4, INT4_COMPILED = "amulet steered, int4", "amulet steered, int4, compiled"
UNPACKED = "amulet steered, not packed"
TWO_ROWS = "amulet steered, not packed, two rows"

Runs = dict[str, Callable[[int], object]]


def peers(model: Any, chat: Any = CHAT, placement: Placement = "system") -> Runs:
    """Return Transformers' contenders over an unpacked model."""
    prompts = encode_chat(contenders.tokenizer(), chat, [PREFERENCE], placement)
    base, preferred = prompts.base, prompts.preferred[0]
    print(f"prompts of {len(base)} and {len(preferred)} tokens, {name_of(model.dtype)}")
    strength = DEFAULT_STEERING.strength
    return {
        PLAIN: lambda n: contenders.generate(model, base, n),
        GUIDANCE: lambda n: contenders.guided(model, preferred, base, n, strength),
    }


def amulets(name: str, dtype: torch.dtype, unpacked: Any, compiles: bool) -> Runs:
    """Return Amulet's contenders; in bfloat16 also int8 and int4, and compiled if requested."""

    def run(
        model: Any, preference: Preference | None, focus: float | None = None, **options: Any
    ) -> Callable[[int], object]:
        amulet = contenders.amulet_over(model, **options)
        return functools.partial(_answer, amulet, preference, focus)

    packed = contenders.load(name, dtype, pack=True)
    runs: Runs = {
        "amulet plain": run(packed, None),
        STEERED: run(packed, PREFERENCE),
        UNPACKED: run(unpacked, PREFERENCE),
        TWO_ROWS: run(unpacked, PREFERENCE, focus=0.0),
    }
    if dtype == torch.bfloat16:
        int8 = contenders.load(name, dtype, pack="int8")
        int4 = contenders.load(name, dtype, pack="int4")
        runs[INT8] = run(int8, PREFERENCE)
        runs[INT4] = run(int4, PREFERENCE)
        if compiles:
            runs[COMPILED] = run(packed, PREFERENCE, compile=True)
            runs[INT8_COMPILED] = run(int8, PREFERENCE, compile=True)
            runs[INT4_COMPILED] = run(int4, PREFERENCE, compile=True)
    return runs


def _answer(amulet: Any, preference: Preference | None, focus: float | None, n: int) -> list[int]:
    options = {} if focus is None else {"focus": focus}
    return contenders.chat(amulet, CHAT, n, preference=preference, **options)


def read_per_weight(name: str) -> float | None:
    """Return the bytes that a contender reads per weight; None means the model's dtype.

    int4 has a scale and a zero per 32 weights, and SmolLM2's head, a fifth of the weights, in 8
    bits.
    """
    return 1 if "int8" in name else 0.7 if "int4" in name else None


def claims_of(dtype: torch.dtype, model: str, times: dict[str, Times]) -> list[Claim]:
    """Return the claims about one dtype's times."""
    what = f"{model}, {name_of(dtype)}, per token"
    plain, guidance = times[PLAIN].token, times[GUIDANCE].token

    def token(name: str) -> list[float]:
        return times[name].token

    eager_target = 1.03 if dtype == torch.bfloat16 else 1.07
    claims = [
        at_most(f"{what}: steered / plain `generate`", eager_target, token(STEERED), plain),
        at_least(f"{what}: guidance / steered", 1.9, guidance, token(STEERED)),
        at_most(
            f"{what}: steered, not packed, two rows / guidance", 1.05, token(TWO_ROWS), guidance
        ),
    ]
    if INT8 in times:
        claims.append(at_most(f"{what}: steered, int8 / plain", None, token(INT8), plain))
        claims.append(at_most(f"{what}: steered, int4 / plain", None, token(INT4), plain))
    if COMPILED in times:
        claims += [
            at_most(f"{what}: steered, compiled / plain `generate`", 0.58, token(COMPILED), plain),
            at_most(f"{what}: the same with int8", 0.45, token(INT8_COMPILED), plain),
            at_most(f"{what}: the same with int4", 0.45, token(INT4_COMPILED), plain),
            at_least(f"{what}: guidance / steered, compiled", 2.8, guidance, token(COMPILED)),
        ]
    return claims


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=32)
    parser.add_argument("--compile", choices=["on", "off"], help="(default on; with --quick off)")
    options = measure.read_options(parser, arguments, dtypes=["bfloat16", "float32"])
    compiles = (options.compile or ("off" if options.quick else "on")) == "on"
    speed = measure.bandwidth(options.quick)
    print(f"memory: read {speed['read']:.1f} GB/s, copy {speed['copy']:.1f} GB/s")
    claims: list[Claim] = []
    figures: dict[str, Any] = {"bandwidth_gb_s": speed}
    for dtype in options.dtypes:
        model = contenders.load(options.model, dtype)
        runs = {**peers(model), **amulets(options.model, dtype, model, compiles)}
        warm = measure.warm_up(runs)
        times = measure.per_token(runs, options.rounds, options.tokens)
        shown: dict[str, Any] = measure.print_times(times, PLAIN)
        for name, own in shown.items():
            size = contenders.weight_bytes(model, read_per_weight(name))
            rate = size / own["token_ms"]["median"] / 1e6
            own["warm_up_s"], own["bandwidth_share"] = warm[name], rate / speed["read"]
        print(
            "share of the memory's read bandwidth: "
            + ", ".join(f"{name} {own['bandwidth_share']:.0%}" for name, own in shown.items())
        )
        figures[name_of(dtype)] = shown
        claims += claims_of(dtype, options.model, times)
    return measure.report("decode", options, claims, figures)


if __name__ == "__main__":
    main()
