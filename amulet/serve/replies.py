"""Converts replies and events to OpenAI's JSON: chat and text completions, whole or in chunks."""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from amulet.reply import Event, InvalidToolCall, Reply, TokenTrace, Usage
from amulet.serve.errors import ApiError
from amulet.serve.logprobs import Content, TokenBytes, Written, readable

UNLIKELY = -9999.0  # OpenAI's value for an impossible token; JSON has no -inf


@dataclass
class Writer:
    """Writes one request's answer.

    Args:
        kind: the endpoint.
        model: the served model's name.
        prompts: how many prompts the request had; usage counts each once, whatever `n` is.
        logprobs, trace, details: requested in addition to the text.
        usage_last: end a stream with a chunk with the usage.
        raw: the bytes of the tokenizer's tokens.

    Attributes:
        done: the end of a stream, after its last chunk.
    """

    done: ClassVar[str] = "data: [DONE]\n\n"

    kind: Literal["chat", "completion"]
    model: str
    prompts: int
    logprobs: bool
    trace: bool
    details: bool
    usage_last: bool
    raw: TokenBytes
    fingerprint: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # By choice: the finder of its content's tokens, and the tokens found.
        self._contents: dict[int, Content] = defaultdict(lambda: Content(self.raw))
        self._written: dict[int, list[Written]] = defaultdict(list)
        self._begun: set[int] = set()

    def take(self, index: int, event: Event) -> None:
        """Record an event of an answer that `whole` will return."""
        if self.logprobs:
            self._written[index] += self._contents[index].take(event)

    def whole(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Return the response to a request without streaming."""
        choices = []
        for index, reply in enumerate(replies):
            choice: dict[str, Any] = {"index": index}
            if self.kind == "chat":
                choice["message"] = _message(reply)
            else:
                choice["text"] = reply.text
            choice["logprobs"] = None
            if self.logprobs:
                written = self._written[index] + self._contents[index].end()
                choice["logprobs"] = self._logprobs(written)
            choice["finish_reason"] = _reason(reply)
            if self.trace:
                choice["trace"] = [traced(token) for token in reply.trace or ()]
            if self.details:
                choice["details"] = details(reply)
            choices.append(choice)
        usages = [reply.usage for reply in replies]
        return {**self._head(""), "choices": choices, "usage": self.usage(usages)}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first event; there are none."""
        yield from ()

    def event(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event."""
        yield from self._first(index)
        yield self._event(index, event)

    def last(self, index: int, reply: Reply) -> Iterator[dict[str, Any]]:
        """Yield a choice's last chunk, with its finish reason."""
        yield from self._first(index)
        chunk = self._chunk(index, {} if self.kind == "chat" else "")
        if self.logprobs and (left := self._contents[index].end()):
            chunk["choices"][0]["logprobs"] = self._logprobs(left)
        chunk["choices"][0]["finish_reason"] = _reason(reply)
        if self.details:
            chunk["choices"][0]["details"] = details(reply)
        yield chunk

    def end(self, usages: Sequence[Usage]) -> Iterator[dict[str, Any]]:
        """Yield the chunk with the usage of all choices, if it was requested."""
        if self.usage_last:
            yield {**self._head(".chunk"), "choices": [], "usage": self.usage(usages)}

    def failed(self, error: ApiError) -> dict[str, Any]:
        """Return the chunk that ends a stream with an error."""
        return error.body

    def _first(self, index: int) -> Iterator[dict[str, Any]]:
        if self.kind == "chat" and index not in self._begun:
            self._begun.add(index)
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def _event(self, index: int, event: Event) -> dict[str, Any]:
        if self.kind == "completion":
            return self._chunk(index, event.text, event)
        if event.kind == "text":
            delta: dict[str, Any] = {"content": event.text} if event.text else {}
        elif event.kind == "reasoning":
            delta = {"reasoning_content": event.text}
        elif event.error is not None:
            invalid = InvalidToolCall(event.text, event.error, event.id or "", event.name)
            delta = {"invalid_tool_calls": [{"index": event.index, **vars(invalid)}]}
        else:
            function: dict[str, Any] = {"arguments": event.text}
            call: dict[str, Any] = {"index": event.index, "function": function}
            if event.id is not None:
                call.update(id=event.id, type="function")
                function["name"] = event.name or ""
            delta = {"tool_calls": [call]}
        return self._chunk(index, delta, event)

    def usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Return the usage of all choices."""
        once = usages[:: len(usages) // self.prompts]
        prompt = sum(usage.prompt_tokens for usage in once)
        completion = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in once)},
            "base_prompt_tokens": sum(usage.base_prompt_tokens for usage in once),
        }

    def _head(self, chunk: str) -> dict[str, Any]:
        chat = self.kind == "chat"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": f"chat.completion{chunk}" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, index: int, said: Any, event: Event | None = None) -> dict[str, Any]:
        written: list[Written] = []
        if self.logprobs and event is not None:
            written = self._contents[index].take(event)
        choice: dict[str, Any] = {
            "index": index,
            "delta" if self.kind == "chat" else "text": said,
            "logprobs": self._logprobs(written) if written else None,
            "finish_reason": None,
        }
        if self.trace:
            choice["trace"] = [traced(token) for token in event.tokens] if event else []
        return {**self._head(".chunk"), "choices": [choice]}

    def _logprobs(self, written: Sequence[Written]) -> dict[str, Any]:
        if self.kind == "chat":
            return {
                "content": likely_tokens(written, self.raw),
                "refusal": None,
            }
        return {
            "tokens": [one.text for one in written],
            "token_logprobs": [_finite(one.token.steered) for one in written],
            "top_logprobs": [
                {readable(self.raw.named(id_)): _finite(p) for id_, _, p in one.token.top}
                for one in written
            ],
            "text_offset": [one.offset for one in written],
        }


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if reply.tool_calls and not reply.text else reply.text,
        "refusal": None,
    }
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.written},
            }
            for call in reply.tool_calls
        ]
    # Never among the calls: clients repair truncated arguments, or call without any.
    if reply.invalid_tool_calls:
        message["invalid_tool_calls"] = [vars(call) for call in reply.invalid_tool_calls]
    return message


def _reason(reply: Reply) -> str:
    # The server's time limit cuts an answer off, as a token limit does.
    return "length" if reply.finish_reason == "cancelled" else reply.finish_reason


def details(reply: Reply) -> dict[str, Any]:
    """Return the fields of `return_details`."""
    return {
        "token_ids": list(reply.token_ids),
        "finish_reason": reply.finish_reason,
        "stop_string": reply.stop_string,
        "steering": None if reply.steering is None else reply.steering.model_dump(),
        "invalid_tool_calls": [vars(call) for call in reply.invalid_tool_calls],
    }


def traced(token: TokenTrace) -> dict[str, Any]:
    """Return a trace as JSON, with null for −inf."""
    figures = {
        name: value if not isinstance(value, float) or math.isfinite(value) else None
        for name, value in vars(token).items()
    }
    top = [[id_, text, _or_none(logprob)] for id_, text, logprob in token.top]
    return {**figures, "top": top}


def _or_none(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


def _finite(logprob: float) -> float:
    return max(logprob, UNLIKELY) if not math.isnan(logprob) else UNLIKELY


def likely_tokens(written: Sequence[Written], raw: TokenBytes) -> list[dict[str, Any]]:
    """Return tokens of an answer with their log-probabilities, as chats and responses have them."""
    return [
        {
            **_likely(one.raw, one.token.steered),
            "top_logprobs": [_likely(raw.named(id_), p) for id_, _, p in one.token.top],
        }
        for one in written
    ]


def _likely(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": readable(raw), "logprob": _finite(logprob), "bytes": list(raw)}
