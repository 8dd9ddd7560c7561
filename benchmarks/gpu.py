"""Measures steered decoding on a GPU: Llama shapes of 1B and 8B, random weights, bfloat16.

Claims, at batch 1: a steered token costs at most 1.03 of Amulet's own plain token and at most 0.5
of Transformers' plain `generate`, and reads weights and caches at 60 % of the memory bandwidth or
more; guidance, first tokens and tokens per second of 64 steered users are shown. Amulet's steps are
CUDA graphs of Transformers' operations or, compiled, of fewer operations. Without a GPU only
`--quick` runs, a check with a tiny shape on the CPU.

    python -m benchmarks.gpu [--shape llama-1b --shape llama-8b] [--rounds 5] [--tokens 64]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from amulet.preference import DEFAULT_STEERING
from benchmarks import contenders, measure
from benchmarks.decode import CHAT, GUIDANCE, PREFERENCE, peers
from benchmarks.decode import PLAIN as EAGER
from benchmarks.measure import Claim, Spread, at_least, at_most, name_of
from benchmarks.passages import rag_chat

PLAIN, STEERED = "amulet plain", "amulet steered"
COMPILED_PLAIN, COMPILED = "amulet plain, compiled", "amulet steered, compiled"


def contenders_of(model: Any, chat: Any, compiles: bool) -> dict[str, Callable[[int], object]]:
    """Return the contenders, each of which decodes one answer."""
    eager = contenders.amulet_over(model)

    def run(amulet: Any, preference: Any) -> Callable[[int], object]:
        return lambda n: contenders.chat(amulet, chat, n, preference=preference)

    runs: dict[str, Callable[[int], object]] = {
        **peers(model, chat, DEFAULT_STEERING.placement),
        PLAIN: run(eager, None),
        STEERED: run(eager, PREFERENCE),
    }
    if compiles:
        compiled = contenders.amulet_over(model, compile=True)
        runs[COMPILED_PLAIN] = run(compiled, None)
        runs[COMPILED] = run(compiled, PREFERENCE)
    return runs


def many_users(
    model: Any, chats: Sequence[Any], options: Any, compiles: bool
) -> tuple[Spread, Spread]:
    """Return tokens per second of all steered users together, with prefill and without."""
    amulet = contenders.amulet_over(model, max_rows=3 * len(chats), compile=compiles)

    def together(n: int) -> None:
        amulet.batch(
            [{"messages": c, "preference": PREFERENCE, "max_new_tokens": n} for c in chats]
        )

    together(options.tokens)
    times = measure.per_token({"users": together}, options.rounds, options.tokens)["users"]
    whole = times.whole(options.tokens)
    with_prefill = [len(chats) * options.tokens / ms * 1e3 for ms in whole]
    return Spread.of(with_prefill), Spread.of([len(chats) / ms * 1e3 for ms in times.token])


def measure_shape(shape: str, dtype: torch.dtype, device: str, options: Any) -> Any:
    """Return one shape's claims and figures."""
    speed = measure.bandwidth(options.quick, device)
    print(f"\n{shape}, {name_of(dtype)}; memory copies {speed['copy']:.0f} GB/s")
    model = contenders.load(shape, dtype, device=device)
    length = 64 if options.quick else 512
    chat = CHAT if options.quick else rag_chat(contenders.tokenizer(), length, "Which is oldest?")
    compiles = (options.compile or "on") == "on" and not options.quick
    runs = contenders_of(model, chat, compiles)
    warm = measure.warm_up(runs, options.tokens)
    times = measure.per_token(runs, options.rounds, options.tokens)
    shown: dict[str, Any] = measure.print_times(times, EAGER)
    tokens = len(contenders.amulet_over(model).encode_chat(chat)) + options.tokens // 2
    shares = {}
    for name, own in times.items():
        rows = 1 if "plain" in name else 2  # the focus row is short
        size = contenders.weight_bytes(model)
        size += rows * contenders.cache_bytes(model.config, dtype, tokens)
        best = max(speed.values())
        shares[name] = Spread.of([size / ms / 1e6 / best for ms in own.token])
        shown[name] |= {"warm_up_s": warm[name], "bandwidth_share": asdict(shares[name])}
    count = 4 if options.quick else 64
    chats = [rag_chat(contenders.tokenizer(), length, "Which is oldest?", i) for i in range(count)]
    rate, decode_rate = many_users(model, chats, options, compiles)
    shown["users"] = {"tokens_per_s": asdict(rate), "decode_tokens_per_s": asdict(decode_rate)}
    best_steered, best_plain = (COMPILED, COMPILED_PLAIN) if COMPILED in times else (STEERED, PLAIN)
    steered, what = times[best_steered].token, f"{shape}, {name_of(dtype)}, {device}, per token"
    return [
        at_most(f"{what}: {best_steered} / own plain", 1.03, steered, times[best_plain].token),
        at_most(f"{what}: {best_steered} / plain `generate`", 0.5, steered, times[EAGER].token),
        Claim(f"{what}: share of bandwidth, {best_steered}", 0.6, shares[best_steered], False),
        at_least(
            f"{what}: plain `generate` / {STEERED}", None, times[EAGER].token, times[STEERED].token
        ),
        at_least(
            f"{what}: guidance / {best_steered}",
            None,
            times[GUIDANCE].token,
            times[best_steered].token,
        ),
        at_most(
            f"{shape}: first token: {best_steered} / plain `generate`",
            None,
            times[best_steered].first,
            times[EAGER].first,
        ),
        Claim(f"{shape}: {count} steered users, prefill included", None, rate, unit=" tokens/s"),
        Claim(f"{shape}: the same, decoding alone", None, decode_rate, unit=" tokens/s"),
    ], shown


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=64)
    parser.add_argument("--shape", action="append", choices=["llama-1b", "llama-8b", "tiny"])
    parser.add_argument("--compile", choices=["on", "off"], help="(default on; with --quick off)")
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        sys.exit("There is no CUDA GPU; --quick runs a tiny shape on the CPU.")
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for shape in options.shape or (["tiny"] if options.quick else ["llama-1b", "llama-8b"]):
        for dtype in options.dtypes:
            of_shape, figures[f"{shape}, {name_of(dtype)}"] = measure_shape(
                shape, dtype, device, options
            )
            claims += of_shape
    return measure.report("gpu", options, claims, figures)


if __name__ == "__main__":
    main()
