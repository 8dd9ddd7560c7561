"""Measures the time to the first token: of a long RAG prompt and of a second turn.

Claims: with the preference in the user's turn, the first token after a 4,000-token prompt costs at
most 1.08 of plain `generate`'s; and that of a second turn after a 2,000-token history at most 0.15
of its cost when nothing is kept. Every round has its own passages, so that nothing from an earlier
round can be reused.

    python -m benchmarks.first_token [--dtype bfloat16] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from amulet import Preference
from benchmarks import contenders, measure
from benchmarks.measure import Claim, Spread, at_most, name_of
from benchmarks.passages import Chat, rag_chat

QUESTION = "Which of these places is the oldest?"
SECOND = "And which is the highest?"
PREFERENCE = Preference("Answer in one short sentence.")
PLAIN, PLAIN_OURS = "transformers plain", "amulet plain"
USER, SYSTEM = "amulet steered, user turn", "amulet steered, system"


def long_prompt(options: Any, theirs: Any, packed: Any, length: int) -> tuple[list[Claim], Any]:
    """Time the first token of a long prompt, with the preference in user or system message."""
    amulet = contenders.amulet_over(packed)
    chats = [rag_chat(contenders.tokenizer(), length, QUESTION, i) for i in range(options.rounds)]
    prompts = [amulet.encode_chat(chat) for chat in chats]
    print(f"\nlong prompt: {len(prompts[0])} tokens")

    def ours(placement: str) -> Callable[[int], object]:
        return lambda turn: contenders.chat(
            amulet, chats[turn], 1, preference=PREFERENCE, placement=placement
        )

    runs: dict[str, Callable[[int], object]] = {
        PLAIN: lambda turn: contenders.generate(theirs, prompts[turn], 1),
        PLAIN_OURS: lambda turn: contenders.chat(amulet, chats[turn], 1),
        USER: ours("user"),
        SYSTEM: ours("system"),
    }
    runs[PLAIN](0)
    runs[USER](0)
    times = measure.in_turns(runs, options.rounds)
    what = f"{options.model}, {name_of(theirs.dtype)}, first token, {length} tokens"
    claims = [
        at_most(f"{what}: steered in the user's turn / plain", 1.08, times[USER], times[PLAIN]),
        at_most(f"{what}: the same / our own plain", None, times[USER], times[PLAIN_OURS]),
        at_most(
            f"{what}: steered in the system message / plain", None, times[SYSTEM], times[PLAIN]
        ),
    ]
    return claims, shown(times)


def second_turn(options: Any, packed: Any, length: int) -> tuple[list[Claim], Any]:
    """Time the first token of a second turn, with and without the first turn's rows."""
    cold = contenders.amulet_over(packed)
    warm = contenders.amulet_over(packed, prefix_cache_bytes=2**30)
    seeds = iter(range(1000, 10_000))
    claims, figures = [], {}
    for placement in ("system", "user"):
        given = {"preference": PREFERENCE, "placement": placement}
        times: dict[str, list[float]] = {"cold": [], "kept": []}
        for _ in range(options.rounds + 1):  # the first warms up
            chat = rag_chat(contenders.tokenizer(), length, QUESTION, next(seeds))
            first = warm.chat(chat, max_new_tokens=8, **given)
            chat += [
                {"role": "assistant", "content": first.text or "-"},
                {"role": "user", "content": SECOND},
            ]
            for name, amulet in (("cold", cold), ("kept", warm)):
                times[name].append(second_ms(amulet, chat, given))
        times = {name: took[1:] for name, took in times.items()}
        print(f"\nsecond turn, preference in the {placement} message")
        figures[placement] = shown(times)
        what = f"{options.model}, {name_of(packed.dtype)}, first token of a second turn"
        text = f"{what} ({placement}), {length} tokens of history: kept / cold"
        claims.append(at_most(text, 0.15, times["kept"], times["cold"]))
    return claims, figures


def second_ms(amulet: Any, chat: Chat, given: dict[str, Any]) -> float:
    """Return the milliseconds to the first token of a chat."""
    return measure.milliseconds(lambda: contenders.chat(amulet, chat, 1, **given))


def shown(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Print milliseconds; return them for JSON."""
    for name, took in times.items():
        print(f"{name:30} {Spread.of(took)} ms")
    return {name: asdict(Spread.of(took)) for name, took in times.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and, on the last line, JSON; return the JSON."""
    parser = measure.options_parser(__doc__, rounds=5, tokens=2)
    options = measure.read_options(parser, arguments, dtypes=["bfloat16", "float32"])
    long, history = (256, 192) if options.quick else (4000, 2000)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    for dtype in options.dtypes:
        theirs = contenders.load(options.model, dtype)
        packed = contenders.load(options.model, dtype, pack=True)
        of_long, long_figures = long_prompt(options, theirs, packed, long)
        of_second, second_figures = second_turn(options, packed, history)
        claims += [*of_long, *of_second]
        figures[name_of(dtype)] = {"long_prompt": long_figures, "second_turn": second_figures}
    return measure.report("first_token", options, claims, figures)


if __name__ == "__main__":
    main()
