"""Compares steering of a GGUF file with llama.cpp's own plain decoding.

Claims, SmolLM2 in 4 bits: a steered token of two rows takes at most 1.1 of llama.cpp's plain one;
so does the first token after 4,000 others; eight steered users together take at most a quarter
of eight plain calls in turn; two rows that share 2,000 tokens take at most 1.1 of one row's memory.
Both run in one process, over the same weights and threads.

    python -m benchmarks.gguf [--rounds 5] [--tokens 32] [--file name.gguf] [--dtype bfloat16]

With `--dtype` also Transformers' plain `generate` and Amulet over it. A processor without
AVX-512 is simulated by a llama.cpp that was built without it, in LLAMA_CPP_LIB_PATH, and by
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 CC=none (Amulet's C code isn't compiled then).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from amulet import Amulet
from amulet.backends.llamacpp.backend import LlamaBackend
from amulet.backends.llamacpp.model import GGUFModel
from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, at_least, at_most
from benchmarks.passages import rag_chat
from benchmarks.users import USERS

LLAMACPP, PLAIN = "llama.cpp, plain", "amulet, plain"
TWO_ROWS, DEFAULT = "amulet, steered (focus 0)", "amulet, steered (default)"
# Two rows, as in the paper: a preferred row and a base row.
GAME: dict[str, Any] = {"strength": 2.0, "focus": 0.0, "loop_guard": 0}
QUESTION = [{"role": "user", "content": "Explain how a bicycle stays upright."}]
PREFERENCE = "Answer in one short sentence."
LONG, SHARED = 4000, 2000


class LlamaCpp:
    """llama.cpp's own loop: one sequence, its greedy sampler, no Amulet code.

    Args:
        model: the weights.
        tokens: maximum length of prompt and answer.
    """

    def __init__(self, model: GGUFModel, tokens: int) -> None:
        lib = self._lib = model.lib
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = tokens, 2048
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.no_perf = True
        self._model = model
        self._context = lib.llama_init_from_model(model.pointer, parameters)
        self._sampler = lib.llama_sampler_init_greedy()

    def answer(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Return this many tokens, even after an end-of-turn token."""
        lib, found = self._lib, []
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
        new = list(ids)
        while True:
            for begin in range(0, len(new), 2048):
                part = new[begin : begin + 2048]
                array = (ctypes.c_int32 * len(part))(*part)
                lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(part)))
            new = [lib.llama_sampler_sample(self._sampler, self._context, -1)]
            found += new
            if len(found) == tokens:
                return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=32)
    parser.add_argument("--file", help="another GGUF file of the model (default: the package's)")
    options = measure.read_options(parser, arguments, dtypes=[])
    amulet = _loaded(options.file)
    amulet.end_ids = frozenset()  # every answer has the same length
    long = 400 if options.quick else LONG
    plain = LlamaCpp(amulet.model, long + 512)
    print(f"load average: {os.getloadavg()[0]:.1f}; {amulet.model.description}")
    claims = [
        *_tokens(amulet, plain, options),
        _first(amulet, plain, options, long),
        _users(amulet, plain, options),
        _memory(amulet.model),
    ]
    figures = {"load_average": os.getloadavg(), "model": amulet.model.description}
    return measure.report("gguf", options, claims, figures)


def _loaded(file: str | None) -> Amulet:
    settings: dict[str, Any] = {"prefix_cache_bytes": 0, "drafts": False}
    if file is not None:
        return Amulet.from_gguf(file, **settings)
    return Amulet.embedded(backend="gguf", **settings)


def _asked(amulet: Amulet, chat: Any, **steering: Any) -> Callable[[int], object]:
    return lambda n: amulet.chat(chat, max_new_tokens=n, **steering)


