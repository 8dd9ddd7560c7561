"""gpt-oss: `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>`.

Every message of the model has such a header, so `amulet.output.channels` finds the sections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from amulet.tool_calls.base import (
    CUT,
    CallReader,
    Function,
    Mark,
    Piece,
    WholeReader,
    arguments_rule,
)

NAME = "Harmony"
SPANS: tuple[tuple[str, str], ...] = ()
START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN = "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)  # of a message
EXTRA: tuple[str, ...] = (CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

# The recipient is before or after the channel.
_CALL = re.compile(r"(?s:.*?)\bto=(?:functions\.)?([^\s<]+)(?s:.*?)<\|message\|>(?s:(.*))")


def detect(template: str) -> bool:
    return CHANNEL in template and MESSAGE in template


def starts(text: str, names: Sequence[str]) -> bool | None:
    return False


def reader(functions: Sequence[Function] = ()) -> CallReader:
    return _Reader()


class _Reader(WholeReader):
    """Parses a message with its header; only its end shows that it is complete."""

    def is_inside(self) -> bool:
        return False

    def finish(self, cut: bool) -> list[Piece]:
        found = _CALL.fullmatch(self._text)
        if found is None:
            wrong = CUT if cut else "expected a recipient and a message"
            return [Piece("end", self._text.strip(), wrong)]
        name = Piece("name", found[1])
        if cut:
            return [name, Piece("end", self._text.strip(), CUT)]
        arguments = Piece("arguments", found[2].strip() or "{}")
        return [name, arguments, Piece("end", self._text.strip())]


def grammar(functions: Sequence[Function], parallel: bool, mark: Mark, template: str) -> str:
    # A message that calls ends the turn, so there is one call. Thinking is not part of it.
    head = f'{_thought(mark)} {mark(CHANNEL)} "commentary to=functions."'
    tail = f'" " {mark(CONSTRAIN)} "json" {mark(MESSAGE)}'
    rules = ["start: " + " | ".join(f"call_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        rules.append(f'call_{i}: {head} "{function.name}" {tail} arguments_{i}')
        rules.append(arguments_rule(i, function))
    return "\n".join(rules)


def answer_head(mark: Mark) -> str:
    """Return a Lark term that precedes an answer other than a call."""
    return f'{_thought(mark)} {mark(CHANNEL)} "final" {mark(MESSAGE)}'


def _thought(mark: Mark) -> str:
    """Return a Lark term for the header of thinking, followed by the next message's start."""
    return f'{mark(CHANNEL)} "analysis" {mark(MESSAGE)} {mark(START)} "assistant"'
