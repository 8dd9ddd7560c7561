"""The bridge to asyncio: the decode thread wakes event loops after each step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import copy_context

from amulet.decoding.worker import Driver
from amulet.errors import AmuletError, RequestError
from amulet.output.stream import ReplyStream
from amulet.reply import Event, Reply, TokenTrace, Usage


class AsyncReplyStream(AsyncIterator[str]):
    """The pieces of one answer as they are decoded: `async for piece in amulet.astream(...)`.

    The request is prepared in a worker thread at the first read. `events()` gives reasoning and
    tool calls too; `reply` is there when everything has been read. `aclose`, leaving its `async
    with` block, and cancelling the reading task end decoding within one step.
    """

    def __init__(self, driver: Driver, prepare: Callable[[], ReplyStream] | None = None) -> None:
        self._driver = driver
        self._prepare = prepare
        self._context = copy_context()  # of the caller, not of the reader
        self._stream: ReplyStream | None = None
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop to notify
        self._closed = False

    async def __anext__(self) -> str:
        while (event := await self._next()) is not None:
            if event.kind == "text" and event.text:
                return event.text
        raise StopAsyncIteration

    async def events(self) -> AsyncIterator[Event]:
        """Yield the remaining events of the answer; see `Event`.

        Raises:
            RequestError: the input is not valid, or the answer was started in another event loop.
            DecodeError: decoding failed.
        """
        while (event := await self._next()) is not None:
            yield event

    async def _next(self) -> Event | None:
        try:
            stream = self._stream or await self._start()
            while not self._closed:
                self._news.clear()
                event = stream.poll()
                if event is not None or stream.ended:
                    return event
                if self._loop is not asyncio.get_running_loop():  # it would wait for ever
                    raise RequestError(
                        "The stream was started in another event loop; read it in that one."
                    )
                await self._news.wait()
        except BaseException:
            await self.aclose()
            raise
        return None

    async def _start(self) -> ReplyStream:
        if self._prepare is None or self._closed:
            raise RequestError("The stream was closed before its first piece was read.")
        stream = await asyncio.to_thread(self._context.run, self._prepare)
        self.submit(stream)
        return stream

    def submit(self, stream: ReplyStream) -> None:
        """Start decoding a prepared answer, to be read in the running event loop."""
        self._stream = stream
        if self._closed:  # while it was prepared
            stream.close()
            return
        loop, news = asyncio.get_running_loop(), self._news
        self._loop = loop
        stream.submit()
        self._driver.watch(stream.generation, lambda: _wake(loop, news))

    async def read(self) -> Reply:
        """Decode to the end and return the reply."""
        while await self._next() is not None:
            pass
        return self.reply

    async def aclose(self) -> None:
        """End decoding within one step and free its memory."""
        self._closed = True
        self._news.set()
        if self._stream is not None:
            self._stream.close()

    @property
    def reply(self) -> Reply:
        """The finished answer; see `ReplyStream.reply`."""
        return self._started().reply

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return self._started().usage

    @property
    def trace(self) -> tuple[TokenTrace, ...] | None:
        """The trace so far, if requested."""
        return self._started().trace

    def _started(self) -> ReplyStream:
        if self._stream is None:
            raise RequestError("The answer is not finished: read the stream to its end first.")
        return self._stream

    async def __aenter__(self) -> AsyncReplyStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def read_all(
    driver: Driver,
    streams: Sequence[ReplyStream | AmuletError],
    return_exceptions: bool,
) -> list[Reply | AmuletError]:
    """Decode prepared answers together; see `Amulet.batch`."""
    outcomes: list[AsyncReplyStream | AmuletError] = []
    readers: list[AsyncReplyStream] = []
    for stream in streams:
        if isinstance(stream, AmuletError):
            outcomes.append(stream)
        else:
            readers.append(AsyncReplyStream(driver))
            readers[-1].submit(stream)
            outcomes.append(readers[-1])
    try:
        return [await _outcome(outcome, return_exceptions) for outcome in outcomes]
    finally:
        for reader in readers:
            await reader.aclose()


async def _outcome(
    outcome: AsyncReplyStream | AmuletError, return_exceptions: bool
) -> Reply | AmuletError:
    if isinstance(outcome, AmuletError):
        return outcome
    try:
        return await outcome.read()
    except AmuletError as error:
        if not return_exceptions:
            raise
        return error


def _wake(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    loop.call_soon_threadsafe(news.set)
