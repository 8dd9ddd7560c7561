"""Converts decode events to LlamaIndex's response streams; some agents' answers in two parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing
from dataclasses import replace
from typing import Any

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from pydantic_core import from_json

from amulet import Amulet
from amulet.output.async_stream import AsyncReplyStream
from amulet.output.stream import ReplyStream
from amulet.reply import Event, Reply, ToolCall, Usage
from amulet.request import Request
from amulet_integrations.llama_index.messages import (
    assistant,
    logprobs,
    to_chat_response,
    to_completion_response,
)
from amulet_integrations.llama_index.options import PreparedCall
from amulet_integrations.llama_index.stage import Stage

ANSWER = "Answer:"  # after it, a ReAct agent writes what the user reads,
ACTION = "Action:"  # unless this is before it
CODE = "<execute>"  # after it, a CodeAct agent writes what it runs
MARKERS: dict[Stage, str] = {"react": ANSWER, "code": CODE}


def start(amulet: Amulet, plan: PreparedCall) -> ReplyStream | PartsStream:
    """Start decoding."""
    if plan.marker is None:
        return amulet.start(plan.request)
    return PartsStream(amulet, plan.request, plan.marker)


def astart(amulet: Amulet, plan: PreparedCall) -> AsyncReplyStream | AsyncPartsStream:
    """Start decoding in the running event loop."""
    if plan.marker is None:
        return amulet.astart(plan.request)
    return AsyncPartsStream(amulet, plan.request, plan.marker)


def read(amulet: Amulet, plan: PreparedCall) -> Reply:
    """Decode to the end."""
    with closing(start(amulet, plan)) as stream:
        for _ in stream.events():
            pass
        return stream.reply


async def aread(amulet: Amulet, plan: PreparedCall) -> Reply:
    """Decode to the end; cancelling the task ends the decode."""
    async with aclosing(astart(amulet, plan)) as stream:
        async for _ in stream.events():
            pass
        return stream.reply


def chat_responses(
    stream: ReplyStream | PartsStream, raw: dict[str, Any]
) -> Generator[ChatResponse, None, None]:
    """Yield the answer so far after each event, then the whole answer with its usage."""
    partial = Partial(raw)
    with closing(stream):
        for event in stream.events():
            if _says_something(event):
                yield partial.push(event)
        yield to_chat_response(stream.reply, raw, delta="")


async def achat_responses(
    stream: AsyncReplyStream | AsyncPartsStream, raw: dict[str, Any]
) -> AsyncGenerator[ChatResponse, None]:
    """The asynchronous `chat_responses`."""
    partial = Partial(raw)
    async with aclosing(stream):
        async for event in stream.events():
            if _says_something(event):
                yield partial.push(event)
        yield to_chat_response(stream.reply, raw, delta="")


def completion_responses(
    stream: ReplyStream | PartsStream, raw: dict[str, Any]
) -> Generator[CompletionResponse, None, None]:
    """Yield the text so far after each piece, then the whole text with its usage."""
    text = ""
    with closing(stream):
        for event in stream.events():
            if event.kind == "text" and event.text:
                text += event.text
                yield CompletionResponse(text=text, delta=event.text, raw=raw)
        yield to_completion_response(stream.reply, raw, delta="")


async def acompletion_responses(
    stream: AsyncReplyStream | AsyncPartsStream, raw: dict[str, Any]
) -> AsyncGenerator[CompletionResponse, None]:
    """The asynchronous `completion_responses`."""
    text = ""
    async with aclosing(stream):
        async for event in stream.events():
            if event.kind == "text" and event.text:
                text += event.text
                yield CompletionResponse(text=text, delta=event.text, raw=raw)
        yield to_completion_response(stream.reply, raw, delta="")


class Partial:
    """An answer while it is decoded."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw
        self._text = ""
        self._reasoning = ""
        self._calls: dict[int, tuple[str, str, str]] = {}  # id, name, arguments so far

    def push(self, event: Event) -> ChatResponse:
        """Return the response after an event."""
        delta, more = "", {}
        if event.kind == "text":
            delta = event.text
            self._text += event.text
        elif event.kind == "reasoning":
            self._reasoning += event.text
            more["thinking_delta"] = event.text
        elif event.error is None:  # the whole response reports invalid calls
            call_id, name, written = self._calls.get(event.index, ("", "", ""))
            self._calls[event.index] = (
                event.id or call_id,
                event.name or name,
                written + event.text,
            )
        calls = [
            ToolCall(name, _arguments(written), call_id)
            for call_id, name, written in self._calls.values()
            if name
        ]
        return ChatResponse(
            message=assistant(self._reasoning, self._text, calls),
            raw=self._raw,
            delta=delta,
            logprobs=logprobs(event.tokens) if event.tokens else None,
            additional_kwargs=more,
        )


