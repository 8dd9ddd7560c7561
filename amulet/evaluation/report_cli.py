"""The command `amulet report`: runs to one HTML page and a Markdown table; no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amulet.console import readable_errors

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of `amulet eval`.")]
Out = Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE", help="A Markdown file of tables.")]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A picture of the strength curves, .svg or .png."),
]
Examples = Annotated[int, typer.Option(min=0, help="Questions whose answers are shown.")]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("report")(report_command)


def report_command(
    runs: Runs,
    out: Out = Path("report.html"),
    markdown: Markdown = None,
    plot: Plot = None,
    examples: Examples = 6,
) -> None:
    """Show runs of `amulet eval` side by side: scores with intervals, curves, guards, answers."""
    with readable_errors():
        from amulet.evaluation.report import read_report, write_html, write_markdown, write_plot

        report = read_report(runs)
        write_html(report, out, examples)
        if markdown is not None:
            write_markdown(report, markdown)
        if plot is not None:
            write_plot(report, plot)
    written = [str(path) for path in (out, markdown, plot) if path is not None]
    Console().print(f"Written: {', '.join(written)}", soft_wrap=True, markup=False, highlight=False)
