"""Draws the report's plots as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from amulet.errors import EvaluationError

_INK = "#010203"  # stands for the page's text colour, which matplotlib has no name for
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
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
class Point:
    """One method in the plane of quality and adherence; both are means."""

    log_probability: float
    score: float
    label: str


@dataclass(frozen=True)
class Curve:
    """Methods that differ in strength alone, weakest first; `is_mark` draws a single sign."""

    name: str
    points: Sequence[Point]
    is_mark: bool = False


def strength_plot(curves: Sequence[Curve], score_name: str, number: int = 1) -> str:
    """Return an `<svg>` of a score against the mean log-probability under the plain model.

    Args:
        curves: what is drawn; labels and names are shown as they are, never as formulas.
        score_name: the vertical axis.
        number: of the plot on its page; keeps the ids of two plots apart.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise EvaluationError(
            'Plots need matplotlib: run `pip install "amulet-integrations[eval]"`.'
        ) from error
    out = io.StringIO()
    with rc_context({**_SETTINGS, "svg.hashsalt": f"amulet-{number}"}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the browser has it
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            xs = [point.log_probability for point in curve.points]
            ys = [point.score for point in curve.points]
            style: dict[str, Any] = {"marker": "o"}
            if curve.is_mark:
                style = {"marker": "*", "markersize": 14, "linestyle": ""}
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot(xs, ys, color=colour, label=f"_{index}", **style)
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
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), number)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _inline(document: str, number: int) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>plot{number}-", svg)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r'\1role="img"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r'\1aria-label="strength curves"', svg, count=1)
    return svg.replace(_INK, "currentColor")
