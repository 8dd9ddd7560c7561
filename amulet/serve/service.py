"""Answers requests with one `Amulet`, within the queue's and the time limits.

Concurrent requests share the engine's batch: this module has no decode loop, it only reads answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from amulet.errors import PromptTooLongError, RequestError
from amulet.fingerprint import fingerprint
from amulet.images import without_images
from amulet.model import Amulet
from amulet.output.async_stream import AsyncReplyStream
from amulet.output.stream import ReplyStream
from amulet.reply import Event, Reply, Usage
from amulet.request import Request
from amulet.serve.errors import ApiError
from amulet.serve.limits import Limits, Traffic, rows_of
from amulet.serve.logprobs import TokenBytes
from amulet.serve.metrics import Metrics

logger = logging.getLogger("amulet.serve")
T = TypeVar("T")
STACK = 256 * 2**20  # bytes of address space; only used pages take memory
GRACE = 0.25  # seconds to wait for an early failure, so that it gets its own status


class ClientGone(Exception):
    """The client has disconnected."""


class Service:
    """One model and its running requests.

    Args:
        limits: the limits of requests.
        log_content: write prompts, preferences and answers to the log.

    Attributes:
        names: the model's names for clients, once it is loaded; the first is the main one.
        fingerprint, raw: the model's fingerprint and the bytes of its tokens.
        traffic, embedding: the requests for answers and for embeddings that run or wait.
    """

    def __init__(self, limits: Limits, log_content: bool = False) -> None:
        self.limits = limits
        self.log_content = log_content
        self.traffic = Traffic(1, limits)
        self.embedding = Traffic(1, limits)
        self.metrics = Metrics(
            in_flight=lambda: len(self.traffic),
            waiting=lambda: self.traffic.waiting,
            rows=lambda: 0 if self._amulet is None else self._amulet.rows,
            cache_bytes=lambda: 0 if self._amulet is None else self._amulet.cache_bytes,
        )
        self.names: tuple[str, ...] = ()
        self.fingerprint = ""
        self.created = 0
        self.preparing = deep_threads()
        self._amulet: Amulet | None = None

    def ready(self, amulet: Amulet, names: Sequence[str]) -> None:
        """Start answering with a loaded model."""
        self._amulet = amulet
        self.names = tuple(dict.fromkeys(names))
        self.fingerprint = f"fp_{fingerprint(amulet)}"
        self.created = int(time.time())
        self.raw = TokenBytes(amulet.tokenizer)
        self.traffic.rows = amulet.max_rows
        if self.traffic.state == "loading":
            self.traffic.state = "ready"

    @property
    def amulet(self) -> Amulet:
        """The loaded model.

        Raises:
            ApiError: it is still being loaded (503).
        """
        if self._amulet is None:
            raise ApiError(503, "The model is still being loaded.", code="loading", retry_after=5)
        return self._amulet

    async def start(
        self, requests: Sequence[Request], http: HttpRequest, seconds: float | None = None
    ) -> ServedRequest:
        """Queue requests for the engine; return their answers after the first event.

        Args:
            requests: one per choice.
            http: the HTTP request.
            seconds: maximum wait for the first event; None waits without limit.

        Raises:
            ApiError: the queue is full, or a limit is exceeded.
            AmuletError: a request can't be decoded.
            ClientGone: the client has disconnected.
        """
        job = ServedRequest(self, requests, http.state.request_id)
        try:
            await job.start(http, seconds)
        except BaseException:
            job.close()
            raise
        return job


class ServedRequest:
    """The answers to one HTTP request while they are decoded; must be closed in any case."""

    def __init__(self, service: Service, requests: Sequence[Request], id: str) -> None:
        self._service = service
        self._requests = requests
        self._id = id  # for the log
        self._began = time.perf_counter()
        rows = sum(rows_of(request, service.amulet.steering) for request in requests)
        self._ticket = service.traffic.enter(rows)
        self._streams: list[ReplyStream] = []
        self._readers: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, Event | None] | Exception] = asyncio.Queue()
        self._first: tuple[int, Event | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._has_begun = False
        self._closed = False

    async def start(self, http: HttpRequest, seconds: float | None) -> None:
        """Prepare, submit, and wait for the first event while the client is connected.

        A stream's headers are sent after `seconds` at the latest: a long prompt may take minutes,
        and proxies and clients give up on a silent server.
        """
        loop = asyncio.get_running_loop()
        amulet = self._service.amulet
        streams = await loop.run_in_executor(self._service.preparing, self._prepare)
        self._streams = streams
        left = self._service.limits.seconds - (time.perf_counter() - self._began)
        self._timer = loop.call_later(max(0.0, left), self._expire)
        for index, stream in enumerate(streams):
            reader = amulet.astart(stream)
            self._readers.append(loop.create_task(self._read(index, reader)))
        with contextlib.suppress(asyncio.TimeoutError):
            self._first = await while_there(http, asyncio.wait_for(self._next(), seconds))

    def _prepare(self) -> list[ReplyStream]:
        amulet, most = self._service.amulet, self._service.limits.prompt_tokens
        try:
            streams = [amulet.prepare(request) for request in self._requests]
        except RecursionError:
            raise RequestError("The request is nested too deeply.") from None
        for stream in streams:
            longest = max(map(len, stream.generation.prompts))
            if most is not None and longest > most:
                raise PromptTooLongError(
                    f"The prompt has {longest} tokens (the preference included) and this server "
                    f"permits {most}; shorten the prompt."
                )
        return streams

    async def _read(self, index: int, reader: AsyncReplyStream) -> None:
        try:
            async for event in reader.events():
                self._queue.put_nowait((index, event))
            self._queue.put_nowait((index, None))
        except Exception as error:
            self._queue.put_nowait(error)

    async def _next(self) -> tuple[int, Event | None]:
        if (first := self._first) is not None:
            self._first = None
            return first
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        if not self._has_begun:
            self._has_begun = True
            self._service.metrics.first.observe(time.perf_counter() - self._began)
        return item

    async def events(
        self, patience: float | None = None
    ) -> AsyncIterator[tuple[int, Event | None] | None]:
        """Yield events with their choice's index, and `(index, None)` at the end of a choice.

        Args:
            patience: yield None after this many seconds without an event.

        Raises:
            AmuletError: decoding failed.
            ApiError: the time limit passed before the first token (503).
        """
        left = len(self._streams)
        while left:
            try:
                index, event = await asyncio.wait_for(self._next(), patience)
            except asyncio.TimeoutError:
                yield None
                continue
            if event is None:
                left -= 1
                if not self._streams[index].reply.token_ids:
                    raise ApiError(
                        503,
                        f"No token within {self._service.limits.seconds:g} seconds: the server is "
                        "busy. Retry later.",
                        code="timeout",
                        retry_after=10,
                    )
            yield index, event

    async def read(self, http: HttpRequest, take: Callable[[int, Event], None]) -> list[Reply]:
        """Decode to the end while the client is connected; `take` gets every choice's events."""

        async def drain() -> None:
            async for item in self.events():
                if item is not None and item[1] is not None:
                    take(item[0], item[1])

        await while_there(http, drain())
        return [stream.reply for stream in self._streams]

    def reply(self, index: int) -> Reply:
        """Return a choice's finished answer."""
        return self._streams[index].reply

    @property
    def usages(self) -> list[Usage]:
        """Token counts of the choices."""
        return [stream.usage for stream in self._streams]

    def _expire(self) -> None:
        for stream in self._streams:  # they keep the tokens so far
            stream.cancel()

    def close(self) -> None:
        """Stop running answers and leave the queue; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for reader in self._readers:
            reader.cancel()
        for stream in self._streams:
            stream.close()
        seconds = time.perf_counter() - self._began
        self._service.traffic.leave(self._ticket, seconds)
        self._record(seconds)

    def _record(self, seconds: float) -> None:
        metrics = self._service.metrics
        metrics.seconds.observe(seconds)
        for request, stream in zip(self._requests, self._streams, strict=False):
            usage, generation = stream.usage, stream.generation
            reason = "error" if generation.error else generation.finish_reason or "cancelled"
            metrics.answers.labels(reason, "yes" if request.preference else "no").inc()
            metrics.tokens.labels("prompt").inc(usage.prompt_tokens)
            metrics.tokens.labels("base_prompt").inc(usage.base_prompt_tokens)
            metrics.tokens.labels("completion").inc(usage.completion_tokens)
            logger.info(
                "answer: %s, %d + %d tokens, %.2f s, %s, %s",
                reason,
                usage.prompt_tokens,
                usage.completion_tokens,
                seconds,
                "steered" if request.preference else "plain",
                self._id,
            )
            if self._service.log_content:
                asked = without_images(request.messages or ()) or request.prompt
                wishes = [wish.model_dump() for wish in request.preference]
                said = stream.text
                logger.info(
                    "content: asked %r, preference %r, said %r, %s", asked, wishes, said, self._id
                )


async def while_there(http: HttpRequest, work: Awaitable[T]) -> T:
    """Return the result of some work, unless the client disconnects first.

    Raises:
        ClientGone: the client disconnected; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def deep_threads() -> ThreadPoolExecutor:
    """Return threads with a large stack, for compiling grammars.

    llguidance follows chains of references by recursion, and a stack overflow ends the process.
    No grammar within `Limits.grammar_bytes` overflows a stack of this size.
    """
    threads = 4
    barrier = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="amulet-prepare")
    before = threading.stack_size(STACK)
    try:
        for _ in range(threads):
            pool.submit(barrier.wait)  # each blocks a thread, so all are started here
    finally:
        threading.stack_size(before)
    return pool
