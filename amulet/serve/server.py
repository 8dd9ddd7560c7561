"""Uvicorn with a drain: a signal refuses new requests, lets running ones end, then stops."""

from __future__ import annotations

import time
from types import FrameType

import uvicorn

from amulet.serve.service import Service


class Server(uvicorn.Server):
    """Runs the application until a signal or `fail`.

    Args:
        config: uvicorn's.
        service: whose requests are waited for.
        drain_seconds: how long they are, at most.

    Attributes:
        failure: why the server stopped by itself.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.failure: Exception | None = None
        self._service = service
        self._drain_seconds = drain_seconds
        self._until: float | None = None

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
