"""Measures what a decode step costs by the length of its rows, on models of tiny width.

Llama's layers attend to all columns; five of six layers of Gemma 3 to a window of 512. One row, and
a pair that shares all but its last tokens. Rows are filled without a prefill: attention over zeros
takes as long. Nothing here has a target.

    python -m benchmarks.lengths [--dtype bfloat16] [--rounds 5] [--tokens 8]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedModel

from amulet.backends.transformers.backend import TransformersBackend
from amulet.backends.transformers.cpu.layers import are_native
from amulet.backends.transformers.cpu.packing import pack_linears
from amulet.backends.transformers.pages import PageCache
from benchmarks import measure
from benchmarks.contenders import random_model
from benchmarks.measure import Claim, Spread, name_of, ratios

LENGTHS = 2000, 8000, 32000
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}
CONFIGS = {
    "Llama": LlamaConfig(**SHAPE),
    "Gemma 3": Gemma3TextConfig(**SHAPE, sliding_window=512),
}


def steps(
    model: PreTrainedModel, length: int, rows: int, tokens: int
) -> tuple[Callable[[int], object], float]:
    """Return a function that decodes some tokens of rows that share all their first ids.

    And how large their KV cache is, in MiB.
    """
    backend = TransformersBackend(model)
    cache = backend._cache
    assert isinstance(cache, PageCache)
    cache.begin(0, [0], length)
    for row in range(1, rows):
        cache.copy_row(0, row, length)

    @torch.inference_mode()
    def run(turn: int) -> None:
        with backend.working(rows):
            for i in range(tokens):
                backend.step([[7]] * rows, [length + turn * tokens + i] * rows)

    run(0)
    return run, backend.nbytes / 2**20


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=8)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    lengths = (100, 200) if options.quick else LENGTHS
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for dtype in options.dtypes:
        for name, config in CONFIGS.items():
            model = random_model(config, dtype, "cpu")
            pack_linears(model)
            if not are_native(model):
                print("Layers are not C code here: only they have pages.")
                break
            made = {
                f"{rows} row{'s' * (rows > 1)} of {length}": steps(
                    model, length, rows, options.tokens
                )
                for length in lengths
                for rows in (1, 2)
            }
            print(f"\n{name}, {name_of(dtype)}")
            runs = {what: run for what, (run, _) in made.items()}
            times = {
                what: [took / options.tokens for took in all_took[1:]]
                for what, all_took in measure.in_turns(runs, options.rounds + 1).items()
            }
            for what, took in times.items():
                print(f"{what:20} {Spread.of(took)} ms per token, {made[what][1]:.1f} MiB")
            figures[f"{name}, {name_of(dtype)}"] = {
                what: {**asdict(Spread.of(took)), "mib": made[what][1]}
                for what, took in times.items()
            }
            shortest, longest = (f"1 row of {length}" for length in (lengths[0], lengths[-1]))
            for one, other in ((longest, shortest), (f"2 rows of {lengths[-1]}", longest)):
                spread = Spread.of(ratios(times[one], times[other]))
                claims.append(Claim(f"{name}, {name_of(dtype)}: {one} / {other}", None, spread))
    return measure.report("lengths", options, claims, figures)


if __name__ == "__main__":
    main()
