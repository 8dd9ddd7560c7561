"""Asking and seeing: columns, their histories, the slider, stop, regenerate, edit, copy, tokens."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from amulet import Amulet, Steering
from tests.models import ScriptedModel
from tests.playground.browser.conftest import COLUMNS, Open, answer, ask, posted, prefer, serving
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


def answers(page: Page) -> list[str]:
    """The last turn's answers, in the order of the columns."""
    return [answer(page, column) for column in COLUMNS]


def histories(page: Page, question: str) -> list[list[str]]:
    """Ask, and return what each column sent of the conversation before the question."""
    sent = posted(page)
    ask(page, question)
    answers(page)
    settled(page)
    sent.sort(key=lambda body: ("strength" in body, "trace" in body))
    for body in sent:
        assert body["messages"][-1] == {"role": "user", "content": question}
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    return [[message["content"] for message in body["messages"][:-1]] for body in sent]


def test_a_first_answer(visit: Open, url: str) -> None:
    page = visit(url)
    ask(page, "What is a black hole?")
    assert answer(page, "plain") == LONG
    expect(page.locator("section.steered")).to_have_count(0)
    figures = page.locator("section.plain .figures").inner_text()
    assert f"Tokens\n{len(LONG) + 1}" in figures  # bytes, and the end of turn
    assert "\ns" not in figures
    assert page.locator("section.plain .figures dd").nth(1).inner_text().endswith(" s")


def test_all_columns_are_asked_together(visit: Open, url: str) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    told: list[str] = []
    page.on("request", lambda request: told.append(request.method))
    page.on("requestfinished", lambda request: told.append("finished"))
    ask(page, "What is a black hole?")
    assert answers(page) == [LONG, SHORT, SHORT]
    assert told[:3] == ["POST"] * 3  # all are asked before the first has answered
    headers = page.locator("section.answer header").all_inner_texts()
    assert [header.split("\n")[-1] for header in headers] == [
        "No preference",
        "Preference in the prompt, no steering (strength 0)",
        "Be brief. (strength 0.35, floor 0.1, focus 1, loop guard 4)",
    ]
    settled(page)
    # This model does all that it is asked for, so steering adds nothing, and the page says so.
    same = page.get_by_text("The same text as with the preference in the prompt only.")
    assert same.count() == 1
    expect(page.locator("section.answer .part")).to_have_count(0)


def test_the_slider_changes_the_answer(visit: Open, url: str) -> None:
    page = visit(url)
    prefer(page, "Be brief.")
    ask(page, "What is a black hole?")
    assert answer(page, "steered") == SHORT
    settled(page)
    expect(page.get_by_text("The settings have changed")).to_have_count(0)
    slider = page.get_by_label("Strength", exact=True)
    number = page.get_by_label("Strength as a number")
    expect(number).to_have_value("0.35")  # the model's own, which the slider marks
    mark = page.locator(f"#{slider.get_attribute('list')} option")
    assert [one.get_attribute("value") for one in mark.all()] == ["0.35"]
    for key, value in (("Home", "0"), ("End", "2")):
        slider.press(key)
        expect(number).to_have_value(value)
    for typed, value in (("7", "7"), ("", "7"), ("-1", "-1")):  # more than the slider has
        number.fill(typed)
        number.press("Tab")
        expect(number).to_have_value(value)
    page.get_by_role("button", name="Answer again").click()  # -1: no preference at all
    page.locator("section.steered", has_text="nothing escapes").wait_for()
    assert answers(page) == [LONG, SHORT, LONG]
    expect(page.locator("section.steered header")).to_contain_text("strength −1")
    # The frame shows where the two answers that have the preference diverge.
    expect(page.locator("section.prompted .part")).to_have_text("hole")
    expect(page.locator("section.plain .part")).to_have_count(0)
    page.get_by_role("button", name="Reset to the model's defaults").click()
    expect(number).to_have_value("0.35")


