"""Converts the ids of one answer to events: text, reasoning and tool calls.

ids -> text -> pieces by section -> stop sequences (only in the reader's text) -> events. After each
token `steered_tokens.py` sets how the next one is chosen.
"""

from __future__ import annotations

import json
import secrets
import string
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amulet.decoding.generation import Generation
from amulet.grammar import Matcher
from amulet.output.detokenizer import Detokenizer
from amulet.output.sections import Scanner
from amulet.output.steered_tokens import Policy
from amulet.output.stop_sequences import StopStrings, special_letters, without_letters
from amulet.reply import Event, InvalidToolCall, ToolCall
from amulet.tool_calls.base import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME_CALLS = 2
"""How often an answer may make the same call. Further ones are left out, and the same number of
them ends the answer: small models get into such loops."""


class Answer:
    """Collects one answer. `on_token` runs in the decoding thread, the queue is read elsewhere.

    Args:
        tokenizer: the model's.
        stop: strings that end the answer.
        scanner: finds reasoning and calls.
        matcher: follows the grammar of the text after the reasoning, if there is a grammar.
        parallel: permit more than one call.
        context: the ids before the answer if it continues their text; () for a new turn.

    Attributes:
        queue: events to be read, each with the range `[start, end)` of the tokens it covers.
        text, reasoning: the parts queued so far.
        tool_calls, invalid_tool_calls: the finished calls.
        finished: whether all events have been queued.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        scanner: Scanner,
        matcher: Matcher | None = None,
        parallel: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self.queue: deque[tuple[Event, int, int]] = deque()
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[ToolCall] = []
        self.invalid_tool_calls: list[InvalidToolCall] = []
        self.finished = False
        self._detokenizer = Detokenizer(tokenizer, context=context)
        self._silent = _silent_markers(tokenizer, scanner.markers)
        letters = special_letters(tokenizer, stop)
        self._letters = {token_id: letter for token_id, (_, letter) in letters.items()}
        self._stops = StopStrings(stop, dict(letters.values()))
        self._scanner = scanner
        self._matcher = matcher
        self._parallel = parallel
        self._call: _Call | None = None
        self._left_out = 0  # calls in a row
        self._tokens = 0
        self._covered = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.found

    def lead(self, generation: Generation) -> None:
        """Collect a generation's tokens and, from now on, control how it chooses them."""
        generation.on_token = self.on_token
        self._traced = generation.trace
        self._policy = Policy(generation, self._matcher)
        self._policy.prepare(self._scanner.section)

    def on_token(self, token_id: int) -> bool:
        """Take the next token; return whether the answer ends with it."""
        self._tokens += 1
        complete = self._policy.took(token_id, self._scanner.section)
        marker = self._silent.get(token_id)
        if marker is None and self._scanner.section == "text":
            marker = self._letters.get(token_id)
        if marker is None:
            text = self._detokenizer.push(token_id)
        else:
            text = self._detokenizer.finish() + marker
        self._take(self._scanner.push(text))
        if complete or self._stops.found is not None or self._has_its_call():
            return True
        self._policy.prepare(self._scanner.section)
        return False

    def finish(self, tokens: int, cut: bool = False) -> None:
        """Queue the text that was held back.

        Args:
            tokens: the number of tokens decoded.
            cut: whether decoding was stopped by a limit or by the caller.
        """
        self._tokens = tokens
        self._take(self._scanner.push(self._detokenizer.finish()))
        self._take(self._scanner.finish(cut))
        self._say(self._stops.push("", ended=True))
        self.finished = True
        if self._traced and self._covered < self._tokens:  # tokens without text
            self._put(Event("text", ""))

    def _take(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if self._stops.found is not None:
                return
            if piece.kind == "text":
                self._say(self._stops.push(piece.text))
                continue
            if self._letters:
                piece = replace(piece, text=without_letters(piece.text))
            if piece.kind == "reasoning":
                self.reasoning += piece.text
                self._put(Event("reasoning", piece.text))
            elif not self._has_its_call():
                self._say(self._stops.push("", ended=True))  # no stop sequence spans a call
                self._take_call(piece)

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._put(Event("text", text))

    def _take_call(self, piece: Piece) -> None:
        """Hold a call's events back until it ends: a partial call must not look complete."""
        call = self._call = self._call or _Call(self._count())
        if piece.kind == "end":
            self._call = None
            self._end_call(call, piece.text, piece.error)
        elif piece.kind == "name":
            call.name = piece.text.encode("utf-8", "replace").decode()  # no lone surrogates
            first = Event("tool_call", "", (), call.index, call.id, call.name)
            call.held.append(self._covering(first))
        else:
            call.written += piece.text
            call.held.append(self._covering(Event("tool_call", piece.text, (), call.index)))

    def _end_call(self, call: _Call, raw: str, error: str | None) -> None:
        start = call.held[0][1] if call.held else self._covered
        try:
            arguments = json.loads(call.written or "{}", strict=False)
            normal = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            normal.encode()  # lone surrogates can't be sent
        except (ValueError, RecursionError) as broken:
            arguments = None
            error = error or f"the arguments are not JSON: {broken}"
        if error is None and not isinstance(arguments, dict):
            error = "expected the arguments to be a JSON object"
        if error is None and call.name is None:
            error = "expected a name"
        if error is not None:
            raw = raw or call.written
            self.invalid_tool_calls.append(InvalidToolCall(raw, error, call.id, call.name))
            event = Event("tool_call", raw, (), call.index, call.id, call.name, error)
            self.queue.append((self._covering(event)[0], start, self._tokens))
            return
        if not _is_json(call.written):  # but for line breaks in texts, which others refuse
            (first, _, end), call.written = call.held[0], normal
            rest = Event("tool_call", normal, (), call.index)
            call.held = [(first, start, end), (rest, end, call.held[-1][2])]
        made = [(earlier.name, earlier.arguments) for earlier in self.tool_calls]
        if made.count((str(call.name), arguments)) >= SAME_CALLS:
            self._left_out += 1
            self._covered = start
            return
        self._left_out = 0
        self.queue.extend(call.held)
        self.tool_calls.append(ToolCall(str(call.name), arguments, call.id, call.written))

    def _count(self) -> int:
        return len(self.tool_calls) + len(self.invalid_tool_calls)

    def _has_its_call(self) -> bool:
        loops = self._left_out >= SAME_CALLS
        return loops or (not self._parallel and self._count() > 0)

    def _put(self, event: Event) -> None:
        self.queue.append(self._covering(event))

    def _covering(self, event: Event) -> tuple[Event, int, int]:
        """Return an event with the range of the tokens since the last one."""
        start, self._covered = self._covered, self._tokens
        return event, start, self._tokens


class _Call:
    """The call being parsed."""

    def __init__(self, index: int) -> None:
        # Nine letters and digits: Mistral's templates refuse other ids.
        self.id = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        self.index = index
        self.name: str | None = None
        self.written = ""
        self.held: list[tuple[Event, int, int]] = []


def _silent_markers(tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> dict[int, str]:
    """Return the special tokens that markers are made of, by id; decoding omits them."""
    special = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in tokenizer.all_special_tokens
    }
    return {
        token_id: text
        for token_id, text in special.items()
        if any(text in marker for marker in markers)
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
