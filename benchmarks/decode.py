"""What a steered token costs: Amulet against Transformers' plain `generate` and its guidance.

Claim: on the embedded model a steered answer costs at most 1.10x (float32) and 1.06x (bfloat16)
of plain `generate` per token, and is at least 1.8x faster than Transformers' own guidance.

The contenders take turns within each round, in one process and on the same prompts; a token's
time is that of a long answer less that of a one-token answer, over the tokens between. Figures
are medians over rounds, with the smallest and largest; ratios are taken round by round.

    python benchmarks/decode.py [--rounds 5] [--tokens 48] [--dtype float32 --dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from amulet import Amulet, Preference
from amulet.prompts import encode_chat

QUESTION = (
    "My neighbour wants to plant a small orchard behind her house. Explain which fruit trees do "
    "well in a cool and rainy place, how far apart they should stand, when to prune them, and "
    "what to do about birds. She has little time on workdays and no experience at all."
)
PREFERENCE = Preference("Talk like a pirate.")


def contenders(dtype: torch.dtype) -> dict[str, Callable[[int], None]]:
    """Return functions that decode exactly n tokens, by name; each loads nothing more."""
    # Nothing is kept from one answer to the next: each pays its own prefill.
    theirs = Amulet.embedded(
        dtype=dtype, pack=False, prefix_cache_bytes=0
    )  # as Transformers has it
    ours = Amulet.embedded(dtype=dtype, prefix_cache_bytes=0)
    chat = [{"role": "user", "content": QUESTION}]
    prompts = encode_chat(theirs.tokenizer, chat, [PREFERENCE], "system")
    base, preferred = torch.tensor([prompts.base]), torch.tensor([prompts.preferred[0]])
    print(f"prompts of {base.shape[1]} and {preferred.shape[1]} tokens, {dtype}")

    def generate(ids: torch.Tensor, n: int, **options: object) -> None:
        out = theirs.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            **options,
        )
        assert out.shape[1] - ids.shape[1] == n

    def guided(n: int) -> None:
        generate(preferred, n, guidance_scale=3.0, negative_prompt_ids=base)

    def answer(amulet: Amulet, n: int, preference: Preference | None) -> None:
        never = transformers.LogitsProcessorList(
            [transformers.SuppressTokensLogitsProcessor(sorted(amulet.end_ids), device="cpu")]
        )
        reply = amulet.chat(chat, preference=preference, max_new_tokens=n, logits_processor=never)
        assert len(reply.token_ids) == n

    return {
        "transformers plain": lambda n: generate(base, n),
        "transformers guidance": guided,
        "amulet plain": lambda n: answer(ours, n, None),
        "amulet steered": lambda n: answer(ours, n, PREFERENCE),
        "amulet steered, not packed": lambda n: answer(theirs, n, PREFERENCE),
    }


def measure(
    runs: dict[str, Callable[[int], None]], rounds: int, tokens: int
) -> dict[str, dict[str, list[float]]]:
    """Return for each contender its milliseconds to the first token and per further token."""
    times: dict[str, dict[str, list[float]]] = {n: {"first": [], "token": []} for n in runs}
    for run in runs.values():
        run(3)  # warm up
    for _ in range(rounds):
        for name, run in runs.items():
            first, whole = (_milliseconds(run, n) for n in (1, tokens))
            times[name]["first"].append(first)
            times[name]["token"].append((whole - first) / (tokens - 1))
    return times


def _milliseconds(run: Callable[[int], None], n: int) -> float:
    start = time.perf_counter()
    run(n)
    return (time.perf_counter() - start) * 1e3


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure, print a table and, as the last line, JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    result: dict[str, object] = {
        "benchmark": "decode",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "SmolLM2-135M-Instruct",
    }
    for dtype in options.dtype or ["float32", "bfloat16"]:
        times = measure(contenders(getattr(torch, dtype)), options.rounds, options.tokens)
        plain = times["transformers plain"]
        figures: dict[str, object] = {}
        print(f"{'ms':28} | first token | per token | per token against plain generate")
        for name, own in times.items():
            ratios = [a / b for a, b in zip(own["token"], plain["token"], strict=True)]
            print(
                f"{name:28} | {_spread(own['first'])} | {_spread(own['token'])} | {_spread(ratios)}"
            )
            figures[name] = {
                "first_ms": statistics.median(own["first"]),
                "token_ms": statistics.median(own["token"]),
                "ratio": statistics.median(ratios),
            }
        guided = times["transformers guidance"]["token"]
        faster = [a / b for a, b in zip(guided, times["amulet steered"]["token"], strict=True)]
        print(f"steered is faster than guidance by {_spread(faster)}\n")
        result[dtype] = {**figures, "faster_than_guidance": statistics.median(faster)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
