"""Finds reasoning, text and calls in answers that are messages with channels (gpt-oss)."""

from __future__ import annotations

import re

from amulet.output.sections import Section, first_marker, held_back
from amulet.tool_calls import harmony
from amulet.tool_calls.base import CUT, CallReader, Piece

_CHANNEL = re.compile(re.escape(harmony.CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?!assistant\b)[^\s<]")
_HEADS = (harmony.CHANNEL, "to=", harmony.CONSTRAIN, harmony.MESSAGE, harmony.START)
TEXTS = ("final", "commentary")  # channels for the reader; commentary also calls tools
BETWEEN = "\n\n"  # between two messages to the reader, or two of reasoning


class Channels:
    """A `Scanner`. Headers are not for the reader; they count as reasoning.

    Args:
        begun: the last message of the prompt, which the model continues, from its role on.
        forced: a grammar prescribes the headers, so they count as text.
    """

    markers = harmony.EXTRA

    def __init__(self, begun: str, forced: bool = False) -> None:
        self._heads: Section = "text" if forced else "reasoning"
        self.section: Section = self._heads
        self._header = self._is_first = True  # the next text belongs to a header, the first one
        self._parted = False  # the message is not the first of its section
        self._buffer = ""
        self._reader: CallReader | None = None
        self._last: Section | None = None  # section of the text released last
        self.push(begun.removeprefix("assistant"))
        self._last = None

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return the pieces that can be released."""
        self._buffer += text
        out: list[Piece] = []
        while self._head() if self._header else self._body(out, keep_back=True):
            pass
        return out

    def finish(self, cut: bool = False) -> list[Piece]:
        """Return the text held back; see `Scanner.finish`."""
        out: list[Piece] = []
        if self._header:
            begun = self._buffer.strip()
            if "to=" in begun:
                out.append(Piece("end", begun, CUT))
            elif self._is_first and begun and not cut:
                out.append(Piece("text", self._buffer))
            return out
        self._body(out, keep_back=cut)
        if self._reader is not None:
            out += self._reader.finish(cut)
        return out

    def _head(self) -> bool:
        head, found, rest = self._buffer.partition(harmony.MESSAGE)
        begun = self._buffer.lstrip()
        if self._is_first and begun and not any(_agree(begun, opening) for opening in _HEADS):
            self._open("text")  # the model writes no headers
            return True
        if not found:
            return False
        channel = _CHANNEL.search(head)
        if _RECIPIENT.search(head):
            self._open("call")
            self._reader = harmony.reader()
            self._reader.push(head + harmony.MESSAGE)
        else:
            self._open("text" if channel and channel[1] in TEXTS else "reasoning")
        self._buffer = rest
        return True

    def _open(self, section: Section) -> None:
        self._header = self._is_first = False
        self.section = section
        self._parted = self._last == section

    def _body(self, out: list[Piece], keep_back: bool) -> bool:
        found = first_marker(self._buffer, harmony.ENDS)
        held = held_back(self._buffer, harmony.ENDS) if keep_back else 0
        at = found[0] if found else len(self._buffer) - held
        text, self._buffer = self._buffer[:at], self._buffer[at:]
        if self._reader is not None:
            self._reader.push(text)
        elif text and self.section != "call":
            out.append(Piece(self.section, (BETWEEN if self._parted else "") + text))
            self._last, self._parted = self.section, False
        if found is None:
            return False
        if self._reader is not None:
            out += self._reader.finish(cut=False)
            self._reader = None
        if found[1] != harmony.START:  # START belongs to the next header
            self._buffer = self._buffer[len(found[1]) :]
        self._header, self.section = True, self._heads
        return True


def _agree(text: str, opening: str) -> bool:
    """Tell whether a text, or the part of it so far, begins with another."""
    return text.startswith(opening) or opening.startswith(text)
