"""A stream belongs to the run that asked for it, wherever it is read."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config

_END: Any = object()


def in_its_run(stream: Any) -> Any:
    """Let a stream be read anywhere as if it were read in the run that asks for it now.

    LangChain looks for the run's config when the first piece is read. What is no generator is
    returned as it is.
    """
    if isinstance(stream, Generator):
        return _pieces(stream, var_child_runnable_config.get())
    if isinstance(stream, AsyncGenerator):
        return _apieces(stream, var_child_runnable_config.get())
    return stream


@contextmanager
def _run(config: RunnableConfig | None) -> Iterator[None]:
    token = var_child_runnable_config.set(config)
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _pieces(
    stream: Generator[Any, None, None], config: RunnableConfig | None
) -> Generator[Any, None, None]:
    with closing(stream):
        while True:
            with _run(config):
                piece = next(stream, _END)
            if piece is _END:
                return
            yield piece


async def _apieces(
    stream: AsyncGenerator[Any, None], config: RunnableConfig | None
) -> AsyncGenerator[Any, None]:
    async with aclosing(stream):
        while True:
            with _run(config):
                piece = await anext(stream, _END)
            if piece is _END:
                return
            yield piece
