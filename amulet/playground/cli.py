"""`amulet playground`: arguments to the server with the page before it; no logic.

The web framework is imported when the command runs, so that `amulet --help` answers at once.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from amulet.console import Device, DType, Model, readable_errors
from amulet.serve.cli import Host, Hosts, Keys, Port, start

if TYPE_CHECKING:
    from starlette.types import ASGIApp

BODY = 16 * 2**20  # bytes of a request, which has the conversation's photographs


def register(app: typer.Typer) -> None:
    """Add the command `playground`."""
    app.command()(playground)


def playground(
    model: Model = None,
    device: Device = None,
    dtype: DType = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Keys = None,
    allowed_host: Hosts = None,
    thumbs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="SQLite file of thumbs; else they are kept until the server stops."
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option(help="Rows decoded at once; three answers take four or more.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 4096,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Open a page that compares plain, prompted and steered answers; it serves as `serve` does."""

    def tell(url: str) -> None:
        Console(stderr=True).print(f"Playground: {url}", style="bold", soft_wrap=True)
        if open_page:
            webbrowser.open(url)

    with readable_errors():
        start(
            {"model": model, "device": device, "dtype": dtype, "max_rows": max_rows},
            host=host,
            port=port,
            api_keys=api_key or (),
            thumbs=thumbs or ":memory:",
            allowed_hosts=allowed_host,
            limits={"max_tokens": max_tokens, "body_bytes": BODY},
            around=_page,
            on_start=tell,
        )


def _page(app: ASGIApp) -> ASGIApp:
    from amulet.playground.page import Page

    return Page(app)
