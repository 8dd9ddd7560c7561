"""The checks before every route: host, API key, state and body size; also catches errors.

Every response has an `x-request-id`, taken from the request or new.

Plain ASGI, because Starlette's `BaseHTTPMiddleware` hides disconnects from the routes.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
import traceback
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amulet.errors import RequestError
from amulet.output.telemetry import of_caller
from amulet.serve.errors import ApiError
from amulet.serve.service import Service

logger = logging.getLogger("amulet.serve")

OPEN = ("/health",)  # load balancers have no key
ALWAYS = ("/health", "/metrics")  # also answered while loading and draining
REQUEST_ID = "x-request-id"
_ID = re.compile(r"[!-~]{1,200}")  # safe in a header and in the log
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        service: provides the state, limits and metrics.
        api_keys: any of these is accepted; if empty, no key is required.
        hosts: accepted names in the `Host` header; None accepts all. A web page can point a
            name of its own at a server on loopback (DNS rebinding); the header reveals it.
        origins: origins whose pages may call the server; "*" permits all.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        api_keys: Sequence[str],
        hosts: Sequence[str] | None,
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in api_keys]
        self._hosts = hosts

        self._inner: ASGIApp = self._answer
        if origins:  # outside the checks, so that a page can read why it was refused
            self._inner = CORSMiddleware(
                self._answer,
                allow_origins=origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID, "Retry-After"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, method = time.perf_counter(), 0, scope["method"]
        id_ = Headers(scope=scope).get(REQUEST_ID, "")
        id_ = id_ if _ID.fullmatch(id_) else f"req_{secrets.token_hex(12)}"
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": id_}}
        if method == "HEAD":  # GET without the body
            scope = {**scope, "method": "GET"}

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = id_
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            with of_caller(Headers(scope=scope)):
                await self._inner(scope, receive, tell)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - began
            logger.info("%s %s %d %.2f s %s", method, route, status, seconds, id_)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def tell(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._measured(receive), tell)
        except ApiError as error:
            await answer(error)(scope, receive, send)
        except Exception as error:
            # Without the error's message, which may contain a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            id_ = scope["state"]["request_id"]
            logger.error("%s in request %s:\n%s", type(error).__name__, id_, frames)
            if begun:  # too late for another status: drop the connection
                raise ConnectionAbortedError("the answer broke off") from None
            wrong = ApiError(
                500, "The server failed while it handled the request.", code="internal_error"
            )
            await answer(wrong)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403, "The Host header names none of this server's hosts.", code="wrong_host"
            )
        if self._keys and path not in OPEN and not self._knows(headers.get("authorization", "")):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )
        state = self._service.traffic.state
        if state != "ready" and path not in ALWAYS:
            raise not_ready(state)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > self._service.limits.body_bytes:
            raise self._too_large()

    def _knows(self, header: str) -> bool:
        scheme, _, given = header.partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(known)

    def _measured(self, receive: Receive) -> Receive:
        taken = 0

        async def measured() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._service.limits.body_bytes:  # FastAPI passes only this class through
                raise HTTPException(413, self._too_large().message)
            return message

        return measured

    def _too_large(self) -> ApiError:
        most = self._service.limits.body_bytes
        return ApiError(
            413,
            f"The body is larger than {most} bytes, the limit of this server.",
            code="too_large",
        )


def check_origins(origins: Sequence[str]) -> None:
    """Check origins of pages.

    Raises:
        RequestError: a value that no browser would send as `Origin`.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise RequestError(
                f"allow_origin={origin!r}: expected a scheme and a host, such as "
                'https://app.example.com or http://localhost:3000, or "*".'
            )


def named_host(host: str) -> str:
    """Return an accepted host in the form of `_host`: in lower case, IPv6 without brackets.

    Raises:
        RequestError: it is not just a host name or an IP address.
    """
    name = host.lower().strip("[]")
    if not name or _host(f"[{name}]" if ":" in name else name) != name:
        raise RequestError(
            f"allowed_host={host!r}: expected a name or an address without a port, such as "
            "example.com."
        )
    return name


def _host(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def not_ready(state: str) -> ApiError:
    """Return the error of a server that is loading or draining."""
    if state == "loading":
        return ApiError(503, "The model is still being loaded.", code="loading", retry_after=5)
    return ApiError(503, "The server is shutting down.", code="draining", retry_after=5)


def answer(error: ApiError) -> JSONResponse:
    """Return an error as an HTTP response."""
    return JSONResponse(error.body, error.status, error.headers)
