"""Renders replies as HTML for notebooks: no scripts, no style sheets, every text escaped.

Styles are inline, because notebooks and mail clients drop style sheets. Blue means raised and
orange lowered, which are distinct for every kind of colour blindness, under black text at a
contrast of 7:1 or more; titles and a table give the same information. Blue is for the more frequent
case: its levels differ in lightness more than those of a yellow or an orange, so they are distinct
in grey, too. The playground has the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from amulet.rendering.pieces import BOUNDS, Piece, harmless, pieces_of

if TYPE_CHECKING:
    from amulet.reply import Reply

RAISED = ("#dbe9f6", "#b7d4ea", "#85bcdc", "#5ba3cf")
"""Colours of the levels 1 to 4; deeper means that steering raised a token more."""
LOWERED = ("#fee8d3", "#fdd0a2", "#fdae6b", "#f4872a")
"""Colours of the levels −1 to −4."""

ROWS = 100  # maximum rows of the table of differences

_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;margin:0 0 .5em"
_SMALL = "font-size:.85em;margin:.25em 0"
_CELL = "text-align:left;padding:.1em .8em .1em 0;white-space:pre-wrap"


def reply_html(reply: Reply) -> str:
    """Return a `<div>` with the answer, its tokens coloured, and their figures."""
    shown = pieces_of(reply)
    legend = legend_html() if _is_steered(shown) else ""
    return f'<div style="max-width:50em">{answer_html(reply, shown)}{legend}</div>'


def columns_html(columns: Sequence[tuple[str, Reply]]) -> str:
    """Return a `<div>` with titled replies side by side; on a narrow page, stacked."""
    sections = "".join(
        f'<section aria-label="{_safe(title)}"><p style="margin:0 0 .5em"><strong>{_safe(title)}'
        f"</strong></p>{answer_html(reply, pieces_of(reply))}</section>"
        for title, reply in columns
    )
    style = "display:grid;grid-template-columns:repeat(auto-fit,minmax(15em,1fr));gap:1.5em"
    return f'<div><div style="{style}">{sections}</div>{legend_html()}</div>'


def answer_html(reply: Reply, shown: Sequence[Piece]) -> str:
    """Return reasoning, text, tool calls, figures and the table of differences of one reply."""
    reasoning = "".join(_piece(piece) for piece in shown if piece.is_reasoning)
    text = "".join(_piece(piece) for piece in shown if not piece.is_reasoning)
    parts = []
    if reasoning:
        parts.append(
            f"<details><summary>Reasoning</summary>"
            f'<p dir="auto" style="{_TEXT};font-style:italic">{reasoning}</p></details>'
        )
    parts.append(f'<p dir="auto" style="{_TEXT}">{text}</p>')
    parts += [
        f'<p style="{_TEXT}">calls <code>{_safe(call.name)}</code> with '
        f"<code>{_safe(str(call.arguments))}</code></p>"
        for call in reply.tool_calls
    ]
    parts += [
        f'<p style="{_TEXT}">a call that can\'t be read ({_safe(call.error)}): '
        f"<code>{_safe(call.raw)}</code></p>"
        for call in reply.invalid_tool_calls
    ]
    parts.append(f'<p style="{_SMALL}">{_safe(figures(reply))}</p>')
    if any(piece.differs for piece in shown):
        parts.append(_differences(shown))
    return "".join(parts)


def figures(reply: Reply) -> str:
    """Return words, tokens, finish reason and steering in one line."""
    found = [f"{len(reply.text.split())} words", f"{reply.usage.completion_tokens} tokens"]
    ends = {"length": "cut off at the limit", "cancelled": "cancelled"}
    if reply.finish_reason in ends:
        found.append(ends[reply.finish_reason])
    if (steering := reply.steering) is not None:
        found.append(f"strength {steering.strength:g}, floor {steering.floor:g}")
    if reply.trace is None and reply.steering is not None:
        found.append("trace=True colours the tokens")
    return " · ".join(found)


def legend_html() -> str:
    """Return the legend of the colours, as a line of text with swatches."""
    named = zip(BOUNDS, RAISED, LOWERED, strict=True)
    swatches = [
        (_swatch(raised, f"+{bound:g}"), _swatch(lowered, f"−{bound:g}"))
        for bound, raised, lowered in named
    ]
    return (
        f'<p style="{_SMALL}">Nats by which steering made a token likelier than the plain model '
        f"has it: {' '.join(raised for raised, _ in swatches)}, or less likely: "
        f"{' '.join(lowered for _, lowered in swatches)}. Underlined: the plain model would have "
        "said something else.</p>"
    )


def _swatch(colour: str, text: str) -> str:
    return f'<span style="background:{colour};color:#000;padding:0 .3em">{text}</span>'


def _piece(piece: Piece) -> str:
    text = _safe(piece.text)
    if not piece.tokens:
        return text
    style = ""
    if piece.level:
        colours = RAISED if piece.level > 0 else LOWERED
        style += f"background:{colours[abs(piece.level) - 1]};color:#000;"
    if piece.differs:
        style += "text-decoration:underline;"
    styled = f' style="{style}"' if style else ""
    return f'<span{styled} title="{_safe(told(piece))}">{text}</span>'


def told(piece: Piece) -> str:
    """Return a piece's log-probabilities and the plain model's choice in words."""
    steered, preferred, base = (
        sum(getattr(token, name) for token in piece.tokens)
        for name in ("steered", "preferred", "base")
    )
    text = (
        f"log-probability {steered:.2f} steered, {preferred:.2f} with the preference in the "
        f"prompt, {base:.2f} without"
    )
    if piece.differs:
        text += f"; the plain model would have said “{piece.unsteered}”"
    return text


def _differences(shown: Sequence[Piece]) -> str:
    """Return a collapsed table of the places where the plain model would have differed."""
    different = [piece for piece in shown if piece.differs]
    traced = sum(bool(piece.tokens) for piece in shown)
    summary = f"The plain model would have said something else at {len(different)} of {traced}"
    rows = "".join(
        f'<tr><td style="{_CELL}">{_safe(piece.text)}</td>'
        f'<td style="{_CELL}">{_safe(piece.unsteered)}</td>'
        f'<td style="{_CELL}">{piece.raised:+.2f}</td></tr>'
        for piece in different[:ROWS]
    )
    more = f'<p style="{_SMALL}">The first {ROWS} are shown.</p>' if len(different) > ROWS else ""
    head = "".join(
        f'<th scope="col" style="{_CELL}">{name}</th>'
        for name in ("said", "plain model", "raised (nats)")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"
    return f'<details style="{_SMALL}"><summary>{summary} places.</summary>{table}</details>'


def _is_steered(shown: Sequence[Piece]) -> bool:
    return any(piece.level or piece.differs for piece in shown)


def _safe(text: str) -> str:
    return escape(harmless(text), quote=True)
