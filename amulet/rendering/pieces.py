"""Maps a reply's trace to its characters, each with the tokens that wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amulet.reply import Reply, TokenTrace

BOUNDS = (0.5, 1.5, 3.0, 5.0)
"""Nats from which a token has the next deeper colour: e^.5 is 1.6 times likelier, e^5 148."""

_CONTROLS = dict.fromkeys(
    {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {9, 10},
    "\N{REPLACEMENT CHARACTER}",
)
_PARTIAL = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: one token's text, or a character that several tokens wrote.

    Attributes:
        text: as the reader sees it.
        tokens: the tokens that wrote it; empty without a trace.
        is_reasoning: it is in a thinking span.
    """

    text: str
    tokens: tuple[TokenTrace, ...] = ()
    is_reasoning: bool = False

    @property
    def raised(self) -> float:
        """How many nats likelier steering made it than the plain model; below 0: less likely."""
        raised = sum(token.steered - token.base for token in self.tokens)
        return 0.0 if math.isnan(raised) else raised

    @property
    def level(self) -> int:
        """`raised` in steps of `BOUNDS`, from −4 (much lowered) over 0 (alike) to 4."""
        steps = sum(abs(self.raised) >= bound for bound in BOUNDS)
        return steps if self.raised > 0 else -steps

    @property
    def differs(self) -> bool:
        """Whether the plain model would have said something else here."""
        return any(token.unsteered_id != token.token_id for token in self.tokens)

    @property
    def unsteered(self) -> str:
        """What the plain model would have said, without incomplete characters."""
        return "".join(token.unsteered_text for token in self.tokens)


def harmless(text: str) -> str:
    """Return the text without control characters, with which a model could control a terminal.

    Line breaks and tabs stay. Unicode's direction overrides are removed, too: with them an answer
    could be displayed in another order than it was written.
    """
    return text.translate(_CONTROLS)


def pieces_of(reply: Reply) -> list[Piece]:
    """Return what the reader sees of a reply, reasoning first, in pieces that concatenate to it.

    Tokens that the reader doesn't see (the end of turn, tool calls, a cut-off stop string) are
    left out. If a tokenizer's texts don't add up to the reply's, its pieces have no tokens.
    """
    whole = [
        Piece(text, is_reasoning=is_reasoning)
        for text, is_reasoning in ((reply.reasoning, True), (reply.text, False))
        if text
    ]
    if not reply.trace:
        return whole
    target = reply.reasoning + reply.text
    found = _aligned(reply.trace, target)
    if "".join(text for text, _ in found) != target:
        return whole
    return list(_split(found, len(reply.reasoning)))


def _aligned(trace: Sequence[TokenTrace], target: str) -> list[tuple[str, tuple[TokenTrace, ...]]]:
    """Walk through `target` token by token; bytes of one character are taken together."""
    found: list[tuple[str, tuple[TokenTrace, ...]]] = []
    waiting: list[TokenTrace] = []  # their bytes belong to an incomplete character
    at = 0
    for token in trace:
        if not token.text:
            continue
        if _PARTIAL in token.text and not target.startswith(token.text, at):
            waiting.append(token)
            continue
        start = _find(token.text, target, at, 4 * len(waiting))
        if start < 0:
            continue
        if waiting:
            found.append((target[at:start], tuple(waiting)))
            waiting, at = [], start
        end = min(start + len(token.text), len(target))
        found.append((target[at:end], (token,)))
        at = end
    if at < len(target):
        found.append((target[at:], tuple(waiting)))
    return [(text, tokens) for text, tokens in found if text]


def _find(text: str, target: str, at: int, unknown: int) -> int:
    """Return where a token's text starts in `target`, or −1 if it is not visible.

    That is at `at`; or up to `unknown` characters later, after incomplete characters; or after the
    space that some tokenizers drop; or the rest of `target` is the start of the text, if a stop
    sequence cut it.
    """
    if unknown:
        return target.find(text, at + 1, at + 1 + unknown + len(text))
    if target.startswith(text, at):
        return at
    if target.startswith(text, at + 1) and target[at].isspace():
        return at + 1
    rest = target[at:]
    return at if rest and text.startswith(rest) else -1


def _split(found: Sequence[tuple[str, tuple[TokenTrace, ...]]], reasoning: int) -> Iterator[Piece]:
    """Yield pieces; the first `reasoning` characters are a thinking span's."""
    at = 0
    for text, tokens in found:
        inside = max(0, min(len(text), reasoning - at))
        if inside:
            yield Piece(text[:inside], tokens, is_reasoning=True)
        if text[inside:]:
            yield Piece(text[inside:], tokens)
        at += len(text)