def test_what_is_sent(visit: Open, url: str) -> None:
    page = visit(url)
    page.get_by_role("button", name="Pirate").click()
    prefer(page, "Be brief.")
    page.get_by_label("Steer away from: Be brief.").click()
    page.get_by_label("Weight of: Be brief.").fill("0.5")
    page.get_by_label("Strength", exact=True).fill("2")
    page.get_by_label("Floor", exact=True).press("Home")
    page.get_by_label("Focus", exact=True).fill("0.5")
    page.get_by_label("Loop guard as a number").fill("6.6")  # whole tokens
    page.get_by_label("Loop guard as a number").press("Tab")
    page.get_by_label("Both").check()
    page.get_by_text("Sampling").click()
    page.get_by_label("Max tokens per answer").fill("7")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Seed").press("Tab")
    sent = posted(page)
    ask(page, "What is a black hole?")
    answer(page, "steered")
    page.locator("section.prompted[data-state=done]").wait_for()
    plain, prompted, steered = sorted(sent, key=lambda body: body.get("strength", -1))
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
    wished = {
        **common,
        "preference": [
            {"text": "Talk like a pirate.", "weight": 1},
            {"text": "Be brief.", "weight": -0.5},
        ],
        "floor": 0,
        "placement": "both",
        "focus": 0.5,
        "loop_guard": 7,
    }
    assert prompted == {**wished, "strength": 0}
    assert steered == {**wished, "strength": 2, "trace": True}
    expect(page.locator("section.plain")).to_contain_text("Cut off at the token limit.")


def test_focus_and_loop_guard_are_the_models_own_until_they_are_changed(
    visit: Open, tokenizer: Any
) -> None:
    model = ScriptedModel(tokenizer, {"Be brief": SHORT, "": LONG})
    amulet = Amulet(model, tokenizer, steering=Steering(focus=0.5, loop_guard=6))
    with serving(amulet) as (url, _):
        page = visit(url)
        prefer(page, "Be brief.")
        names = {"Focus": "0.5", "Loop guard": "6"}
        numbers = {name: page.get_by_label(f"{name} as a number") for name in names}
        for name, own in names.items():
            expect(numbers[name]).to_have_value(own)
            slider = page.get_by_label(name, exact=True)
            mark = page.locator(f"#{slider.get_attribute('list')} option")
            expect(mark).to_have_attribute("value", own)
            hint = page.locator(f"#{slider.get_attribute('aria-describedby')}")
            expect(hint).to_contain_text("0 is off")
            assert len((hint.text_content() or "").split()) <= 25
        for name, typed, taken in (
            ("Focus", "99", "10"),
            ("Focus", "-1", "0"),
            ("Loop guard", "2000", "1000"),
            ("Loop guard", "2.6", "3"),
        ):
            numbers[name].fill(typed)
            numbers[name].press("Tab")
            expect(numbers[name]).to_have_value(taken)
        ask(page, "What is a black hole?")
        assert answer(page, "steered") == SHORT
        settled(page)
        header = page.locator("section.steered header")
        expect(header).to_contain_text("focus 0, loop guard 3)")
        page.get_by_role("button", name="The steered answer as code").click()
        for language in ("LangChain", "LlamaIndex", "Python", "curl"):
            page.get_by_role("tab", name=language).click()
            code = page.get_by_role("tabpanel").inner_text()
            lines = [line.strip().rstrip(",") for line in code.splitlines()]
            written = ('"focus": 0', '"loop_guard": 3') if language == "curl" else ()
            assert set(written or ("focus=0", "loop_guard=3")) <= set(lines), language
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Reset to the model's defaults").click()
        for name, own in names.items():
            expect(numbers[name]).to_have_value(own)
        page.get_by_text("The settings have changed").wait_for()


