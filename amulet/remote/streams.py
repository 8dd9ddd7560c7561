"""The streams of `amulet.output` for an answer that a server decodes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol

from amulet.errors import RequestError
from amulet.output.async_stream import AsyncReplyStream
from amulet.output.stream import ReplyStream
from amulet.remote.bodies import Collector
from amulet.remote.errors import told
from amulet.reply import Event, Reply, TokenTrace, Usage
from amulet.request import Request

UNFINISHED = "The answer is not finished: read the stream to its end first."


class Chunks(Protocol):
    """The stream type of the package `openai`."""

    def __iter__(self) -> Iterator[Any]: ...
    def close(self) -> None: ...


class AsyncChunks(Protocol):
    """The asynchronous stream type of the package `openai`."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    async def close(self) -> None: ...


class _Collected:
    """The properties of both streams, from what was received so far."""

    _collector: Collector
    _traced_too: bool
    _cancelled: bool

    def _is_over(self) -> bool:
        raise NotImplementedError

    @property
    def reply(self) -> Reply:
        """The finished answer; see `ReplyStream.reply`."""
        if not self._is_over():
            raise RequestError(UNFINISHED)
        return self._collector.reply(self._cancelled)

    @property
    def usage(self) -> Usage:
        """Token counts, known at the end of the answer."""
        return self._collector.usage

    @property
    def trace(self) -> tuple[TokenTrace, ...] | None:
        """The trace so far, if requested."""
        return tuple(self._collector.trace) if self._traced_too else None

    @property
    def text(self) -> str:
        """The text so far."""
        return self._collector.text


class RemoteStream(_Collected, ReplyStream):
    """A `ReplyStream` whose tokens a server decodes; the request is sent at the first read.

    Args:
        send: sends the request and returns its chunks.
        request: the request.
    """

    def __init__(self, send: Callable[[], Chunks], request: Request) -> None:
        self.request = request
        self.ended = False
        self._send = send
        self._chunks: Chunks | None = None
        self._iterator: Iterator[Any] | None = None
        self._collector = Collector(request.trace)
        self._traced_too = request.trace
        self._cancelled = False
        self._received: deque[Event] = deque()

    def submit(self) -> None:
        """Do nothing: the request is sent at the first read."""

    def _wait(self, known: int) -> None:
        """Do nothing: `events` waits for the server."""

    def events(self) -> Iterator[Event]:
        """Yield the rest of the answer as events; see `Event`.

        Raises:
            AmuletError: the server refused the request or could not continue.
        """
        while (event := self.poll()) is not None:
            yield event

    def poll(self) -> Event | None:
        """Return the next event, or None at the end; unlike a local stream's, it waits."""
        while not (self._received or self.ended):
            self._receive()
        try:
            return self._received.popleft()
        except IndexError:  # it has ended, or another thread has closed it
            return None

    def _receive(self) -> None:
        """Wait for the server's next chunk; the first time, send the request."""
        try:
            with told():
                if self._iterator is None:
                    self._chunks = self._send()
                    self._iterator = iter(self._chunks)
                chunk = next(self._iterator, None)
            if chunk is None:
                self.ended = True
            elif not self._cancelled:
                self._received += self._collector.take(chunk.model_dump(warnings=False))
        except BaseException as error:
            was_closed = self._cancelled  # by another thread; then a failed read is not an error
            self.close()
            if not (was_closed and isinstance(error, Exception)):
                raise

    def cancel(self) -> None:
        """Close the stream; see `close`."""
        self.close()

    def close(self) -> None:
        """End the answer: the server stops when the connection is closed."""
        if not self.ended:
            self._cancelled = self.ended = True
            if self._chunks is not None:
                self._chunks.close()
            self._received.clear()

    def _is_over(self) -> bool:
        return self.ended

    def __del__(self) -> None:
        self.close()


class AsyncRemoteStream(_Collected, AsyncReplyStream):
    """An `AsyncReplyStream` whose tokens a server decodes; see `RemoteStream`."""

    def __init__(self, send: Callable[[], Awaitable[AsyncChunks]], traced: bool) -> None:
        self._send = send
        self._chunks: AsyncChunks | None = None
        self._collector = Collector(traced)
        self._traced_too = traced
        self._ended = self._cancelled = False
        self._pending = self._receive()

    async def _receive(self) -> AsyncIterator[Event]:
        with told():
            self._chunks = await self._send()
            async for chunk in self._chunks:
                for event in self._collector.take(chunk.model_dump(warnings=False)):
                    yield event
        self._ended = True

    async def _next(self) -> Event | None:
        if self._cancelled and self._chunks is None:
            raise RequestError("The stream was closed before its first piece was read.")
        try:
            if not self._ended:
                return await anext(self._pending, None)
        except BaseException:
            await self.aclose()
            raise
        return None

    async def aclose(self) -> None:
        """End the answer: the server stops when the connection is closed."""
        if not self._ended:
            self._cancelled = self._ended = True
            if self._chunks is not None:
                await self._chunks.close()

    def _is_over(self) -> bool:
        return self._ended
