"""Draws the report's plots: as inline SVG in the page's colours, or as an image file."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amulet.errors import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # placeholder for the page's text colour, which matplotlib can't name
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
_DASHES = ("-", "--", ":")  # used in turn when the colours run out
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class PlotPoint:
    """One method's mean quality and mean adherence."""

    log_probability: float
    score: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Methods that differ only in strength, weakest first; `is_mark` draws a single marker."""

    name: str
    points: Sequence[PlotPoint]
    is_mark: bool = False


def strength_plot(curves: Sequence[Curve], score_name: str, number: int = 1) -> str:
    """Return an `<svg>` of a score against the mean log-probability under the plain model.

    Args:
        curves: the curves; labels and names are plain text, never formulas.
        score_name: the label of the vertical axis.
        number: the plot's number on its page; keeps the ids of plots distinct.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    out = io.StringIO()
    with _drawn(curves, score_name, {**_SETTINGS, "svg.hashsalt": f"amulet-{number}"}) as figure:
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), number)


def save_plot(curves: Sequence[Curve], score_name: str, path: str | os.PathLike[str]) -> None:
    """Write the same plot to an image file with a white background, .svg or .png.

    Raises:
        EvaluationError: matplotlib is not installed, or the path has another suffix.
    """
    kind = Path(path).suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise EvaluationError(f"{Path(path).name!r}: expected a name that ends in .svg or .png.")
    settings = {name: value for name, value in _SETTINGS.items() if value != _INK}
    with _drawn(curves, score_name, {**settings, "svg.hashsalt": "amulet"}) as figure:
        figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})


@contextmanager
def _drawn(curves: Sequence[Curve], score_name: str, settings: dict[Any, Any]) -> Iterator[Figure]:
    """Draw the plot, with settings that apply until it is saved."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise EvaluationError(
            'Plots need matplotlib: run `pip install "amulet-integrations[eval]"`.'
        ) from error
    with rc_context(settings), warnings.catch_warnings():
        # The browser has glyphs that are missing here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            xs = [point.log_probability for point in curve.points]
            ys = [point.score for point in curve.points]
            style: dict[str, Any] = {"marker": "o", "markersize": 4}
            if curve.is_mark:  # on top of the curves that start there
                style = {"marker": "*", "markersize": 14, "linestyle": "", "zorder": 3}
            colour = _COLOURS[index % len(_COLOURS)]
            dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
            axes.plot(xs, ys, **{"color": colour, "label": f"_{index}", "linestyle": dash, **style})
            for point in curve.points:
                axes.annotate(
                    _plain(point.label),
                    (point.log_probability, point.score),
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set_xlabel("mean log-probability under the plain model (nats per token)")
        axes.set_ylabel(_plain(score_name))
        axes.grid(alpha=0.2)
        if curves:
            axes.legend(
                axes.get_lines(),
                [_plain(curve.name) for curve in curves],
                frameon=False,
                fontsize=8,
            )
        yield figure


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _inline(document: str, number: int) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>plot{number}-", svg)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r'\1role="img"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r'\1aria-label="strength curves"', svg, count=1)
    return svg.replace(_INK, "currentColor")
