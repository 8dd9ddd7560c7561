"""`ReplyStream`: the events of one answer as they are decoded, and then the reply."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from amulet.decoding.generation import Generation
from amulet.decoding.worker import Driver
from amulet.errors import RequestError
from amulet.output.answer import Answer
from amulet.output.telemetry import Call
from amulet.preference import Steering
from amulet.reply import Event, FinishReason, Reply, TokenTrace, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReplyStream(Iterator[str]):
    """The pieces of one answer as they are decoded; `reply` is there when all have been read.

    Iterating gives the pieces of the text; `events()` gives reasoning and tool calls too. Close it
    (or leave its `with` block) to end decoding early.
    """

    def __init__(
        self,
        driver: Driver,
        tokenizer: PreTrainedTokenizerBase,
        generation: Generation,
        answer: Answer,
        steering: Steering | None,
        call: Call,
    ) -> None:
        self.generation = generation
        self.ended = False
        self._submitted = False
        self._driver = driver
        self._tokenizer = tokenizer
        self._answer = answer
        self._steering = steering
        self._call = call

    def __next__(self) -> str:
        for event in self.events():
            if event.kind == "text" and event.text:
                return event.text
        raise StopIteration

    def submit(self) -> None:
        """Queue the request for decoding if it isn't queued yet; the first read does so too."""
        if not (self._submitted or self.generation.done):
            self._submitted = True
            self._call.begin()
            self._driver.submit(self.generation)

    def events(self) -> Iterator[Event]:
        """Yield the remaining events of the answer; see `Event`.

        Raises:
            DecodeError: decoding failed.
        """
        self.submit()
        while True:
            known = len(self.generation.token_ids)
            event = self.poll()
            if event is not None:
                yield event
            elif self.ended:
                return
            else:
                self._wait(known)

    def poll(self) -> Event | None:
        """Return the next event if one is ready, else None; never waits.

        `ended` says that no more will come.

        Raises:
            DecodeError: decoding failed.
        """
        if self.ended:
            return None
        done = self.generation.done  # read before the queue, which is then complete
        if self._answer.queue:
            return self._traced(*self._answer.queue.popleft())
        if not done:
            return None
        if self.generation.error is None and not self._answer.finished:
            cut = self.generation.finish_reason != "stop"
            self._answer.finish(len(self.generation.token_ids), cut)
            return self.poll()
        self._end()
        self._driver.check(self.generation)
        return None

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._call.end(self.generation, self.usage, self._finish_reason)

    def _wait(self, known: int) -> None:
        try:
            self._driver.wait(self.generation, known)
        except BaseException:
            self.close()
            raise

    def read(self) -> Reply:
        """Decode to the end and return the reply."""
        self.submit()
        self._wait(sys.maxsize)
        for _ in self.events():
            pass
        return self.reply

    def cancel(self) -> None:
        """End decoding within one step; what was decoded can still be read."""
        self._driver.cancel(self.generation)

    def close(self) -> None:
        """End decoding within one step and free its memory."""
        self.cancel()
        self._end()

    @property
    def text(self) -> str:
        """The text so far."""
        return self._answer.text

    @property
    def reply(self) -> Reply:
        """The finished answer; after `close`, the part that was decoded ("cancelled").

        Raises:
            RequestError: pieces are still to be read.
        """
        generation, answer = self.generation, self._answer
        if not generation.done or not self.ended:
            raise RequestError("The answer is not finished: read the stream to its end first.")
        return Reply(
            text=answer.text,
            token_ids=tuple(generation.token_ids),
            finish_reason=self._finish_reason,
            usage=self.usage,
            steering=self._steering,
            stop_string=answer.stop_string,
            trace=self.trace,
            reasoning=answer.reasoning,
            tool_calls=tuple(answer.tool_calls),
            invalid_tool_calls=tuple(answer.invalid_tool_calls),
        )

    @property
    def _finish_reason(self) -> FinishReason:
        reason: Any = self.generation.finish_reason or "cancelled"
        if reason == "stop" and self._answer.tool_calls:
            reason = "tool_calls"
        found: FinishReason = reason
        return found

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        lengths = [len(prompt) for prompt in self.generation.prompts]
        generation = self.generation
        tokens = len(generation.token_ids)
        return Usage(lengths[0], tokens, sum(lengths[1:]), generation.cached_tokens)

    @property
    def trace(self) -> tuple[TokenTrace, ...] | None:
        """The trace so far, if requested."""
        if not self.generation.trace:
            return None
        return self._traces(0, min(len(self.generation.scores), len(self.generation.token_ids)))

    def _traced(self, event: Event, start: int, end: int) -> Event:
        if not self.generation.trace or start == end:
            return event
        return event.with_tokens(self._traces(start, end))

    def _traces(self, start: int, end: int) -> tuple[TokenTrace, ...]:

        def decode(token_ids: list[int]) -> str:
            return str(self._tokenizer.decode(token_ids))

        return tuple(
            TokenTrace(
                token_id=token_id,
                text=decode([token_id]),
                preferred=scores.preferred,
                base=scores.base,
                steered=scores.steered,
                unsteered_id=scores.unsteered_id,
                unsteered_text=decode([scores.unsteered_id]),
                top=tuple((id_, decode([id_]), logprob) for id_, logprob in scores.top),
            )
            for token_id, scores in zip(
                self.generation.token_ids[start:end],
                self.generation.scores[start:end],
                strict=True,
            )
        )

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.generation.done:
            self._driver.cancel(self.generation)
