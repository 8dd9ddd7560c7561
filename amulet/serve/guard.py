"""What every request passes before its route: host, API key, state, body size, a catch for errors.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would hide from the routes that a client has gone.
"""

from __future__ import annotations

import hmac
import logging
import time
import traceback
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amulet.serve.errors import ApiError
from amulet.serve.service import Service

logger = logging.getLogger("amulet.serve")

OPEN = ("/health",)  # a load balancer has no key
ALWAYS = ("/health", "/metrics")  # answered while loading and draining too


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: the routes.
        service: for its state, limits and metrics.
        api_keys: any of them is good; none at all lets everybody in.
        hosts: names in the `Host` header that are answered; None answers all. A page in a browser
            can point a name of its own at a server on loopback; the header tells.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        api_keys: Sequence[str],
        hosts: Sequence[str] | None,
    ) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in api_keys]
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._measured(receive), tell)
        except ApiError as error:
            await answer(error)(scope, receive, tell)
        except Exception as error:
            # Without the error's own words: they may hold a prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in a request:\n%s", type(error).__name__, frames)
            if status:  # too late for another status: break the connection off
                raise ConnectionAbortedError("the answer broke off") from None
            wrong = ApiError(500, "The server has made a mistake.", code="internal_error")
            await answer(wrong)(scope, receive, tell)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - began
            logger.info("%s %s %d %.2f s", scope["method"], route, status, seconds)

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
