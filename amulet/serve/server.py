"""Uvicorn with a drain: a signal refuses new requests, lets running ones end, then stops."""

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

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Run until a signal or `fail`.

        Raises:
            RequestError: it can't listen at this address.
        """
        check_address(self.config.host, self.config.port)
        super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
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


def check_address(host: str, port: int) -> None:
    """Listen at an address for a moment; uvicorn itself would say nothing but a number.

    Raises:
        RequestError: it can't be done.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in found:
            try:
                _listen(family, address)
            except OSError as error:
                # "localhost" has an IPv6 address also where the system has none.
                if len(found) == 1 or error.errno not in (EADDRNOTAVAIL, EAFNOSUPPORT):
                    raise
    except OSError as error:
        raise RequestError(
            f"Can't listen on host={host!r}, port={port}: {error.strerror or error}. Stop the "
            "program that has the port, or choose another with --port (0 takes a free one); "
            "--host names an address of this machine."
        ) from None


def _listen(family: int, address: Any) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # elsewhere the option lets two programs share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # as asyncio does: beside IPv4, not for both
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
        probe.listen()
