"""The command `amulet report`: writes runs as an HTML page, Markdown tables and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from amulet.console import check_out, readable_errors

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of `amulet eval`.")]
Out = Annotated[Path, typer.Option(metavar="FILE", help="HTML page to write.")]
Markdown = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Markdown file for the tables.")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Image file for the strength curves, .svg or .png."),
]
Examples = Annotated[int, typer.Option(min=0, help="Number of questions whose answers are shown.")]


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
    """Compare runs of `amulet eval` on one page: scores, curves, guards and answers."""
    with readable_errors():
        from amulet.evaluation.report import read_report, write_html, write_markdown, write_plot

        for option, path in (("--out", out), ("--markdown", markdown), ("--plot", plot)):
            if path is not None:
                check_out(option, path)
        report = read_report(runs)
        write_html(report, out, examples)
        if markdown is not None:
            write_markdown(report, markdown)
        if plot is not None:
            write_plot(report, plot)
    written = [str(path) for path in (out, markdown, plot) if path is not None]
    Console().print(f"Written: {', '.join(written)}", soft_wrap=True, markup=False, highlight=False)
