"""The command `amulet serve`: runs the application of `create_app` in a server.

The web framework is imported only when the command runs, so `amulet --help` is quick.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from amulet.console import Device, DType, Model, load, readable_errors
from amulet.errors import MissingPackageError
from amulet.serve.backend import Backend, ServeCommand

if TYPE_CHECKING:
    from starlette.types import ASGIApp

LOOPBACK = ["localhost", "127.0.0.1", "::1"]

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 listens on all networks.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        envvar="AMULET_API_KEY",
        help="Key that clients must send; repeatable.",
    ),
]
Served = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        help="Name by which clients request the model; repeatable.",
    ),
]
Stored = Annotated[
    Path | None,
    typer.Option(
        "--preferences",
        metavar="FILE",
        help="SQLite file for users' preferences; requires an API key.",
    ),
]
Thumbs = Annotated[
    Path | None, typer.Option(metavar="FILE", help="SQLite file for users' thumbs on answers.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="Accepted Host header; repeatable. Default on loopback: its own names; else any.",
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin",
        metavar="URL",
        help="Origin whose pages may call the server (CORS), or *; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command `serve`."""
    app.command(cls=ServeCommand)(serve)


def serve(
    backend: Backend = "amulet",
    model: Model = None,
    device: Device = None,
    dtype: DType = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Keys = None,
    served_model_name: Served = None,
    preferences: Stored = None,
    thumbs: Thumbs = None,
    allowed_host: Hosts = None,
    allow_origin: Origins = None,
    max_rows: Annotated[
        int, typer.Option(help="Rows decoded at once; a steered request takes three or more.")
    ] = 64,
    pack: Annotated[
        Literal["int8", "int4"] | None,
        typer.Option(help="Quantise the weights; for a CPU, in bfloat16."),
    ] = None,
    gpu_layers: Annotated[
        int | None, typer.Option(help="GGUF: layers on the GPU. Default: all, if there is a GPU.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="GGUF: threads per forward pass.")] = None,
    context: Annotated[
        int | None, typer.Option(help="GGUF: tokens in the KV cache, over all rows.")
    ] = None,
    kv_type: Annotated[
        str | None, typer.Option(help="GGUF: type of the KV cache: f16, q8_0, q4_0, ...")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the decode step; pays off on a GPU.")
    ] = False,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get status 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Maximum size of a request body.")] = 4
    * 2**20,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of a prompt. Default: the context window.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum tokens of an answer, and the default of requests.")
    ] = 4096,
    max_seconds: Annotated[float, typer.Option(help="Maximum time for a request.")] = 600.0,
    max_preferences: Annotated[int, typer.Option(help="Maximum preferences per request.")] = 4,
    max_choices: Annotated[int, typer.Option(help="Maximum answers per request (`n`).")] = 16,
    max_grammar_bytes: Annotated[
        int, typer.Option(help="Maximum size of a grammar, JSON schema, or tools of a forced call.")
    ] = 2**16,
    max_thumbs: Annotated[int, typer.Option(help="Maximum thumbs kept per user.")] = 1000,
    drain_seconds: Annotated[
        float, typer.Option(help="Time for running requests to finish after SIGTERM.")
    ] = 30.0,
    log_content: Annotated[
        bool, typer.Option("--log-content", help="Log prompts, preferences and answers.")
    ] = False,
) -> None:
    """Serve the model to OpenAI clients; each request is steered by its own `preference`."""
    further = {
        "pack": pack,
        "gpu_layers": gpu_layers,
        "threads": threads,
        "context": context,
        "kv_type": kv_type,
    }
    with readable_errors():
        start(
            {
                "model": model,
                "device": device,
                "dtype": dtype,
                "max_rows": max_rows,
                "compile": compile,
                **{name: value for name, value in further.items() if value is not None},
            },
            host=host,
            port=port,
            api_keys=api_key or (),
            name=served_model_name,
            preferences=preferences,
            thumbs=thumbs,
            allowed_hosts=allowed_host,
            allowed_origins=allow_origin or (),
            limits={
                "queue": queue,
                "body_bytes": max_body_bytes,
                "prompt_tokens": max_prompt_tokens,
                "max_tokens": max_tokens,
                "seconds": max_seconds,
                "preferences": max_preferences,
                "choices": max_choices,
                "grammar_bytes": max_grammar_bytes,
                "thumbs": max_thumbs,
            },
            drain_seconds=drain_seconds,
            log_content=log_content,
        )


def start(
    loading: dict[str, Any],
    *,
    host: str,
    port: int,
    api_keys: Sequence[str],
    limits: dict[str, Any],
    name: Sequence[str] | None = None,
    preferences: Path | None = None,
    thumbs: str | Path | None = None,
    allowed_hosts: list[str] | None = None,
    allowed_origins: Sequence[str] = (),
    drain_seconds: float = 30.0,
    log_content: bool = False,
    around: Callable[[ASGIApp], ASGIApp] | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Run a server until a signal arrives or the model can't be loaded.

    Args:
        loading: arguments of `load`.
        host, port: the address to listen on.
        api_keys, name, preferences, thumbs, allowed_hosts, allowed_origins, log_content: see
            `create_app`.
        limits: fields of `Limits`.
        drain_seconds: time for running requests to finish after the signal.
        around: wraps the server's application in another one.
        on_start: called with the server's address once it listens.

    Raises:
        AmuletError: a package is missing, an option is out of its range, or the model can't be
            loaded.
    """
    try:
        import uvicorn

        from amulet.serve.app import create_app
        from amulet.serve.limits import Limits
        from amulet.serve.server import Server
    except ImportError as error:
        raise MissingPackageError(
            f'The server needs the package {error.name}: pip install "amulet-integrations[serve]"'
        ) from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    servers: list[Server] = []
    loopback = _is_loopback(host)
    app = create_app(
        lambda: load(**loading),
        name=name or (None if loading["model"] else "SmolLM2-135M-Instruct"),
        api_keys=api_keys,
        limits=Limits(**limits),
        preferences=preferences,
        thumbs=thumbs,
        allowed_hosts=allowed_hosts or (LOOPBACK if loopback else None),
        allowed_origins=allowed_origins,
        log_content=log_content,
        on_failure=lambda error: servers[0].fail(error),
    )
    if not loopback and not api_keys:
        Console(stderr=True).print(
            f"Anyone who can reach {host}:{port} can use this server: no --api-key is set.",
            style="yellow",
        )
    whole = app if around is None else around(app)
    config = uvicorn.Config(
        whole,
        host,
        port,
        access_log=False,
        timeout_graceful_shutdown=5,
        # Longer than clients and proxies keep a connection. Otherwise the server may close one just
        # as a client sends a request on it.
        timeout_keep_alive=75,
    )
    servers.append(Server(config, app.state.service, drain_seconds, on_start))
    servers[0].run()
    if servers[0].failure is not None:
        raise servers[0].failure
    thread: Thread | None = getattr(app.state, "loading", None)
    if thread is not None and thread.is_alive():
        # Python's own exit would break into the thread's native code, which may abort.
        logging.shutdown()
        os._exit(0)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
