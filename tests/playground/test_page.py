"""The page's files before the server's routes: headers, size, and that they are this source's."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from amulet import Amulet, MissingPackageError
from amulet.playground import cli as playground_cli
from amulet.playground.page import POLICY, STATIC, Page
from amulet.rendering.html import LOWERED, RAISED
from amulet.rendering.pieces import BOUNDS
from amulet.serve import cli as serve_cli
from amulet.serve.app import create_app
from amulet.serve.server import Server
from tests.models import random_model
from tests.serve.conftest import asking, user

WEB = STATIC.parent / "web"


@pytest.fixture(scope="module")
def tiny(tokenizer: Any) -> Amulet:
    return Amulet(random_model("qwen2"), tokenizer)


@pytest.fixture
def page(tiny: Amulet) -> Page:
    return Page(create_app(tiny, name="tiny"))


def assets(html: str) -> list[str]:
    return re.findall(r'(?:src|href)="\./([^"]+)"', html)


async def test_the_page_and_what_it_loads(page: Page) -> None:
    async with asking(page) as client:
        root = await client.get("/")
        assert root.status_code == 200
        assert root.headers["content-type"] == "text/html; charset=utf-8"
        assert root.headers["cache-control"] == "no-cache"
        assert len(assets(root.text)) == 3  # script, style, icon
        for path in assets(root.text):
            loaded = await client.get(path)
            assert loaded.status_code == 200, path
            assert loaded.headers["content-security-policy"] == POLICY
            assert "immutable" in loaded.headers["cache-control"]
            assert (await client.head(path)).status_code == 200


async def test_the_policy_lets_nothing_from_elsewhere_in(page: Page) -> None:
    async with asking(page) as client:
        answer = await client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "blob:" not in policy
    assert [part for part in policy.split("; ") if "data:" in part] == ["img-src 'self' data:"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", answer.text)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_first_paint_is_under_100_kb() -> None:
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    loaded = [STATIC / "index.html", *(STATIC / path for path in assets(html))]
    size = sum(len(gzip.compress(path.read_bytes(), 9)) for path in loaded)
    assert size < 100_000, f"{size} bytes"


async def test_it_is_sent_compressed(page: Page) -> None:
    async with asking(page) as client:
        answer = await client.get("/", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"


async def test_everything_else_is_the_server(page: Page) -> None:
    async with asking(page) as client:
        assert (await client.get("/health")).json() == {"status": "ready"}
        assert (await client.post("/")).status_code == 404
        assert (await client.get("/assets/none.js")).status_code == 404
        assert (await client.get("/../page.py")).status_code == 404
        assert (await client.get("/assets/..%2f..%2fpage.py")).status_code == 404
        body = {"messages": user("hi"), "max_tokens": 3}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 3


async def test_it_is_there_before_the_model_and_without_a_key(tiny: Amulet) -> None:
    loading = Page(create_app(lambda: tiny, api_keys=["secret"]))
    async with asking(loading) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/v1/models")).status_code == 401


async def test_below_a_path_of_another_application(page: Page) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    outer: Any = Starlette(routes=[Mount("/play", page)])
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(outer), base_url="http://test"
    ) as client:
        root = await client.get("/play/")
        assert root.status_code == 200
        assert (await client.get(f"/play/{assets(root.text)[0]}")).status_code == 200
        assert (await client.get("/play/health")).json() == {"status": "ready"}


def test_a_source_without_a_build_says_how_to_make_it(tiny: Amulet, tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match="make playground"):
        Page(create_app(tiny), tmp_path)


def test_the_build_is_of_this_source() -> None:
    files = [f"src/{path.name}" for path in (WEB / "src").iterdir()]
    files += ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n".encode() + (WEB / name).read_bytes())
    built = (STATIC / "sources.txt").read_text().strip()
    assert built == digest.hexdigest(), "the page's source has changed: make playground"


def test_tokens_have_the_colours_that_a_notebook_gives_them() -> None:
    style = (WEB / "src" / "style.css").read_text()
    light = style[: style.index('data-theme="dark"')]
    for name, colours in (("up", RAISED), ("down", LOWERED)):
        for level, colour in enumerate(colours, 1):
            assert f"--{name}{level}: {colour};" in light
            assert style.count(f"--{name}{level}: ") == 3  # light, dark, dark by the system
    steps = re.search(r"const STEPS = \[(.+)\];", (WEB / "src" / "tokens.tsx").read_text())
    assert steps
    assert tuple(float(step) for step in steps[1].split(",")) == BOUNDS


def test_the_command_puts_the_page_before_the_server(
    monkeypatch: pytest.MonkeyPatch, tiny: Amulet
) -> None:
    started: list[Server] = []

    async def ask(server: Server) -> None:
        app: Any = server.config.app
        async with asking(app) as client:
            root = await client.get("/", headers={"Host": "localhost"})
            assert root.status_code == 200
            assert (
                await client.get("/health", headers={"Host": "evil.example"})
            ).status_code == 403

    def run(server: Server) -> None:
        started.append(server)
        asyncio.run(ask(server))

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(serve_cli, "load", lambda **_: tiny)
    opened: list[str] = []
    monkeypatch.setattr(playground_cli.webbrowser, "open", opened.append)
    app = typer.Typer()
    playground_cli.register(app)
    result = CliRunner().invoke(app, ["--port", "8123", "--max-tokens", "77", "--open"])
    assert result.exit_code == 0, result.output
    (server,) = started
    assert (server.config.host, server.config.port) == ("127.0.0.1", 8123)
    assert server._service.limits.max_tokens == 77
    assert server._service.limits.body_bytes == 16 * 2**20
    page: Any = server.config.app
    assert "/v1/thumbs" in page._app.openapi()["paths"]  # also without --thumbs
    assert server._on_start is not None
    server._on_start("http://127.0.0.1:8123/")
    assert opened == ["http://127.0.0.1:8123/"]
