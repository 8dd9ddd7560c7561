"""What every request passes before its route: host, API key, state, body size, a catch for errors.

Every response has an `x-request-id`: the request's own, or a new one.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would hide from the routes that a client has gone.
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
from amulet.serve.errors import ApiError
from amulet.serve.service import Service

logger = logging.getLogger("amulet.serve")

OPEN = ("/health",)  # a load balancer has no key
ALWAYS = ("/health", "/metrics")  # answered while loading and draining too
REQUEST_ID = "x-request-id"
_ID = re.compile(r"[!-~]{1,200}")  # what may stand in a header and in the log
_ORIGIN = re.compile(r"https?://[^/?#\s]+")


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        service: for its state, limits and metrics.
        api_keys: any of them is good; none at all lets everybody in.
        hosts: names in the `Host` header that are answered; None answers all. A page in a browser
            can point a name of its own at a server on loopback; the header tells.
        origins: pages that may use the server from a browser; "*" is every page.
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
        if origins:  # around the checks: a page must be able to read why it was refused
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
            # Without the error's own words: they may hold a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in a request:\n%s", type(error).__name__, frames)
            if begun:  # too late for another status: break the connection off
                raise ConnectionAbortedError("the answer broke off") from None
            wrong = ApiError(500, "The server has made a mistake.", code="internal_error")
            await answer(wrong)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "The Host header is not one of this server.", code="wrong_host")
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
            if taken > self._service.limits.body_bytes:  # FastAPI lets this class alone through
                raise HTTPException(413, self._too_large().message)
            return message

        return measured

    def _too_large(self) -> ApiError:
        most = self._service.limits.body_bytes
        return ApiError(
            413,
            f"The body is larger than {most} bytes, what this server permits.",
            code="too_large",
        )


def check_origins(origins: Sequence[str]) -> None:
    """Check origins of pages.

    Raises:
        RequestError: what no browser would send as its `Origin`.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise RequestError(
                f"allow_origin={origin!r}: expected a scheme and a host, such as "
                'https://app.example.com or http://localhost:3000, or "*".'
            )


def _host(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def not_ready(state: str) -> ApiError:
    """Return the answer of a server that doesn't answer yet, or no more."""
    if state == "loading":
        return ApiError(503, "The model is still being loaded.", code="loading", retry_after=5)
    return ApiError(503, "The server is shutting down.", code="draining", retry_after=5)


def answer(error: ApiError) -> JSONResponse:
    """Return an error as the HTTP response that it is."""
    return JSONResponse(error.body, error.status, error.headers)
