"""Replies as rich prints them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from amulet import Amulet, InvalidToolCall, Reply, Steering, ToolCall
from amulet.cli import app
from amulet.rendering.html import RAISED
from amulet.rendering.terminal import answer_text
from tests.models import ScriptedModel, byte_tokenizer
from tests.rendering.replies import reply, token


def printed(given: object, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(given)
    return out.getvalue()


def styles(given: Reply) -> list[tuple[str, str]]:
    text = answer_text(given)
    return [(text.plain[span.start : span.end], str(span.style).strip()) for span in text.spans]


def test_tokens_are_coloured_and_differences_underlined() -> None:
    given = reply("Ahoy you!", token("Ahoy", 9.0, unsteered="Hi"), token(" you"), token("!", 1.0))
    assert [(text, style) for text, style in styles(given) if style] == [
        ("Ahoy", f"black on {RAISED[3]} underline"),
        ("!", f"black on {RAISED[0]}"),
    ]


def test_the_colours_reach_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=80)
    console.print(answer_text(reply("Ahoy", token("Ahoy", 9.0))))
    assert on_a_terminal(RAISED[3]) in out.getvalue()


def on_a_terminal(colour: str) -> str:
    """The escape sequence's part that sets a background."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"48;2;{red};{green};{blue}"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_command_compare_colours_the_steered_answer(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    tokenizer = byte_tokenizer()
    model: Any = ScriptedModel(tokenizer, {"Be brief.": "Short.", "": "A plain answer."})
    amulet = Amulet(model, tokenizer)
    monkeypatch.setattr(Amulet, "embedded", classmethod(lambda cls, **_: amulet))
    terminal = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm"}
    runner = CliRunner(env={"COLUMNS": "120", **(terminal if is_terminal else {"TERM": "dumb"})})
    result = runner.invoke(app, ["compare", "What is tea?", "-p", "Be brief."])
    assert result.exit_code == 0
    table, _, legend = result.stdout.rpartition("Nats by which steering")
    assert (on_a_terminal(RAISED[3]) in table) == is_terminal
    assert "Underlined: the plain model would have said something else." in legend


def test_a_reply_is_printed_with_its_figures_and_the_legend() -> None:
    steering = Steering(strength=0.7, floor=0.2)
    given = reply("Ahoy you", token("Ahoy", 9.0), token(" you"), steering=steering)
    lines = printed(given).splitlines()
    assert lines[:2] == ["Ahoy you", "2 words · 2 tokens · strength 0.7, floor 0.2"]
    assert lines[2].startswith("Nats by which steering made a token likelier")


def test_a_plain_reply_has_no_legend() -> None:
    assert printed(reply("Hi", token("Hi"), steering=None)) == "Hi\n1 words · 1 tokens\n"


def test_markup_and_control_characters_are_text() -> None:
    evil = "[red]no[/red] \x1b[2J\x07"
    given = reply(
        evil,
        token(evil, 2.0),
        tool_calls=(ToolCall(evil, {}, "1"),),
        invalid_tool_calls=(InvalidToolCall(evil, "no JSON", "2"),),
    )
    out = printed(given)
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count("[red]no[/red] \N{REPLACEMENT CHARACTER}[2J") == 3


def test_reasoning_and_answer_are_kept_apart() -> None:
    trace = [token("<think>"), token("Hm"), token("</think>"), token("Yes", 1.0)]
    given = reply("Yes", *trace, reasoning="Hm")
    assert answer_text(given).plain == "Hm\n\nYes"
    assert ("Hm", "italic") in styles(given)
