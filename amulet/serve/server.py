"""Uvicorn with a drain: a signal refuses new requests, lets running ones end, then stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn

from amulet.serve.service import Service


class Server(uvicorn.Server):
    """Runs the application until a signal or `fail`.

    Args:
        config: uvicorn's.
        service: whose requests are waited for.
        drain_seconds: how long they are, at most.
        on_start: called with the server's address once it listens.

    Attributes:
        failure: why the server stopped by itself.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain_seconds: float,
        on_start: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._service = service
        self._drain_seconds = drain_seconds
        self._until: float | None = None
        self._on_start = on_start

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn to listen."""
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            port = self.servers[0].sockets[0].getsockname()[1]  # the one taken, where 0 was asked
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}/")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal stops at once."""
        if self._until is not None:
            self.force_exit = self.should_exit = True
            return
        self._until = time.monotonic() + self._drain_seconds
        self._service.traffic.state = "draining"

    def fail(self, error: Exception) -> None:
        """Stop because the model can't be loaded."""
        self.failure = error
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second by uvicorn; True stops it."""
        # Connections stay open meanwhile, so that new requests are told "503, try another".
        if self._until is not None and (
            not len(self._service.traffic) or time.monotonic() >= self._until
        ):
            self.should_exit = True
        return await super().on_tick(counter)
