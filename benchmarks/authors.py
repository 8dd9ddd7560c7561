"""Compares a steered answer with the authors' way of decoding it.

Claim: 128 tokens after a 512-token prompt are at least 25 times faster. The authors' way, written
from the paper, takes two full forward passes over the whole text so far for each token, then 60
iterations of the game over the vocabulary. It is timed at evenly spaced positions of the answer and
interpolated linearly between them; `--full` times every position. The head gets only the last
position, which favours the authors over the model's default.

Every timed token is compared with Amulet's; they should agree in float32.

    python -m benchmarks.authors [--dtype float32] [--rounds 3] [--tokens 128] [--full]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from amulet import Preference, Steering
from amulet.evaluation.literal import play
from amulet.prompting.prompts import Prompts, encode_chat
from benchmarks import contenders, measure
from benchmarks.measure import Spread, name_of
from benchmarks.passages import rag_chat

PREFERENCE = Preference("Your answer should be concise as much as possible.")
QUESTION = "Which of these places would you visit first, and why?"


@torch.inference_mode()
def authors_token(model: Any, preferred: Sequence[int], base: Sequence[int]) -> int:
    """Return the next token by two passes over the whole texts and the game as published.

    Their top-p of 0.95 before an argmax changes nothing and is left out.
    """
    p, r = (
        model(torch.tensor([list(text)]), use_cache=False, logits_to_keep=1)
        .logits[:, -1]
        .float()
        .log_softmax(-1)
        for text in (preferred, base)
    )
    return int(play(p, r).argmax())


def whole_answer(
    model: Any, prompts: Prompts, answer: Sequence[int], places: Sequence[int]
) -> tuple[float, int]:
    """Return the milliseconds that the authors' code takes, and how many tokens agreed.

    Args:
        answer: the tokens that Amulet decoded, used as the context of each position.
        places: positions to time, ascending, including the first and last of the answer.
    """
    times, agreed = [], 0
    for place in places:
        texts = [[*prompt, *answer[:place]] for prompt in (prompts.preferred[0], prompts.base)]
        chosen: list[int] = []
        times.append(
            measure.milliseconds(lambda: chosen.append(authors_token(model, *texts)))  # noqa: B023
        )
        agreed += chosen[0] == answer[place]
    return integrate(places, times), agreed


def integrate(places: Sequence[int], times: Sequence[float]) -> float:
    """Return the sum over all positions, interpolated linearly between the timed ones."""
    total = times[0]
    for i in range(1, len(places)):
        steps = places[i] - places[i - 1]
        slope = (times[i] - times[i - 1]) / steps
        total += sum(times[i - 1] + slope * step for step in range(1, steps + 1))
    return total


def spread_places(count: int, tokens: int) -> list[int]:
    """Return `count` evenly spaced positions of an answer, first and last included."""
    count = max(min(count, tokens), 2)
    return sorted({round(i * (tokens - 1) / (count - 1)) for i in range(count)})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=3, tokens=128)
    parser.add_argument("--prompt-tokens", type=int, help="(default 512; with --quick 96)")
    parser.add_argument("--full", action="store_true", help="time every position")
    options = measure.read_options(parser, arguments, dtypes=["float32"])
    length = options.prompt_tokens or (96 if options.quick else 512)
    chat = rag_chat(contenders.tokenizer(), length, QUESTION)
    prompts = encode_chat(contenders.tokenizer(), chat, [PREFERENCE], "system")
    places = spread_places(options.tokens if options.full else 12, options.tokens)
    how = "every position" if options.full else f"from {len(places)} positions"
    print(f"prompts of {len(prompts.base)} and {len(prompts.preferred[0])} tokens; {how}")
    steering, claims = Steering.paper(), []
    figures: dict[str, Any] = {"positions_timed": places, "extrapolated": not options.full}
    for dtype in options.dtypes:
        model = contenders.load(options.model, dtype)
        amulet = contenders.amulet_over(contenders.load(options.model, dtype, pack=True))
        amulet.steering = steering

        def ours(n: int, amulet: Any = amulet) -> list[int]:
            return contenders.chat(amulet, chat, n, preference=PREFERENCE)

        answer = ours(options.tokens)
        warm = measure.warm_up({"amulet steered": ours})
        authors_token(model, prompts.preferred[0], prompts.base)
        own, theirs, agreed = [], [], 0
        for _ in range(options.rounds):
            own.append(measure.milliseconds(lambda: ours(options.tokens)))
            whole, agreed = whole_answer(model, prompts, answer, places)
            theirs.append(whole)
        print(
            f"{name_of(dtype)}: the authors' code {Spread.of(theirs)} ms, ours {Spread.of(own)} ms"
        )
        print(f"{agreed} of {len(places)} timed tokens are the same")
        figures[name_of(dtype)] = {
            "authors_ms": asdict(Spread.of(theirs)),
            "amulet_ms": asdict(Spread.of(own)),
            "tokens_agreed": agreed,
            "warm_up_s": warm,
        }
        text = (
            f"{options.model}, {name_of(dtype)}, {options.tokens} tokens after {length}: "
            f"the authors' code ({how}) / steered"
        )
        claims.append(measure.at_least(text, 25, theirs, own))
    return measure.report("authors", options, claims, figures)


if __name__ == "__main__":
    main()
