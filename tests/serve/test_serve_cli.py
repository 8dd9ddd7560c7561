"""`amulet serve`: its options reach the application and uvicorn; what fails is one line."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from amulet import Amulet, ModelError
from amulet.serve import cli
from amulet.serve.server import Server, check_address
from tests.serve.conftest import asking


def run(*arguments: str) -> Any:
    app = typer.Typer()
    cli.register(app)
    return CliRunner().invoke(app, list(arguments), env={"AMULET_API_KEY": None})


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, tiny: Amulet) -> list[Server]:
    """The servers that would have run; each has loaded its model."""
    started: list[Server] = []

    async def start(server: Server) -> None:
        started.append(server)
        app: Any = server.config.app
        async with app.router.lifespan_context(app):
            while not server.should_exit and app.state.service.traffic.state == "loading":
                await asyncio.sleep(0.01)

    monkeypatch.setattr(Server, "run", lambda server: asyncio.run(start(server)))
    monkeypatch.setattr(cli, "load", lambda **_: tiny)
    return started


async def ask(server: Server, path: str, key: str | None = None, host: str = "localhost") -> Any:
    app: Any = server.config.app
    async with asking(app, key) as client:
        return await client.get(path, headers={"Host": host})


def test_how_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, servers: list[Server]) -> None:
    asked: list[dict[str, Any]] = []
    tiny = cli.load()

    def load(**options: Any) -> Amulet:
        asked.append(options)
        return tiny

    monkeypatch.setattr(cli, "load", load)
    assert run().exit_code == 0
    usual = {"model": None, "device": None, "dtype": "auto", "max_rows": 64, "compile": False}
    assert asked == [usual]
    result = run("--compile", "--pack", "int8", "--dtype", "bfloat16", "--max-rows", "8")
    assert result.exit_code == 0, result.output
    assert asked[1] == {
        **usual,
        "compile": True,
        "pack": "int8",
        "dtype": "bfloat16",
        "max_rows": 8,
    }
    assert "int2" in run("--pack", "int2").output
    assert len(asked) == 2


def test_it_listens_on_loopback_unless_told(servers: list[Server]) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    server = servers[0]
    assert (server.config.host, server.config.port) == ("127.0.0.1", 8000)
    assert not server.config.access_log
    assert server.config.timeout_keep_alive == 75  # longer than clients keep a connection
    models = asyncio.run(ask(server, "/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["SmolLM2-135M-Instruct"]
    assert asyncio.run(ask(server, "/health", host="evil.example")).status_code == 403
    assert "no --api-key" not in result.output


def test_options_reach_the_server(servers: list[Server], tmp_path: Path) -> None:
    result = run(
        "--model", "some/model", "--host", "0.0.0.0", "--port", "81", "--api-key", "a",
        "--api-key", "b", "--served-model-name", "mine", "--max-tokens", "9", "--queue", "3",
        "--max-body-bytes", "10", "--max-prompt-tokens", "7", "--max-seconds", "2",
        "--max-preferences", "1", "--max-choices", "2", "--log-content",
        "--preferences", str(tmp_path / "p.sqlite"), "--thumbs", str(tmp_path / "p.sqlite"),
        "--max-thumbs", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    server = servers[0]
    assert (server.config.host, server.config.port) == ("0.0.0.0", 81)
    assert asyncio.run(ask(server, "/v1/models")).status_code == 401
    facts = asyncio.run(ask(server, "/v1/models/mine", "b", "any.example")).json()
    assert facts["limits"] == {
        "queue": 3,
        "body_bytes": 10,
        "prompt_tokens": 7,
        "max_tokens": 9,
        "seconds": 2.0,
        "preferences": 1,
        "choices": 2,
        "grammar_bytes": 65536,
        "thumbs": 4,
    }
    app: Any = server.config.app
    assert app.state.service.log_content
    assert asyncio.run(ask(server, "/openapi.json", "a")).json()["paths"].keys() == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/health",
        "/metrics",
        "/v1/preferences/{user}",
        "/v1/thumbs",
        "/v1/thumbs/{id}",
        "/v1/thumbs/pairs",
    }


def test_several_names_and_origins(servers: list[Server]) -> None:
    names = ("--served-model-name", "one", "--served-model-name", "two")
    origin = "http://localhost:3000"
    result = run(*names, "--allow-origin", origin)
    assert result.exit_code == 0, result.output
    models = asyncio.run(ask(servers[0], "/v1/models"))
    assert [model["id"] for model in models.json()["data"]] == ["one", "two"]

    async def from_a_page() -> Any:
        app: Any = servers[0].config.app
        async with asking(app) as client:
            return await client.get("/health", headers={"Host": "localhost", "Origin": origin})

    assert asyncio.run(from_a_page()).headers["access-control-allow-origin"] == origin
    result = run("--allow-origin", "localhost:3000")
    assert result.exit_code == 1
    assert "allow_origin='localhost:3000': expected a scheme and a host" in result.output


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_is_none(servers: list[Server], port: str) -> None:
    result = run("--port", port)
    assert result.exit_code == 2
    assert "--port" in result.output
    assert servers == []


@pytest.mark.allow_hosts(["127.0.0.1", "::1"])
def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load", lambda **_: pytest.fail("it was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            result = run("--port", str(port), "--host", host)
            assert result.exit_code == 1
            said = f"error: Can't listen on host='{host}', port={port}: Address already in use. "
            assert result.output.startswith(said)
    result = run("--host", "192.0.2.1")  # nobody's
    assert "error: Can't listen on host='192.0.2.1', port=8000: " in result.output
    check_address("localhost", port)  # it is free again


def test_an_open_door_is_told_of(servers: list[Server]) -> None:
    result = run("--host", "0.0.0.0")
    assert (
        "Anyone who can reach 0.0.0.0:8000 can use this server: no --api-key is set."
        in result.output
    )


def test_what_fails_is_one_line(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = run("--queue", "-1")
    assert (result.exit_code, result.output.strip()) == (
        1,
        "error: queue=-1: expected 0 or more.\n"
        "More: Amulet's documentation, Troubleshooting, RequestError",
    )
    result = run("--preferences", str(tmp_path / "p.sqlite"))
    assert result.exit_code == 1
    assert result.output.startswith("error: Stored preferences need an API key")

    def load(**_: Any) -> Amulet:
        raise ModelError("no model there")

    monkeypatch.setattr(cli, "load", load)
    result = run()
    assert result.exit_code == 1
    assert result.output.startswith("error: no model there\nMore: ")


def test_a_signal_ends_a_server_that_is_loading() -> None:
    code = """if True:
        import sys, time
        from amulet.serve import cli

        def load(**_):
            sys.stderr.write("the load began\\n")
            time.sleep(60)

        cli.load = load
        cli.serve(port=0)
    """
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = ""
        for line in server.stderr:  # in either order, or both in one line
            told += line
            if "the load began" in told and "Uvicorn running on" in told:
                break
        try:
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
            assert "Traceback" not in server.stderr.read()
        finally:
            server.kill()


def test_the_command_line_loads_no_framework() -> None:
    code = (
        "import sys, amulet.serve.cli\n"
        "print({'torch', 'fastapi', 'uvicorn', 'openai', 'starlette'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
