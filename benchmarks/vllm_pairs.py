"""Compares steered requests on vLLM with plain ones of equally many rows.

N steered requests are 2N rows of vLLM's batch: a preferred and a base row each. They are compared
with 2N plain requests with the same prompts, in the same engine, taking turns. All
answers have the same length, and nothing is kept from one round to the next.

Claim: steered rows decode at least 85 % of the tokens per second of plain ones, greedy and sampled,
prefill included. Run it in the environment that `make test-vllm` builds:

    HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m benchmarks.vllm_pairs [--pairs 8] [--rounds 5]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Set before vLLM is imported: runs the engine in this process, so that they share no core.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from amulet.models.embedded import embedded_folder
from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, name_of

WINDOW = 1024
WISHES = ("Answer in one short sentence.", "Talk like a pirate.", "Use simple words.", "Be warm.")
WAYS = {"greedy": 0.0, "drawn": 0.8}  # by temperature


def start_engine(model: str, dtype: str, rows: int, *, eager: bool) -> Any:
    """Start vLLM with Amulet's scheduler and processor; only "smollm2" has trained weights."""
    from vllm import LLM

    from amulet.vllm_backend.cli import PROCESSOR, SCHEDULER

    random = model != "smollm2"
    with tempfile.TemporaryDirectory() if random else nullcontext(str(embedded_folder())) as folder:
        if random:
            config = contenders.config_of(model)
            config.head_dim = max(32, config.hidden_size // config.num_attention_heads)
            config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
            config.save_pretrained(folder)
            contenders.tokenizer().save_pretrained(folder)
        return LLM(
            model=str(Path(folder)),
            load_format="dummy" if random else "auto",
            dtype=dtype,
            enforce_eager=eager,
            max_model_len=WINDOW,
            max_num_seqs=rows,
            scheduler_cls=SCHEDULER,
            logits_processors=[PROCESSOR],
            enable_prefix_caching=False,  # so that no round reuses earlier prompts
            seed=0,
        )


def requests(engine: Any, pairs: int) -> tuple[list[tuple[list[int], Any]], list[list[int]]]:
    """Return prompts with their pairs, and the prompts of all their rows."""
    from amulet.vllm_backend.frontend import Encoder

    encoder = Encoder(
        engine.get_tokenizer(),
        chat_template=None,
        options=None,
        window=WINDOW,
        rows=2 * pairs,
        step=WINDOW,
    )
    steered, plain = [], []
    for number in range(pairs):
        text = f"Tell me {number + 2} things about the sea and the ships on it. " * 5
        wish = WISHES[number % len(WISHES)]
        settings = {"preference": wish, "strength": 2.0, "floor": 0.1, "placement": "system"}
        settings |= {"focus": 0.0, "loop_guard": 0}  # two rows
        found = encoder.chat([{"role": "user", "content": text}], settings)
        assert found is not None
        assert found.pair is not None
        steered.append((found.prompt, found.pair))
        plain += [found.prompt, found.pair.prompts[-1]]
    return steered, plain


def runs_of(engine: Any, pairs: int) -> dict[str, Callable[[int], object]]:
    """Return the contenders, each of which decodes n tokens of all its answers."""
    from vllm import SamplingParams

    steered, plain = requests(engine, pairs)

    def run(prompts: Sequence[list[int]], extra: Sequence[Any], heat: float, n: int) -> None:
        params = [
            SamplingParams(max_tokens=n, ignore_eos=True, temperature=heat, extra_args=args)
            for args in extra
        ]
        given = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = engine.generate(given, params, use_tqdm=False)
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        assert counts == {n}, counts

    found: dict[str, Callable[[int], object]] = {}
    for way, heat in WAYS.items():
        found[f"vLLM, plain, {way}"] = lambda n, heat=heat: run(plain, [None] * len(plain), heat, n)
        found[f"vLLM, steered, {way}"] = lambda n, heat=heat: run(
            [ids for ids, _ in steered], [pair.args() for _, pair in steered], heat, n
        )
    return found


def claims_of(what: str, times: Mapping[str, measure.Times], tokens: int) -> list[Claim]:
    """Return the claims, as plain time over steered time, the ratio of the speeds."""
    claims = []
    for way in WAYS:
        plain, steered = (times[f"vLLM, {kind}, {way}"] for kind in ("plain", "steered"))
        text = f"{what}: steered / plain vLLM, {way}"
        claims += [
            measure.at_least(
                f"{text}, whole answers",
                0.85,
                plain.whole(tokens),
                steered.whole(tokens),
            ),
            measure.at_least(f"{text}, decoding alone", None, plain.token, steered.token),
        ]
    return claims


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=64)
    parser.add_argument("--pairs", type=int, default=8, help="steered requests (default 8)")
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    if len(options.dtypes) > 1:
        parser.error("--dtype: expected one, because an engine has only one.")
    dtype = name_of(options.dtypes[0])
    engine = start_engine(options.model, dtype, 2 * options.pairs, eager=options.quick)
    runs = runs_of(engine, options.pairs)
    warm = measure.warm_up(runs)
    times = measure.per_token(runs, options.rounds, options.tokens)
    shown: dict[str, Any] = measure.print_times(times, next(iter(runs)))
    rows = 2 * options.pairs
    for name, own in times.items():
        rates = [rows * options.tokens / ms * 1e3 for ms in own.whole(options.tokens)]
        print(f"{name:36} {Spread.of(rates)} tokens per second in {rows} rows, prefill included")
        shown[name] |= {"tokens_per_s": asdict(Spread.of(rates)), "warm_up_s": warm[name]}
    engine.llm_engine.engine_core.shutdown()
    what = f"{options.model}, {dtype}, tokens per second in {rows} rows"
    claims = claims_of(what, times, options.tokens)
    return measure.report("vllm_pairs", options, claims, {dtype: shown})


if __name__ == "__main__":
    main()
