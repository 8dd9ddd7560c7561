"""Replies as HTML: well-formed, escaped, coloured by level, with words for what colours say."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from amulet import InvalidToolCall, Reply, ToolCall
from amulet.rendering.html import LOWERED, RAISED, ROWS, columns_html
from tests.rendering.replies import reply, token

EVIL = "<script>alert(1)</script><img src=x onerror='alert(1)'>\" & \x1b[2J\u202e"


class Page(HTMLParser):
    """Reads a page into its elements and its text; every element must be closed in its order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def tokens(self) -> list[dict[str, str | None]]:
        """The attributes of each token's element."""
        return [attributes for tag, attributes in self.elements if "title" in attributes]


def page(given: Reply) -> Page:
    return Page(given._repr_html_())


def test_tokens_are_coloured_by_how_much_they_were_raised() -> None:
    found = page(reply("abc", token("a"), token("b", 3.0), token("c", -0.5))).tokens()
    assert [attributes.get("style") for attributes in found] == [
        None,
        f"background:{RAISED[2]};color:#000;",
        f"background:{LOWERED[0]};color:#000;",
    ]


def test_what_the_plain_model_would_have_said_stands_in_title_and_table() -> None:
    found = page(reply("Ahoy!", token("Ahoy", 4.0, unsteered="Hello"), token("!")))
    first, second = found.tokens()
    assert first["title"] == (
        "log-probability 2.00 steered, 0.00 with the preference in the prompt, -2.00 without; "
        "the plain model would have said “Hello”"
    )
    assert first["style"] == f"background:{RAISED[2]};color:#000;text-decoration:underline;"
    assert str(second["title"]).endswith("-2.00 without")
    assert "something else at 1 of 2 places" in found.text
    assert "AhoyHello+4.00" in found.text  # a row of the table


def test_the_table_of_differences_ends_somewhere() -> None:
    count = ROWS + 5
    found = page(reply("ab" * count, *[token("ab", 1.0, unsteered="c")] * count))
    assert f"something else at {count} of {count} places" in found.text
    assert found.text.count("c+1.00") == ROWS
    assert f"The first {ROWS} are shown." in found.text


def test_nothing_a_model_writes_is_markup() -> None:
    everywhere = reply(
        EVIL,
        token(EVIL, 2.0, unsteered=EVIL),
        reasoning=EVIL,
        tool_calls=(ToolCall(EVIL, {EVIL: EVIL}, "1"),),
        invalid_tool_calls=(InvalidToolCall(EVIL, EVIL, "2", EVIL),),
    )
    for html in (
        everywhere._repr_html_(),
        reply(EVIL)._repr_html_(),
        columns_html([(EVIL, everywhere)]),
    ):
        found = Page(html)
        names = {tag for tag, _ in found.elements}
        assert names.isdisjoint({"script", "img"})
        assert not any(
            name.startswith("on") or name in ("src", "href")
            for _, attributes in found.elements
            for name in attributes
        )
        assert "<script>alert(1)</script>" in found.text  # shown as it is
        assert "\x1b" not in html
        assert "\u202e" not in html


def test_a_plain_reply_has_no_colours_and_no_legend() -> None:
    given = reply("Hi you", token("Hi"), token(" you"), steering=None)
    found = page(given)
    assert found.text == "Hi you2 words · 2 tokens"
    assert [attributes.get("style") for attributes in found.tokens()] == [None, None]


def test_without_a_trace_it_says_how_to_get_one() -> None:
    assert "trace=True colours the tokens" in page(reply("Hi")).text
    assert "trace=True" not in page(reply("Hi", steering=None)).text


def test_reasoning_is_folded_away_and_calls_are_shown() -> None:
    found = page(
        reply(
            "",
            reasoning="Hm.",
            tool_calls=(ToolCall("weather", {"city": "Oslo"}, "1"),),
            invalid_tool_calls=(InvalidToolCall("{", "no JSON", "2"),),
            finish_reason="tool_calls",
        )
    )
    assert ("details", {}) in found.elements
    assert "ReasoningHm." in found.text
    assert "calls weather with {'city': 'Oslo'}" in found.text
    assert "a call that can't be read (no JSON): {" in found.text


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", [*RAISED, *LOWERED])
def test_black_on_every_colour_is_easy_to_read(colour: str) -> None:
    assert (luminance(colour) + 0.05) / 0.05 >= 7.0  # WCAG's AAA


@pytest.mark.parametrize("colours", [RAISED, LOWERED])
def test_deeper_is_darker(colours: tuple[str, ...]) -> None:
    assert [luminance(c) for c in colours] == sorted(map(luminance, colours), reverse=True)
