"""Renders replies for a terminal with rich: the HTML's colours, without control characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from amulet.rendering.html import LOWERED, RAISED, figures
from amulet.rendering.pieces import BOUNDS, Piece, harmless, pieces_of

if TYPE_CHECKING:
    from amulet.reply import Reply


def reply_terminal(reply: Reply) -> RenderableType:
    """Return the answer, its tokens coloured, with its figures and the legend below."""
    parts: list[Text] = [answer_text(reply), Text(figures(reply), style="dim")]
    if any(piece.level or piece.differs for piece in pieces_of(reply)):
        parts.append(legend_text())
    return Group(*parts)


def columns_terminal(columns: Sequence[tuple[str, Reply]]) -> RenderableType:
    """Return titled replies side by side."""
    table = Table(expand=True, show_footer=True)
    for title, reply in columns:
        table.add_column(Text(harmless(title)), footer=Text(figures(reply), "dim"), ratio=1)
    table.add_row(*(answer_text(reply) for _, reply in columns))
    return Group(table, legend_text())


def answer_text(reply: Reply) -> Text:
    """Return reasoning, text and tool calls of a reply; with a trace, tokens are coloured."""
    text = Text()
    shown = pieces_of(reply)
    for piece in shown:
        text.append(harmless(piece.text), style=_style(piece))
    if reply.reasoning and reply.text:
        text = Text("\n\n").join(text.divide([len(reply.reasoning)]))
    for call in reply.tool_calls:
        text.append(f"\ncalls {harmless(call.name)} with {harmless(str(call.arguments))}")
    for invalid in reply.invalid_tool_calls:
        text.append(f"\na call that can't be read ({invalid.error}): {harmless(invalid.raw)}")
    return text


def legend_text() -> Text:
    """Return the legend of the colours in one line."""
    text = Text("Nats by which steering made a token likelier than the plain model has it: ", "dim")
    for bound, colour in zip(BOUNDS, RAISED, strict=True):
        text.append(f"+{bound:g}", f"not dim black on {colour}").append(" ")
    text.append("or less likely: ")
    for bound, colour in zip(BOUNDS, LOWERED, strict=True):
        text.append(f"−{bound:g}", f"not dim black on {colour}").append(" ")
    return text.append("Underlined: the plain model would have said something else.")


def _style(piece: Piece) -> str:
    style = "italic " if piece.is_reasoning else ""
    if piece.level:
        colours = RAISED if piece.level > 0 else LOWERED
        style += f"black on {colours[abs(piece.level) - 1]} "
    return style + ("underline" if piece.differs else "")