def _says_something(event: Event) -> bool:
    return bool(event.text or event.id or event.tokens)


def _arguments(written: str) -> dict[str, Any]:
    try:
        parsed = from_json(written, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


# ---- agents that write for their parser and for the user in one text ----


class _Parts:
    def __init__(self, amulet: Amulet, request: Request, marker: str) -> None:
        self._amulet = amulet
        self._request = request
        self._marker = marker
        self._current: Any = None
        self.reply: Reply


class PartsStream(_Parts):
    """Decodes up to a marker and on from there: one part plainly, one with the preference."""

    def events(self) -> Iterator[Event]:
        self._current = self._amulet.start(_until(self._request, self._marker))
        yield from self._current.events()
        self.reply = self._current.reply
        rest = _after(self._request, self._marker, self.reply)
        if rest is None:
            return
        yield Event("text", self._marker)
        self._current = self._amulet.start(rest)
        yield from self._current.events()
        self.reply = _joined(self.reply, self._marker, self._current.reply)

    def close(self) -> None:
        if self._current is not None:
            self._current.close()


class AsyncPartsStream(_Parts):
    """The asynchronous `PartsStream`."""

    async def events(self) -> AsyncIterator[Event]:
        self._current = self._amulet.astart(_until(self._request, self._marker))
        async for event in self._current.events():
            yield event
        self.reply = self._current.reply
        rest = _after(self._request, self._marker, self.reply)
        if rest is None:
            return
        yield Event("text", self._marker)
        self._current = self._amulet.astart(rest)
        async for event in self._current.events():
            yield event
        self.reply = _joined(self.reply, self._marker, self._current.reply)

    async def aclose(self) -> None:
        if self._current is not None:
            await self._current.aclose()


def _until(request: Request, marker: str) -> Request:
    """Return the request of what precedes the marker: thoughts are plain, prose is steered."""
    update: dict[str, Any] = {"stop": (*request.stop, marker)}
    if marker == ANSWER:
        update["preference"] = ()
    return request.model_copy(update=update)


def _after(request: Request, marker: str, first: Reply) -> Request | None:
    """Return the request of what follows the marker, or None if the answer ended before it."""
    room = request.max_new_tokens - first.usage.completion_tokens
    if first.stop_string != marker or marker in request.stop or room < 1:
        return None
    written = first.text + marker
    update: dict[str, Any] = {"max_new_tokens": room}
    if request.prompt is not None:
        update["prompt"] = request.prompt + written
    else:
        so_far = {"role": "assistant", "content": written}
        if first.reasoning:
            so_far["reasoning_content"] = first.reasoning
        update["messages"] = (*(request.messages or ()), so_far)
    if marker == CODE or ACTION in first.text:  # in an action, "Answer:" is part of its input
        update["preference"] = ()
    return request.model_copy(update=update)


def _joined(first: Reply, marker: str, rest: Reply) -> Reply:
    usage = Usage(
        first.usage.prompt_tokens,
        first.usage.completion_tokens + rest.usage.completion_tokens,
        first.usage.base_prompt_tokens or rest.usage.base_prompt_tokens,
    )
    trace = None
    if first.trace is not None and rest.trace is not None:
        trace = first.trace + rest.trace
    return replace(
        rest,
        text=first.text + marker + rest.text,
        token_ids=first.token_ids + rest.token_ids,
        reasoning=first.reasoning + rest.reasoning,
        steering=first.steering or rest.steering,
        tool_calls=first.tool_calls + rest.tool_calls,
        invalid_tool_calls=first.invalid_tool_calls + rest.invalid_tool_calls,
        usage=usage,
        trace=trace,
    )
