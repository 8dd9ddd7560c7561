"""The strength curve: answers to one question at several strengths."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from amulet.errors import MissingPackageError, RequestError, shown
from amulet.output.comparison import as_messages, wished
from amulet.preference import PreferenceLike
from amulet.rendering.pieces import harmless
from amulet.reply import Reply, changed_share, mean_base
from amulet.request import Request

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)

_HEADS = ("strength", "words", "log p (plain model)", "changed", "answer")


@dataclass(frozen=True)
class Point:
    """One strength's answer and its figures.

    Attributes:
        strength: g; None for the plain answer.
        reply: the answer, with its trace.
    """

    strength: float | None
    reply: Reply

    @property
    def words(self) -> int:
        """Length of the answer."""
        return len(self.reply.text.split())

    @property
    def log_probability(self) -> float:
        """Mean over the answer's tokens under the plain model, nats per token; 0 is certain.

        Low means that the plain model would hardly say it: it follows the preference, or falls
        apart.
        """
        return mean_base(self.reply.trace or ())

    @property
    def changed(self) -> float:
        """Share of the tokens, 0 to 1, for which the plain model would have said another."""
        return changed_share(self.reply.trace or ())


@dataclass(frozen=True)
class StrengthCurve:
    """The answers to one question from weak to strong; what `Amulet.strength_curve` returns.

    A notebook shows the plot over the table of answers, rich's `print` the table.

    Attributes:
        plain: the answer without the preference.
        points: the steered answers, weakest first.
    """

    plain: Point
    points: tuple[Point, ...]

    def figure(self) -> Figure:
        """Return the plot: length, log-probability under the plain model, changed share.

        Strength is on the horizontal axis; dashed lines are the plain answer's.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise MissingPackageError(
                'A plot needs matplotlib: pip install "amulet-integrations[eval]"'
            ) from None
        figure = Figure(figsize=(6, 6), layout="constrained")
        panels = figure.subplots(3, sharex=True)
        strengths = [point.strength for point in self.points]
        for axes, name, label in (
            (panels[0], "words", "words"),
            (panels[1], "log_probability", "log p under the\nplain model (nats/token)"),
            (panels[2], "changed", "share of tokens the plain\nmodel would not have said"),
        ):
            values = [getattr(point, name) for point in self.points]
            axes.plot(strengths, values, marker="o", color="#0072b2")
            axes.axhline(getattr(self.plain, name), color="#8a8a8a", linestyle="--")
            axes.set_ylabel(label, fontsize=9)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylim(bottom=0)
        panels[2].set_ylim(-0.03, 1.03)
        panels[2].set_xlabel("strength (dashed: the plain answer)")
        return figure

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (
                "plain" if point.strength is None else f"{point.strength:g}",
                str(point.words),
                f"{point.log_probability:.2f}",
                f"{point.changed:.0%}",
                harmless(point.reply.text),
            )
            for point in (self.plain, *self.points)
        ]

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;padding:.2em .8em .2em 0"
        head = "".join(f'<th scope="col" style="{cell}">{name}</th>' for name in _HEADS)
        body = "".join(
            "<tr>" + "".join(f'<td style="{cell}">{escape(text)}</td>' for text in row) + "</tr>"
            for row in self._rows()
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        try:
            return f"<div>{_svg(self.figure())}{table}</div>"
        except MissingPackageError as error:
            return f"<div><p>{escape(str(error))}</p>{table}</div>"

    def __rich__(self) -> RenderableType:
        from rich.table import Table  # rich is slow to import
        from rich.text import Text

        table = Table(*_HEADS)
        for row in self._rows():
            table.add_row(*map(Text, row))
        return table


def curve_requests(
    question: str | Sequence[dict[str, Any]],
    preference: PreferenceLike,
    strengths: Sequence[float],
    options: dict[str, Any],
) -> list[Request]:
    """Return the plain request, then one per strength; each with a trace.

    Raises:
        RequestError: there is no preference or no strength, or an option is not valid.
    """
    if not isinstance(strengths, Collection) or len(strengths) == 0:  # an array has no truth value
        raise RequestError(
            f"strengths={shown(strengths)}: expected at least one, such as (0, 1, 2)."
        )
    if "strength" in options:
        raise RequestError("strength: a curve has several; give strengths=(0, 1, 2).")
    shared = {**options, "messages": as_messages(question), "trace": True}
    steered = {**shared, "preference": wished(preference)}
    requests = [Request(**steered, strength=strength) for strength in strengths]
    return [Request(**shared), *sorted(requests, key=lambda request: request.strength or 0.0)]


def _svg(figure: Figure) -> str:
    """Return the figure as an `<svg>` on a white ground, so that a dark page can't hide its ink."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    document = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.S)
    label = "Words, log-probability under the plain model and changed share, by strength"
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
