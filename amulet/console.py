"""Shared parts of the commands: options, model loading, progress bars, one-line errors.

Torch is imported only when a command needs the model, so `amulet --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from amulet.errors import AmuletError, EvaluationError, one_line

if TYPE_CHECKING:
    from amulet import Amulet

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Hub id, folder or GGUF file. Default: the embedded SmolLM2-135M-Instruct.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. Default: the best available.")
]
DType = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


def load(model: str | None, device: str | None, dtype: str, **options: Any) -> Amulet:
    """Load a model, or the embedded one, with a message on standard error.

    Args:
        model, device, dtype: as the options of the same names.
        options: further options of `Amulet.from_pretrained`.
    """
    Console(stderr=True).print(f"Loading {model or 'the embedded model'} ...", style="dim")
    from amulet import Amulet

    if model is None:
        return Amulet.embedded(device=device, dtype=dtype, **options)
    return Amulet.from_pretrained(model, device=device, dtype=dtype, **options)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar with the time left on standard error; yields `tell(done, total)`.

    Work done before the first `tell` does not count towards the speed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # A batch finishes its answers in bursts, so the default window of half a minute is too short.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=600) as progress:
        task = progress.add_task(what, total=None)
        started = False

        def tell(done: int, total: int) -> None:
            nonlocal started
            if started:
                progress.update(task, completed=done, total=total)
            else:
                started = True
                progress.reset(task, completed=done, total=total)

        yield tell


def check_out(option: str, path: Path) -> None:
    """Check before the work that a file can be written where an option says.

    Raises:
        EvaluationError: its folder is missing, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise EvaluationError(f"{option} {path}: expected a file in a folder that exists.")


def where_to_read(error: AmuletError) -> str:
    """Return the line that names the page and section that explain an error."""
    return f"More: {error.help_page}"


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print an `AmuletError` as one red line with its help page, and exit with code 1."""
    try:
        yield
    except AmuletError as error:
        console = Console(stderr=True)
        console.print(Text(f"error: {one_line(error)}", style="red"), soft_wrap=True)
        console.print(Text(where_to_read(error), style="dim"), soft_wrap=True)
        raise typer.Exit(1) from None
