"""Measures what a steered user costs beside a plain one, when nearly all of a prompt is shared.

Claims, in bfloat16: a steered request with 2,000 shared tokens holds at most 1.10 of a plain one's
KV cache; behind 4,000 shared tokens, the attention of a pair of rows takes at most 1.10 of one
row's; and eight steered users with 1,500 tokens each get at least .85 of the tokens per second that
eight plain users get. The default steering has a third row, without the question (focus).

    python -m benchmarks.shared [--dtype bfloat16] [--rounds 5] [--tokens 24]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amulet import Amulet
from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, at_least, at_most, name_of
from benchmarks.passages import Chat, rag_chat
from benchmarks.users import USERS

PLAIN, PAIR, DEFAULT = "plain", "steered, two rows", "steered, default"
GIVEN: dict[str, dict[str, Any]] = {
    PLAIN: {},
    PAIR: {"preference": "Answer in one short sentence.", "focus": 0.0},
    DEFAULT: {"preference": "Answer in one short sentence."},
}


def memory(what: str, amulet: Amulet, chat: Chat, tokens: int) -> tuple[list[Claim], Any]:
    """Return what each request holds after a few tokens."""
    held = {}
    for name, given in GIVEN.items():
        stream = amulet.stream(chat, max_new_tokens=tokens, **given)
        for count, _ in enumerate(stream):
            if count == tokens // 2:
                held[name] = amulet.cache_bytes
                break
        stream.close()
    print({name: f"{count / 2**20:.1f} MiB" for name, count in held.items()})
    return [
        Claim(
            f"{what}: KV cache, {name} / plain",
            1.10,
            Spread.of([held[name] / held[PLAIN]]),
        )
        for name in (PAIR, DEFAULT)
    ], held


def attention(
    what: str, amulet: Amulet, chats: list[Chat], options: Any
) -> tuple[list[Claim], Any]:
    """Compare how much longer a token takes behind a long prompt than behind a short one."""
    runs: dict[str, Callable[[int], object]] = {
        f"{name}, {size}": lambda n, chat=chat, given=given: contenders.chat(
            amulet, chat, n, **given
        )
        for name, given in GIVEN.items()
        for size, chat in zip(("short", "long"), chats, strict=True)
    }
    measure.warm_up(runs)
    times = measure.per_token(runs, options.rounds, options.tokens)
    figures = measure.print_times(times, f"{PLAIN}, long")
    more = {
        name: [
            long - short
            for long, short in zip(
                times[f"{name}, long"].token, times[f"{name}, short"].token, strict=True
            )
        ]
        for name in GIVEN
    }
    claims = [
        at_most(f"{what}: attention, {name} / plain", target, more[name], more[PLAIN])
        for name, target in ((PAIR, 1.10), (DEFAULT, None))
    ]
    claims += [
        at_most(
            f"{what}: whole token, {name} / plain",
            None,
            times[f"{name}, long"].token,
            times[f"{PLAIN}, long"].token,
        )
        for name in (PAIR, DEFAULT)
    ]
    return claims, figures


def users(what: str, amulet: Amulet, chats: list[Chat], options: Any) -> tuple[list[Claim], Any]:
    """Compare eight steered users with eight plain ones, all in one batch."""

    def run(name: str) -> Callable[[int], object]:
        def together(n: int) -> None:
            requests = [
                {
                    "messages": chat,
                    "max_new_tokens": n,
                    **(GIVEN[name] and {**GIVEN[name], "preference": preference}),
                }
                for chat, (preference, _) in zip(chats, USERS, strict=True)
            ]
            assert {len(reply.token_ids) for reply in amulet.batch(requests)} == {n}

        return together

    runs = {name: run(name) for name in GIVEN}
    measure.warm_up(runs)
    times = measure.per_token(runs, options.rounds, options.tokens)
    figures = measure.print_times(times, PLAIN)
    return [
        at_least(f"{what}: tokens per second, {name} / plain", target, plain, steered)
        for name, target in ((PAIR, 0.85), (DEFAULT, None))
        for plain, steered in [(times[PLAIN].token, times[name].token)]
    ], figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=24)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16"])
    held, long, each = (200, 400, 150) if options.quick else (2000, 4000, 1500)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    tokenizer = contenders.tokenizer()

    def chats(length: int, count: int = 1) -> list[Chat]:
        return [rag_chat(tokenizer, length, USERS[i][1], seed=i) for i in range(count)]

    for dtype in options.dtypes:
        model = contenders.load(options.model, dtype, pack=True)
        amulet = contenders.amulet_over(model)
        # Prompts are kept, so that a token's time has no part of a prefill's.
        kept = contenders.amulet_over(model, prefix_cache_bytes=2**31)
        what = f"{options.model}, {name_of(dtype)}"
        parts = (
            memory(f"{what}, {held} shared tokens", amulet, chats(held)[0], options.tokens),
            attention(f"{what}, {long} tokens", kept, [*chats(60), *chats(long)], options),
            users(f"{what}, eight users, {each} tokens each", kept, chats(each, 8), options),
        )
        claims += [claim for found, _ in parts for claim in found]
        figures[name_of(dtype)] = [shown for _, shown in parts]
    return measure.report("shared", options, claims, figures)


if __name__ == "__main__":
    main()
