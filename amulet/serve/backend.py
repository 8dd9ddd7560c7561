"""`--backend vllm` hands the rest of the command line to vLLM's server: the options are vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from amulet.console import readable_errors

Backend = Annotated[
    Literal["amulet", "vllm"],
    typer.Option(help="vllm: vLLM's engine and server; the other options are then vLLM's."),
]


class ServeCommand(TyperCommand):
    """The command `serve`, which reads its own options for Amulet's backend only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options, or serve with vLLM and leave."""
        rest = vllm_arguments(args)
        if rest is not None:
            from amulet.vllm_backend.cli import serve

            with readable_errors():
                serve(rest)
            ctx.exit()
        return list(super().parse_args(ctx, args))


def vllm_arguments(args: Sequence[str]) -> list[str] | None:
    """Return the arguments without `--backend vllm`; None where that is not among them."""
    for i, argument in enumerate(args):
        if argument == "--backend=vllm":
            return [*args[:i], *args[i + 1 :]]
        if argument == "--backend" and list(args[i + 1 : i + 2]) == ["vllm"]:
            return [*args[:i], *args[i + 2 :]]
    return None
