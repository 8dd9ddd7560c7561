"""A uvicorn server that drains: on a signal it refuses new requests and finishes running ones."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from errno import EADDRNOTAVAIL, EAFNOSUPPORT
from types import FrameType
from typing import Any

import uvicorn

from amulet.errors import RequestError
from amulet.serve.service import Service


class Server(uvicorn.Server):
    """Runs the application until a signal or `fail`.

    Args:
        config: uvicorn's configuration.
        service: the service whose requests are drained.
        drain_seconds: maximum time for draining.
        on_start: called with the server's address once it listens.

    Attributes:
        failure: the error that stopped the server, if any.
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

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until a signal or `fail`.

        Raises:
            RequestError: it can't listen on this address.
        """
        check_address(self.config.host, self.config.port)
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening; called by uvicorn."""
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            port = self.servers[0].sockets[0].getsockname()[1]  # the actual port, if 0 was given
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
            self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}/")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining; a second signal stops at once."""
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
        """Return True to stop; uvicorn calls this ten times a second."""
        # Connections stay open meanwhile, so that new requests get a 503.
        running = len(self._service.traffic) + len(self._service.embedding)
        if self._until is not None and (not running or time.monotonic() >= self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def check_address(host: str, port: int) -> None:
    """Listen on an address briefly, for a clear error; uvicorn's own has only a number.

    Raises:
        RequestError: listening fails.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in found:
            try:
                _listen(family, address)
            except OSError as error:
                # "localhost" may have an IPv6 address on systems without IPv6.
                if len(found) == 1 or error.errno not in (EADDRNOTAVAIL, EAFNOSUPPORT):
                    raise
    except OSError as error:
        raise RequestError(
            f"Can't listen on host={host!r}, port={port}: {error.strerror or error}. Stop the "
            "program that uses the port, or choose another with --port (0 picks a free one); "
            "--host must be an address of this machine."
        ) from None


def _listen(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # on Windows, the option lets two programs share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv6 only, as asyncio does
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen()
