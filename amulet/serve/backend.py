"""The option `--backend vllm`, which passes all other options to vLLM's server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from amulet.console import readable_errors

Backend = Annotated[
    Literal["amulet", "vllm"],
    typer.Option(help="vllm runs vLLM's engine and server; all other options are then vLLM's."),
]


class ServeCommand(TyperCommand):
    """The command `serve`, which parses its own options only for Amulet's backend."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options, or run vLLM's server and exit."""
        rest = vllm_arguments(args)
        if rest is not None:
            from amulet.vllm_backend.cli import serve

            with readable_errors():
                serve(rest)
            ctx.exit()
        return list(super().parse_args(ctx, args))


def vllm_arguments(args: Sequence[str]) -> list[str] | None:
    """Return the arguments without `--backend vllm`, or None if that is not given."""
    for i, argument in enumerate(args):
        if argument == "--backend=vllm":
            return [*args[:i], *args[i + 1 :]]
        if argument == "--backend" and list(args[i + 1 : i + 2]) == ["vllm"]:
            return [*args[:i], *args[i + 2 :]]
    return None
