"""The page: its static files stand before a server's routes, with headers that confine it."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amulet.errors import MissingPackageError

STATIC = Path(__file__).parent / "static"

# What an answer says is shown by scripts of this page alone, and they reach this server alone.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # those that the reader attaches; an answer's are never loaded
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes markup or script
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
YEAR = 365 * 24 * 3600


class Page:
    """ASGI application: the page's files, and for everything else the server that it talks to.

    The files are the same for everybody, so they need no API key and are there while the model is
    being loaded. The page asks for a key where the server wants one.

    Args:
        app: what `amulet.serve.app.create_app` returns.
        static: the folder of the built page.

    Raises:
        MissingPackageError: the folder has no page.
    """

    def __init__(self, app: ASGIApp, static: Path = STATIC) -> None:
        if not (static / "index.html").is_file():
            raise MissingPackageError(
                f"The playground's page is not in {static}: build it with `make playground`, or "
                "install a wheel."
            )
        files = [
            path.relative_to(static).as_posix() for path in static.rglob("*") if path.is_file()
        ]
        self._app = app
        self._paths = {"/", *(f"/{name}" for name in files)}
        self._files = GZipMiddleware(StaticFiles(directory=static, html=True))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in self._paths:
            await self._app(scope, receive, send)
            return

        async def confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                # A built file's name changes with its content; the page's own name does not.
                lasting = path.startswith("/assets/")
                headers["Cache-Control"] = (
                    f"public, max-age={YEAR}, immutable" if lasting else "no-cache"
                )
            await send(message)

        await self._files(scope, receive, confined)
