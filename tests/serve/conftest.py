"""A client within the process, and a real server on a loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from amulet import Amulet
from amulet.serve.app import create_app
from amulet.serve.server import Server
from tests.models import ScriptedModel, random_model


@pytest.fixture(scope="session")
def tiny(tokenizer: PreTrainedTokenizerFast) -> Amulet:
    """A random Qwen2 whose tokens are bytes; its window is 512."""
    return Amulet(random_model("qwen2"), tokenizer)


def saying(tokenizer: PreTrainedTokenizerFast, answers: Any) -> Amulet:
    """Return an `Amulet` that says what the test lists."""
    return Amulet(ScriptedModel(tokenizer, answers), tokenizer)


@contextlib.asynccontextmanager
async def asking(app: FastAPI, key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client that calls the application directly: no sockets, and no start-up either."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers, timeout=60
    ) as client:
        yield client


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@contextlib.contextmanager
def listening(
    app: FastAPI,
    keep_alive: bool = False,
    *,
    around: Callable[[Any], Any] = lambda app: app,
    port: int = 0,
    drain_seconds: int = 5,
    patience: int = 10,
) -> Iterator[tuple[str, Server]]:
    """Run uvicorn on a loopback port, a free one, in a thread; give its address and the server.

    Connections end with their response unless `keep_alive`: some clients never close theirs.
    `around` puts another application before `app`.
    """
    config = uvicorn.Config(
        around(app),
        "127.0.0.1",
        port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=drain_seconds,
        headers=[] if keep_alive else [("Connection", "close")],
    )
    server = Server(config, app.state.service, float(drain_seconds))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + patience
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    taken = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{taken}", server
    finally:
        server.should_exit = True
        thread.join(patience)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny_url(tiny: Amulet) -> Iterator[str]:
    """The address of a server of `tiny`; the test must be marked to open sockets."""
    with listening(create_app(tiny, name="tiny")) as (url, _):
        yield url
