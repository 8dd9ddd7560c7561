"""Binds a stream to the run that requested it, wherever it is read."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Awaitable, Generator
from contextvars import Context
from functools import partial
from types import coroutine
from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import set_config_context

_END: Any = object()


def in_its_run(stream: Any) -> Any:
    """Let a stream be read anywhere as if it were read in the run that asks for it now.

    LangChain looks for the run's config when the first piece is read. What is no generator is
    returned as it is.
    """
    if isinstance(stream, Generator):
        return _pieces(stream, ensure_config())
    if isinstance(stream, AsyncGenerator):
        return _apieces(stream, ensure_config())
    return stream


def _pieces(
    stream: Generator[Any, None, None], config: RunnableConfig
) -> Generator[Any, None, None]:
    with set_config_context(config) as run:
        try:
            while (piece := run.run(next, stream, _END)) is not _END:
                yield piece
        finally:
            run.run(stream.close)


async def _apieces(
    stream: AsyncGenerator[Any, None], config: RunnableConfig
) -> AsyncGenerator[Any, None]:
    with set_config_context(config) as run:
        try:
            piece = await _within(run, _first(stream))
            while piece is not _END:
                yield piece
                piece = await _within(run, anext(stream, _END))
        finally:
            await _within(run, stream.aclose())


def _first(stream: AsyncGenerator[Any, None]) -> Awaitable[Any]:
    """Return the awaitable of a stream's first piece, and keep the stream from the event loop.

    An event loop that ends closes all generators that it knows at the same time. It knows the
    reader, which closes the stream; closed twice, the stream would raise.
    """
    known = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None)
    try:
        return anext(stream, _END)
    finally:
        sys.set_asyncgen_hooks(firstiter=known.firstiter)


@coroutine
def _within(context: Context, awaited: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """Await in a context of its own; Python 3.10 can't start a task in one."""
    steps: Any = awaited.__await__()
    step = partial(steps.send, None)
    while True:
        try:
            waits_for = context.run(step)
        except StopIteration as end:
            return end.value
        try:
            step = partial(steps.send, (yield waits_for))
        except BaseException as error:
            step = partial(steps.throw, error)
