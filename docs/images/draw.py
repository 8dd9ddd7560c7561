"""Draws the pictures of the pages out of real runs: `python docs/images/draw.py`, half a minute.

`steered.svg`: the demo's question, answered three ways by the embedded model from the demo's
passage, each token coloured by how much steering raised it. `gain.svg`: the gain that so many steps
of the paper's game amount to.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from amulet import Amulet, Reply, Steering, game_gain
from amulet.rendering.html import RAISED
from amulet.rendering.pieces import BOUNDS

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "examples"))
from rag_two_people import PEOPLE, PROMPT, QUESTION, load_passages  # noqa: E402

# Question and preference of `make demo`, which a rule has chosen (benchmarks/demo_choice.py).
PREFERENCE = PEOPLE["Ada"].preference
SECTION = "What to eat"
WIDTH, LINE, ADVANCE, MARGIN = 980, 26, 8.43, 24
COLUMNS = int((WIDTH - 2 * MARGIN) / ADVANCE)
STYLE = """\
  <style>
    text { font: 14px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1b1f24 }
    .head { font-weight: bold } .note { fill: #59636e; font-size: 13px }
    .axis { stroke: #59636e } .curve { fill: none; stroke: #9a3412; stroke-width: 2 }
  </style>"""


class Piece(NamedTuple):
    """A token's text, and how many nats steering raised it; 0 where nothing did."""

    text: str
    raised: float


def pieces(reply: Reply) -> list[Piece]:
    """Return the tokens of an answer; the end of the turn has no text."""
    tokens = [token for token in reply.trace or () if not token.text.startswith("<|")]
    raised = [Piece(token.text, token.steered - token.base) for token in tokens]
    return [*raised, Piece(" …", 0.0)] if reply.finish_reason == "length" else raised


def lines(answer: Sequence[Piece]) -> list[list[Piece]]:
    """Break an answer into lines, at spaces."""
    out: list[list[Piece]] = [[]]
    for number, piece in enumerate(answer):
        ended, newline, rest = piece.text.rpartition("\n")
        if newline:
            out[-1].append(Piece(ended.rstrip("\n"), piece.raised))
            out.append([])
            piece = Piece(rest, piece.raised)
        word = piece.text
        for later in answer[number + 1 :]:  # a word may be several tokens
            if later.text[:1].isspace():
                break
            word += later.text
        used = sum(len(each.text) for each in out[-1])
        if out[-1] and piece.text[:1].isspace() and used + len(word) > COLUMNS:
            out.append([])
            piece = Piece(piece.text.lstrip(), piece.raised)
        out[-1].append(piece)
    return out


def coloured(answer: Sequence[Piece], top: int) -> tuple[list[str], int]:
    """Return the SVG of an answer whose first line begins at `top`, and where the next goes."""
    parts = []
    for line in lines(answer):
        left = float(MARGIN)
        for piece in line:
            width = ADVANCE * len(piece.text)
            level = sum(piece.raised >= bound for bound in BOUNDS)
            if level:
                parts.append(
                    f'  <rect x="{left:.1f}" y="{top - 16}" width="{width:.1f}" height="22" rx="3" '
                    f'fill="{RAISED[level - 1]}"/>'
                )
            text = escape(piece.text)
            parts.append(
                f'  <text x="{left:.1f}" y="{top}" textLength="{width:.1f}" '
                f'xml:space="preserve">{text}</text>'
            )
            left += width
        top += LINE
    return parts, top


def draw_answers(amulet: Amulet) -> str:
    """Return `steered.svg`."""
    (passage,) = (one for one in load_passages() if one.metadata.get("section") == SECTION)
    roles = {"system": "system", "human": "user"}
    prompt = PROMPT.invoke({"passages": passage.page_content, "question": QUESTION})
    messages = [{"role": roles[m.type], "content": m.text} for m in prompt.to_messages()]
    shared = {"max_new_tokens": 80, "trace": True}
    answers = [
        ("no preference", amulet.chat(messages, **shared)),
        (
            f"“{PREFERENCE}” in the prompt (strength 0)",
            amulet.chat(messages, preference=PREFERENCE, strength=0.0, floor=0.0, **shared),
        ),
        (
            f"“{PREFERENCE}” steered (strength {Steering().strength:g})",
            amulet.chat(messages, preference=PREFERENCE, **shared),
        ),
    ]
    parts, top = [f'  <text class="head" x="{MARGIN}" y="36">{QUESTION}</text>'], 72
    for title, reply in answers:
        parts.append(f'  <text class="note" x="{MARGIN}" y="{top}">{title}</text>')
        drawn, top = coloured(pieces(reply), top + LINE)
        parts += drawn
        top += 14
    steered = answers[-1][1].trace or ()
    seen = [token for token in steered if token.text.strip()]
    most = max(seen, key=lambda token: token.steered - token.base)
    note = (
        f"Colour: how much likelier than without the preference. Most: “{most.text.strip()}”, from "
        f"{math.exp(most.base):.4%} to {math.exp(most.steered):.0%}."
    )
    parts.append(f'  <text class="note" x="{MARGIN}" y="{top}">{escape(note)}</text>')
    label = "; ".join(f"{title}: {reply.text}" for title, reply in answers)
    return svg(WIDTH, top + 20, f"{QUESTION} {label}", parts)


def draw_gain() -> str:
    """Return `gain.svg`."""
    width, height, left, bottom, last = 620, 300, 60, 250, 100

    def at(step: int) -> str:
        return f"{left + 5.2 * step:.1f},{bottom - 40 * game_gain(step):.1f}"

    parts = [
        f'  <line class="axis" x1="{left}" y1="{bottom}" x2="{width - 30}" y2="{bottom}"/>',
        f'  <line class="axis" x1="{left}" y1="{bottom}" x2="{left}" y2="20"/>',
        f'  <polyline class="curve" points="{" ".join(at(step) for step in range(last + 1))}"/>',
        f'  <text class="note" x="{width - 30}" y="{bottom + 40}" text-anchor="end">'
        "steps of the game</text>",
        '  <text class="note" x="14" y="24">g</text>',
    ]
    for step in (0, 20, 40, 60, 80, 100):
        x = left + 5.2 * step
        parts.append(
            f'  <text class="note" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{step}</text>'
        )
    for gain in range(1, 6):
        y = bottom - 40 * gain
        parts.append(
            f'  <text class="note" x="{left - 10}" y="{y + 4}" text-anchor="end">{gain}</text>'
        )
    x, y = at(60).split(",")
    parts.append(f'  <circle cx="{x}" cy="{y}" r="4" fill="#9a3412"/>')
    parts.append(f'  <text x="{x}" y="{float(y) + 26:.1f}">60 steps: g = {game_gain():.4f}</text>')
    return svg(width, height, "The gain by the number of the game's steps", parts)


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """Return a whole picture; its card is white so that it can be read on any page."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"  <title>{escape(label)}</title>",
            STYLE,
            f'  <rect width="{width}" height="{height}" rx="10" fill="#ffffff" stroke="#d1d9e0"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    (FOLDER / "gain.svg").write_text(draw_gain(), encoding="utf-8")
    (FOLDER / "steered.svg").write_text(draw_answers(Amulet.embedded()), encoding="utf-8")