def test_stop_keeps_what_there_is(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "word " * 600)) as (url, _):
        page = visit(url)
        page.get_by_text("Sampling").click()
        page.get_by_label("Max tokens per answer").fill("4000")
        page.get_by_label("Max tokens per answer").press("Tab")
        prefer(page, "Be brief.")
        ask(page, "Go on.")
        answer(page, "steered", "streaming")
        page.get_by_role("button", name="Stop").click()
        for column in COLUMNS:
            assert 0 < len(answer(page, column, "stopped")) < 2990
        expect(page.get_by_text("Stopped.")).to_have_count(3)
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
    page.locator("section.plain").get_by_role("button", name="Continue from this answer").click()

    assert histories(page, "Second?") == [["First?", LONG]] * 3
    page.get_by_text("Continued from the plain answer above.").wait_for()
    expect(page.locator("article.turn")).to_have_count(2)
    # What the second turn was asked after can be changed no more.
    expect(page.get_by_role("button", name="Continue from this answer")).to_have_count(3)

    page.get_by_role("button", name="Edit the question").first.click()
    page.get_by_label("The question", exact=True).fill("Changed?")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Ask again").click()
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "Changed?"}]
    settled(page)
    expect(page.locator("article.turn")).to_have_count(1)
    expect(page.locator(".question")).to_have_text("Changed?")


def test_each_column_has_its_own_history(visit: Open, url: str) -> None:
    page = visit(url)
    ask(page, "Zero?")  # without a preference: one answer, which is everybody's
    answer(page, "plain")
    settled(page)
    prefer(page, "Be brief.")
    number = page.get_by_label("Strength as a number")
    number.fill("-1")  # so that all three columns are told apart: the steered answer is long
    number.press("Tab")
    zero = ["Zero?", LONG]
    assert histories(page, "First?") == [zero] * 3
    assert answers(page) == [LONG, SHORT, LONG]
    first = [[*zero, "First?", said] for said in (LONG, SHORT, LONG)]
    assert histories(page, "Second?") == first
    page.get_by_text("Each answer continues from the one above it in its own column.").wait_for()
    prompted = page.locator("article.turn").last.locator("section.prompted")
    button = prompted.get_by_role("button", name="Continue from this answer")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    third = [[*earlier, "Second?", SHORT] for earlier in first]
    assert histories(page, "Third?") == third
    page.get_by_text("Continued from the prompt-only answer above.").wait_for()
    page.get_by_role("button", name="The steered answer as code").last.click()
    code = page.get_by_role("tabpanel").inner_text()
    assert code.count(SHORT) == 1  # its own history, but for the answer that was chosen
    assert code.count(LONG) == 2


def test_regenerate_is_in_view(visit: Open, url: str) -> None:
    for width, height in ((1280, 620), (390, 700)):
        page = visit(url, viewport={"width": width, "height": height})
        if width < 1200:
            page.get_by_role("button", name="Preference and steering").click()
        prefer(page, "Be brief.")
        page.keyboard.press("Escape")
        for question in ("First?", "Second?"):
            ask(page, question)
            answers(page)
            button = page.get_by_role("button", name="Regenerate")
            expect(button).to_be_in_viewport(ratio=1)
            box, bottom = button.bounding_box(), page.locator(".bottom").bounding_box()
            assert box is not None
            assert bottom is not None
            assert box["y"] + box["height"] <= bottom["y"]
        page.get_by_label("Your question").fill("line\n" * 5)  # the box above gets smaller
        expect(button).to_be_in_viewport(ratio=1)
        page.close()


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
    expect(page.locator('section.steered .token[tabindex="0"]')).to_have_count(1)  # one tab stop
    parting = page.locator("section.steered .token.other").first
    expect(parting).to_have_text("h")  # the base row goes on with "black"
    parting.hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text("“h” raised by")
    expect(tip).to_contain_text("The unsteered model would have said “b”.")
    rows = [row.inner_text().split("\t") for row in tip.locator("tbody tr").all()]
    assert [row[0] for row in rows] == ["With the preference", "Without it", "After steering"]
    assert [float(row[1].replace("−", "-")) for row in rows] == pytest.approx([0, -20, 0], abs=0.01)
    page.mouse.move(0, 0)
    expect(tip).to_have_count(0)

    tokens.first.focus()
    expect(tip).to_contain_text("The unsteered model would have said the same.")
    page.keyboard.press("ArrowRight")  # over the space, which nobody could see focused
    expect(parting).to_be_focused()
    assert parting.get_attribute("aria-describedby") == tip.get_attribute("id")
    page.keyboard.press("End")
    expect(tokens.last).to_be_focused()
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)