def _tokens(amulet: Amulet, plain: LlamaCpp, options: Any) -> list[Claim]:
    ids = amulet.encode_chat(QUESTION)
    runs: dict[str, Callable[[int], object]] = {
        LLAMACPP: lambda n: plain.answer(ids, n),
        PLAIN: _asked(amulet, QUESTION),
        TWO_ROWS: _asked(amulet, QUESTION, preference=PREFERENCE, **GAME),
        DEFAULT: _asked(amulet, QUESTION, preference=PREFERENCE),
    }
    for dtype in options.dtypes:
        model = contenders.load("smollm2", dtype)
        own = contenders.amulet_over(contenders.load("smollm2", dtype, pack=True))
        runs[_generate(dtype)] = partial(contenders.generate, model, ids)
        runs[_packed(dtype)] = _asked(own, QUESTION, preference=PREFERENCE, **GAME)
    measure.warm_up(runs)
    times = measure.per_token(runs, options.rounds, options.tokens)
    measure.print_times(times, LLAMACPP)
    compared = [(PLAIN, LLAMACPP, None), (TWO_ROWS, LLAMACPP, 1.1), (DEFAULT, LLAMACPP, None)]
    for dtype in options.dtypes:
        compared += [(TWO_ROWS, _generate(dtype), 0.6), (_packed(dtype), _generate(dtype), None)]
    return [
        at_most(f"per token: {name} / {other}", target, times[name].token, times[other].token)
        for name, other, target in compared
    ]


def _generate(dtype: torch.dtype) -> str:
    return f"`generate`, plain, {measure.name_of(dtype)}"


def _packed(dtype: torch.dtype) -> str:
    return f"amulet over Transformers, steered (focus 0), {measure.name_of(dtype)}"


def _first(amulet: Amulet, plain: LlamaCpp, options: Any, length: int) -> Claim:
    chat = rag_chat(amulet.tokenizer, length, "Which of these places is the oldest?", seed=1)
    ids = amulet.encode_chat(chat)
    steered = _asked(amulet, chat, preference=PREFERENCE, **GAME)
    runs = {LLAMACPP: lambda _: plain.answer(ids, 1), TWO_ROWS: lambda _: steered(1)}
    times = measure.in_turns(runs, max(options.rounds // 2, 1))
    print(f"first token after {len(ids)}: " + str({k: str(Spread.of(v)) for k, v in times.items()}))
    text = f"first token of a prompt of {len(ids)}: {TWO_ROWS} / {LLAMACPP}"
    return at_most(text, 1.1, times[TWO_ROWS], times[LLAMACPP])


def _users(amulet: Amulet, plain: LlamaCpp, options: Any) -> Claim:
    chats = [[{"role": "user", "content": question}] for _, question in USERS]
    prompts = [amulet.encode_chat(chat) for chat in chats]
    requests = [
        {"messages": chat, "preference": wish, "max_new_tokens": options.tokens, **GAME}
        for chat, (wish, _) in zip(chats, USERS, strict=True)
    ]
    times = measure.in_turns(
        {
            LLAMACPP: lambda _: [plain.answer(ids, options.tokens) for ids in prompts],
            TWO_ROWS: lambda _: amulet.batch(requests),
        },
        max(options.rounds // 2, 1),
    )
    text = f"tokens/s of eight together: {TWO_ROWS} / eight in turn by {LLAMACPP}"
    return at_least(text, 4.0, times[LLAMACPP], times[TWO_ROWS])


@torch.inference_mode()
def _memory(model: GGUFModel) -> Claim:
    """Compare the KV cache of one row with that of two rows that share all but 20 tokens."""
    held = []
    for rows in (1, 2):
        backend = LlamaBackend(model)
        backend.reserve(rows, SHARED)
        backend.forward([[7] * SHARED], [0], 0, [SHARED - 1])
        if rows == 2:
            backend.copy_row(0, 1, SHARED)
        backend.forward([[9] * 20] * rows, [SHARED] * rows, 0, [19])
        held.append(backend.nbytes)
        backend.clear()
    print(f"KV cache: {held[0] / 2**20:.1f} MiB of a row, {held[1] / 2**20:.1f} of a pair")
    text = f"memory of two rows that share {SHARED} tokens / of one row"
    return Claim(text, 1.1, Spread.of([held[1] / held[0]]))


if __name__ == "__main__":
    main()
