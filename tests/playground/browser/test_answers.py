"""Asking and seeing: both columns, the slider, stop, regenerate, edit, copy, tokens, history."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from amulet import Amulet
from tests.playground.browser.conftest import Open, answer, ask, prefer, serving
from tests.serve.conftest import saying

LONG = "A black hole is a region of space from which nothing escapes, not even light."
SHORT = "A hole in space."


@pytest.fixture(scope="module")
def amulet(tokenizer: Any) -> Amulet:
    return saying(tokenizer, {"Be brief": SHORT, "": LONG})


@pytest.fixture(scope="module")
def url(amulet: Amulet) -> Any:
    with serving(amulet) as (url, _):
        yield url


def settled(page: Page) -> None:
    """Wait until nothing is being answered."""
    page.get_by_role("button", name="Regenerate").wait_for()


def test_a_first_answer(visit: Open, url: str) -> None:
    page = visit(url)
    ask(page, "What is a black hole?")
    assert answer(page, "plain") == LONG
    assert page.locator("section.steered").count() == 0
    figures = page.locator("section.plain .figures").inner_text()
    assert f"Tokens\n{len(LONG) + 1}" in figures  # bytes, and the end of turn
    assert "\ns" not in figures
    assert page.locator("section.plain .figures dd").nth(1).inner_text().endswith(" s")


def test_both_columns_in_one_batch(visit: Open, url: str, amulet: Amulet) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    before = len(amulet.model.calls)
    ask(page, "What is a black hole?")
    assert (answer(page, "plain"), answer(page, "steered")) == (LONG, SHORT)
    # A plain row, and the pair of the steered answer: three rows in one forward pass.
    assert (3, 1) in amulet.model.calls[before:]
    assert page.locator("section.plain .part").inner_text() == "black"


def test_the_slider_changes_the_answer(visit: Open, url: str) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    ask(page, "What is a black hole?")
    assert answer(page, "steered") == SHORT
    settled(page)
    assert page.get_by_text("The settings have changed").count() == 0
    page.get_by_label("Strength").press("Home")  # -1: no preference at all
    expect(page.locator("output").first).to_have_text("−1")
    page.get_by_role("button", name="Answer again").click()
    page.locator("section.steered", has_text="nothing escapes").wait_for()
    assert answer(page, "steered") == LONG
    assert "strength −1" in page.locator("section.steered header").inner_text()


def test_what_is_sent(visit: Open, url: str) -> None:
    page = visit(url)
    page.get_by_role("button", name="Pirate").click()
    prefer(page, "Be brief.")
    page.get_by_label("Steer away from: Be brief.").click()
    page.get_by_label("Weight of: Be brief.").fill("0.5")
    page.get_by_label("Strength").fill("2")
    page.get_by_label("Floor").press("Home")
    page.get_by_label("Both").check()
    page.get_by_text("Sampling").click()
    page.get_by_label("Tokens at most").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Seed").press("Tab")
    sent: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda request: (
            sent.append(json.loads(request.post_data or "null"))
            if request.method == "POST"
            else None
        ),
    )
    ask(page, "What is a black hole?")
    answer(page, "steered")
    plain, steered = sorted(sent, key=lambda body: "strength" in body)
    common = {
        "model": "scripted",
        "messages": [{"role": "user", "content": "What is a black hole?"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 11,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert plain == {**common, "preference": ""}
    assert steered == {
        **common,
        "preference": [
            {"text": "Talk like a pirate.", "weight": 1},
            {"text": "Be brief.", "weight": -0.5},
        ],
        "strength": 2,
        "floor": 0,
        "placement": "both",
        "trace": True,
    }
    assert "Cut off at the token limit." in page.locator("section.plain").inner_text()


def test_stop_keeps_what_there_is(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "word " * 600)) as (url, _):
        page = visit(url)
        page.get_by_text("Sampling").click()
        page.get_by_label("Tokens at most").fill("4000")
        page.get_by_label("Tokens at most").press("Tab")
        prefer(page, "Be brief.")
        ask(page, "Go on.")
        answer(page, "steered", "streaming")
        page.get_by_role("button", name="Stop").click()
        stopped = answer(page, "steered", "stopped"), answer(page, "plain", "stopped")
        assert 0 < len(stopped[0]) < 2990
        assert 0 < len(stopped[1]) < 2990
        assert page.get_by_text("Stopped.").count() == 2
        ask(page, "And now?")  # the server has gone on to the next
        answer(page, "steered", "streaming")
        page.keyboard.press("Escape")
        answer(page, "steered", "stopped")


def test_regenerate_edit_and_the_answer_that_is_kept(visit: Open, url: str) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    ask(page, "First?")
    answer(page, "steered")
    settled(page)
    page.get_by_role("button", name="Regenerate").click()
    settled(page)
    assert answer(page, "steered") == SHORT
    page.locator("section.plain").get_by_role("button", name="Go on with this").click()

    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Second?")
    roles = [
        (message["role"], message["content"]) for message in sent.value.post_data_json["messages"]
    ]
    assert roles == [("user", "First?"), ("assistant", LONG), ("user", "Second?")]
    settled(page)
    assert page.locator("article.turn").count() == 2

    page.get_by_role("button", name="Edit the question").first.click()
    page.get_by_label("The question", exact=True).fill("Changed?")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask again").click()
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Changed?"}]
    settled(page)
    assert page.locator("article.turn").count() == 1
    assert page.locator(".question").inner_text() == "Changed?"


def test_copy(visit: Open, url: str) -> None:
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "What is a black hole?")
    answer(page, "plain")
    page.get_by_role("button", name="Copy the plain answer").click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == LONG


def test_tokens_tell_why_by_keyboard_and_mouse(visit: Open, url: str) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    ask(page, "What is a black hole?")
    answer(page, "steered")
    settled(page)
    tokens = page.locator("section.steered .token[tabindex]")
    assert page.locator('section.steered .token[tabindex="0"]').count() == 1  # one tab stop
    parting = page.locator("section.steered .token.part")
    assert parting.inner_text() == "h"  # the base row goes on with "black"
    assert "other" in (parting.get_attribute("class") or "")

    parting.hover()
    tip = page.get_by_role("tooltip")
    assert "“h” raised by" in tip.inner_text()
    assert "The unsteered model would have said “b”." in tip.inner_text()
    rows = [row.inner_text().split("\t") for row in tip.locator("tbody tr").all()]
    assert [row[0] for row in rows] == ["With the preference", "Without it", "After steering"]
    assert [float(row[1].replace("−", "-")) for row in rows] == pytest.approx([0, -20, 0], abs=0.01)
    page.mouse.move(0, 0)
    expect(tip).to_have_count(0)

    tokens.first.focus()
    assert "The unsteered model would have said the same." in tip.inner_text()
    page.keyboard.press("ArrowRight")  # over the space, which nobody could see focused
    expect(parting).to_be_focused()
    assert parting.get_attribute("aria-describedby") == tip.get_attribute("id")
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)
