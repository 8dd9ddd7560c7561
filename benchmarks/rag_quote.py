"""Compares a whole steered answer that quotes its passages with plain `generate`.

Claim: after a 1,500-token prompt, with the preference in the user's turn, the whole answer takes at
most 0.6 of plain `generate`'s time. Both answers have the same number of tokens. Drafts depend on
how much the answer copies, so that share is shown; so are Amulet without drafts, Transformers with
its own prompt lookup, and an answer in the model's own words, about which nothing is claimed.

    python -m benchmarks.rag_quote [--dtype bfloat16] [--rounds 3] [--tokens 96]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, at_most, name_of
from benchmarks.passages import rag_chat

# Question and preference for which SmolLM2 quotes, and for which it does not.
QUOTES = (
    "Tell me what the passages say about the first places.",
    "Answer with the exact sentences of the passages, in quotation marks.",
)
OWN_WORDS = ("Which place would a child like best, and why?", "Talk like a pirate.")
PLAIN, LOOKUP = "transformers plain", "transformers plain, prompt lookup"
OURS, STEERED, UNDRAFTED = "amulet plain", "amulet steered", "amulet steered, no drafts"


def quoted_share(answer: Sequence[int], prompt: Sequence[int], n: int = 8) -> float:
    """Return the share of an answer's runs of n tokens that are in the prompt, 0 to 1."""
    known = {tuple(prompt[i : i + n]) for i in range(len(prompt) - n + 1)}
    runs = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def compare(
    theirs: Any, packed: Any, case: tuple[str, str], options: Any
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return each contender's milliseconds of a whole answer, and the figures for JSON."""
    question, preference = case
    chat = rag_chat(contenders.tokenizer(), options.prompt_tokens, question)
    drafting = contenders.amulet_over(packed, drafts=True)
    undrafted = contenders.amulet_over(packed)
    base = drafting.encode_chat(chat)
    generate = functools.partial(contenders.generate, theirs, base)
    steered = {"preference": preference, "placement": "user"}
    runs: dict[str, Callable[[int], object]] = {
        PLAIN: generate,
        LOOKUP: lambda n: generate(n, prompt_lookup_num_tokens=10),
        OURS: lambda n: contenders.chat(drafting, chat, n),
        STEERED: lambda n: contenders.chat(drafting, chat, n, **steered),
        UNDRAFTED: lambda n: contenders.chat(undrafted, chat, n, **steered),
    }
    if case == OWN_WORDS:
        runs = {name: runs[name] for name in (PLAIN, STEERED)}
    answer = drafting.chat(chat, max_new_tokens=options.tokens, **steered)
    share = quoted_share(answer.token_ids, base)
    print(f"\n{name_of(theirs.dtype)}, {len(base)} tokens: {answer.text[:300]!r} ...")
    print(f"{share:.0%} of the answer is copied from the prompt")
    warm = measure.warm_up(runs)
    times = measure.per_token(runs, options.rounds, options.tokens)
    shown: dict[str, Any] = measure.print_times(times, PLAIN)
    whole = {name: own.whole(options.tokens) for name, own in times.items()}
    print("whole answer, ms: " + ", ".join(f"{name} {Spread.of(w)}" for name, w in whole.items()))
    return whole, {**shown, "quoted_share": share, "warm_up_s": warm}


def claims_of(
    what: str, quoted: dict[str, list[float]], own: dict[str, list[float]]
) -> list[Claim]:
    """Return the claims about answers that quote, and about those in the model's own words."""
    plain = quoted[PLAIN]
    return [
        at_most(f"{what} that quotes: steered / plain `generate`", 0.6, quoted[STEERED], plain),
        at_most(f"{what} that quotes: without drafts / plain", None, quoted[UNDRAFTED], plain),
        at_most(f"{what} that quotes: steered / its lookup", None, quoted[STEERED], quoted[LOOKUP]),
        at_most(f"{what} in own words: steered / plain", None, own[STEERED], own[PLAIN]),
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=3, tokens=96)
    parser.add_argument("--prompt-tokens", type=int, help="(default 1500; with --quick 160)")
    options = measure.read_options(parser, arguments, dtypes=["bfloat16", "float32"])
    options.prompt_tokens = options.prompt_tokens or (160 if options.quick else 1500)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for dtype in options.dtypes:
        theirs = contenders.load(options.model, dtype)
        packed = contenders.load(options.model, dtype, pack=True)
        quoted, quoted_figures = compare(theirs, packed, QUOTES, options)
        own, own_figures = compare(theirs, packed, OWN_WORDS, options)
        figures[name_of(dtype)] = {"quotes": quoted_figures, "own_words": own_figures}
        what = f"{options.model}, {name_of(dtype)}, whole answer, {options.prompt_tokens} tokens,"
        claims += claims_of(what, quoted, own)
    return measure.report("rag_quote", options, claims, figures)


if __name__ == "__main__":
    main()
