"""Finds thinking spans and tool calls in the text of an answer while it is decoded.

An answer is a sequence of sections: "text" for the reader, "reasoning" between a model's thinking
markers, and "call" for tool calls. Text that may be the start of a marker is held back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from amulet.prompting.chat_template import THINKING
from amulet.tool_calls.base import CUT, CallReader, Dialect, Function, Piece

Section: TypeAlias = Literal["text", "reasoning", "call"]


def find_thinking(template: str) -> tuple[str, str] | None:
    """Return the thinking markers in a chat template, if any."""
    return next((pair for pair in THINKING if pair[1] in template), None)


class Scanner(Protocol):
    """Splits an answer's text into pieces; `Spans` does so by markers."""

    section: Section
    markers: tuple[str, ...]
    """Texts that must reach it even where they are special tokens."""

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return the pieces that can be released."""

    def finish(self, cut: bool = False) -> list[Piece]:
        """Return the pieces held back, after decoding has ended.

        Args:
            cut: decoding was stopped by a limit or by the caller; then an incomplete call is not a
                call, and the possible start of a marker is not text.
        """


@dataclass(frozen=True)
class Calls:
    """How calls are recognised: the dialect, the names that may be called, and their schemas."""

    dialect: Dialect
    names: tuple[str, ...]
    functions: tuple[Function, ...] = ()


@dataclass
class _Doubt:
    """A closing marker that seems to be part of a value, and the alternative if it is not.

    Args:
        reader: its state before the marker.
        text: the marker and the text after it.
        pieces: the pieces since, if it is part of a value.
    """

    reader: CallReader
    text: str = ""
    pieces: list[Piece] = field(default_factory=list)


class Spans:
    """Recognises thinking spans at the start of an answer, and calls in one dialect anywhere.

    Space around spans is dropped.

    Args:
        thinking: the markers of a thinking span; None looks for none.
        opened: the prompt has already opened the thinking span.
        calls: how calls look; None looks for none.
    """

    def __init__(
        self, thinking: tuple[str, str] | None, opened: bool = False, calls: Calls | None = None
    ) -> None:
        spans = calls.dialect.SPANS if calls else ()
        extra = calls.dialect.EXTRA if calls else ()
        self.section: Section = "reasoning" if thinking and opened else "text"
        self.markers = (*(thinking or ()), *(m for span in spans for m in span if m), *extra)
        self._thinking = thinking
        self._calls = calls
        self._closes = dict(spans)
        self._close = ""
        self._reader: CallReader | None = None
        self._doubt: _Doubt | None = None
        self._buffer = ""
        self._at_start = True  # no text for the reader so far
        self._trim = self.section == "reasoning"  # drop space before the section's first letter

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        return self._scan(ended=False)

    def finish(self, cut: bool = False) -> list[Piece]:
        pieces = self._scan(ended=not cut)
        while not cut and self._doubt is not None:
            self._close_section(pieces)
            pieces += self._scan(ended=True)
        if self._reader is not None:
            pieces += [*(self._doubt.pieces if self._doubt else ()), *self._reader.finish(cut)]
            self._reader = None
        elif self.section == "text":
            pieces += self._cut_text()
        return pieces

    def _cut_text(self) -> list[Piece]:
        """Return the rest of a text that was cut off: space, or the start of a marker."""
        begun = self._buffer.strip()
        if not begun:
            return [Piece("text", self._buffer)] if self._buffer and not self._trim else []
        if self._thinking is not None and self._at_start and self._thinking[0].startswith(begun):
            return []
        return [Piece("end", begun, CUT)]

    def _scan(self, ended: bool) -> list[Piece]:
        steps = {"text": self._text, "reasoning": self._reasoning, "call": self._call}
        out: list[Piece] = []
        while steps[self.section](out, ended):  # a marker was found; another may follow
            pass
        return out

    def _text(self, out: list[Piece], ended: bool) -> bool:
        if self._at_start and (begun := self._beginning(ended)) is not None:
            return begun
        found = first_marker(self._buffer, tuple(self._closes))
        if found is not None:
            at, opening = found
            self._release("text", self._buffer[:at].rstrip(), out)
            self._begin_call(self._closes[opening], self._buffer[at + len(opening) :])
            return True
        keep = len(self._buffer)
        if not ended:
            keep -= held_back(self._buffer, tuple(self._closes))
            if self._calls is not None:
                keep = len(self._buffer[:keep].rstrip())
        # Text that is cut off inside the next call's marker is not for the reader.
        is_cut = self._trim and any(m.startswith(self._buffer.strip()) for m in self._closes)
        if not (ended and is_cut):
            self._release("text", self._buffer[:keep], out)
        self._buffer = self._buffer[keep:]
        return False

    def _beginning(self, ended: bool) -> bool | None:
        """Look for what can only start an answer; None if it is text."""
        head = self._buffer.lstrip()
        if self._thinking is not None:
            opening = self._thinking[0]
            if head.startswith(opening):
                self._buffer, self.section, self._trim = head[len(opening) :], "reasoning", True
                return True
            if opening.startswith(head) and not ended:
                return False
        if self._calls is not None and head:
            begins = self._calls.dialect.starts(head, self._calls.names)
            if begins:
                self._begin_call("", head)
                return True
            if begins is None and not ended:
                return False
        return None

    def _begin_call(self, close: str, rest: str) -> None:
        assert self._calls is not None
        self.section, self._close, self._buffer = "call", close, rest
        self._reader = self._calls.dialect.reader(self._calls.functions)

    def _reasoning(self, out: list[Piece], ended: bool) -> bool:
        assert self._thinking is not None
        closing = self._thinking[1]
        at = self._buffer.find(closing)
        if at >= 0:
            self._release("reasoning", self._buffer[:at].rstrip(), out)
            self._buffer = self._buffer[at + len(closing) :]
            self.section, self._trim = "text", True
            return True
        keep = len(self._buffer) - (0 if ended else held_back(self._buffer, (closing,)))
        keep = len(self._buffer[:keep].rstrip())
        self._release("reasoning", self._buffer[:keep], out)
        self._buffer = self._buffer[keep:]
        return False

    def _call(self, out: list[Piece], ended: bool) -> bool:
        assert self._reader is not None
        at = self._buffer.find(self._close) if self._close else -1
        if at < 0:
            held = held_back(self._buffer, (self._close,)) if self._close and not ended else 0
            self._read(len(self._buffer) - held, out)
            return False
        self._read(at, out)
        if self._reader.is_inside():
            self._doubt = self._doubt or _Doubt(copy.deepcopy(self._reader))
            self._read(len(self._close), out)
            return True
        self._close_section(out)
        return True

    def _read(self, length: int, out: list[Piece]) -> None:
        """Pass this much of the buffer to the reader."""
        assert self._reader is not None
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        pieces = self._reader.push(text)
        if self._doubt is None:
            out += pieces
        else:
            self._doubt.text += text
            self._doubt.pieces += pieces

    def _close_section(self, out: list[Piece]) -> None:
        assert self._reader is not None
        pieces, doubt = self._reader.finish(cut=False), self._doubt
        if doubt is not None:
            pieces = [*doubt.pieces, *pieces]
            if any(piece.error for piece in pieces):  # the first closing marker was a real one
                pieces = doubt.reader.finish(cut=False)
                self._buffer = doubt.text + self._buffer
        out += pieces
        self._buffer = self._buffer.removeprefix(self._close)
        self._reader = self._doubt = None
        self.section, self._trim = "text", True

    def _release(self, kind: Literal["text", "reasoning"], text: str, out: list[Piece]) -> None:
        text = text.lstrip() if self._trim else text
        if not text:
            return
        self._trim = False
        if kind == "text" and text.strip():
            self._at_start = False
        out.append(Piece(kind, text))


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """Return the position of the first marker, and the marker."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    return min(found) if found else None


def held_back(text: str, markers: Sequence[str]) -> int:
    """Return the length of the longest suffix that is the start of a marker."""
    longest = max(map(len, markers), default=0) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
