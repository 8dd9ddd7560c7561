"""Converts decode events to LlamaIndex's response streams; a ReAct answer in two steps."""

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

ANSWER = "Answer:"  # after it, a ReAct agent writes what the user reads


def start(amulet: Amulet, plan: PreparedCall) -> ReplyStream | ReactStream:
    """Start decoding."""
    return ReactStream(amulet, plan.request) if plan.react else amulet.start(plan.request)


def astart(amulet: Amulet, plan: PreparedCall) -> AsyncReplyStream | AsyncReactStream:
    """Start decoding in the running event loop."""
    return AsyncReactStream(amulet, plan.request) if plan.react else amulet.astart(plan.request)


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
    stream: ReplyStream | ReactStream, raw: dict[str, Any]
) -> Generator[ChatResponse, None, None]:
    """Yield the answer so far after each event, then the whole answer with its usage."""
    partial = Partial(raw)
    with closing(stream):
        for event in stream.events():
            if _says_something(event):
                yield partial.push(event)
        yield to_chat_response(stream.reply, raw, delta="")


async def achat_responses(
    stream: AsyncReplyStream | AsyncReactStream, raw: dict[str, Any]
) -> AsyncGenerator[ChatResponse, None]:
    """The asynchronous `chat_responses`."""
    partial = Partial(raw)
    async with aclosing(stream):
        async for event in stream.events():
            if _says_something(event):
                yield partial.push(event)
        yield to_chat_response(stream.reply, raw, delta="")


def completion_responses(
    stream: ReplyStream | ReactStream, raw: dict[str, Any]
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
    stream: AsyncReplyStream | AsyncReactStream, raw: dict[str, Any]
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


# ---- ReAct: thoughts and actions are read by the agent's parser, the answer by the user ----


class _React:
    def __init__(self, amulet: Amulet, request: Request) -> None:
        self._amulet = amulet
        self._request = request
        self._current: Any = None
        self.reply: Reply


class ReactStream(_React):
    """Decodes plainly up to "Answer:", and from there on with the preference."""

    def events(self) -> Iterator[Event]:
        self._current = self._amulet.start(_thoughts(self._request))
        yield from self._current.events()
        self.reply = self._current.reply
        follow = _answer(self._request, self.reply)
        if follow is None:
            return
        yield Event("text", ANSWER)
        self._current = self._amulet.start(follow)
        yield from self._current.events()
        self.reply = _joined(self.reply, self._current.reply)

    def close(self) -> None:
        if self._current is not None:
            self._current.close()


class AsyncReactStream(_React):
    """The asynchronous `ReactStream`."""

    async def events(self) -> AsyncIterator[Event]:
        self._current = self._amulet.astart(_thoughts(self._request))
        async for event in self._current.events():
            yield event
        self.reply = self._current.reply
        follow = _answer(self._request, self.reply)
        if follow is None:
            return
        yield Event("text", ANSWER)
        self._current = self._amulet.astart(follow)
        async for event in self._current.events():
            yield event
        self.reply = _joined(self.reply, self._current.reply)

    async def aclose(self) -> None:
        if self._current is not None:
            await self._current.aclose()


def _thoughts(request: Request) -> Request:
    return request.model_copy(update={"preference": (), "stop": (*request.stop, ANSWER)})


def _answer(request: Request, thoughts: Reply) -> Request | None:
    """Return the request of the answer, or None if the thoughts led to no answer."""
    room = request.max_new_tokens - thoughts.usage.completion_tokens
    if thoughts.stop_string != ANSWER or ANSWER in request.stop or room < 1:
        return None
    so_far = {"role": "assistant", "content": thoughts.text + ANSWER}
    messages = (*(request.messages or ()), so_far)
    return request.model_copy(update={"messages": messages, "max_new_tokens": room})


def _joined(thoughts: Reply, answer: Reply) -> Reply:
    usage = Usage(
        thoughts.usage.prompt_tokens,
        thoughts.usage.completion_tokens + answer.usage.completion_tokens,
        answer.usage.base_prompt_tokens,
    )
    trace = None
    if thoughts.trace is not None and answer.trace is not None:
        trace = thoughts.trace + answer.trace
    return replace(
        answer,
        text=thoughts.text + ANSWER + answer.text,
        token_ids=thoughts.token_ids + answer.token_ids,
        reasoning=thoughts.reasoning + answer.reasoning,
        usage=usage,
        trace=trace,
    )
