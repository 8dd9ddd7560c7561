"""What a visit leaves: conversations after a reload; and a server that goes away and comes back."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect

from tests.playground.browser.conftest import Open, answer, ask, prefer, serving
from tests.serve.conftest import saying

ANSWERS = {"Be brief": "Short.", "Be rude": "No.", "": "A long answer to the question."}


def test_a_reload_keeps_conversations_and_their_preferences(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, ANSWERS)) as (url, _):
        page = visit(url, viewport={"width": 1680, "height": 800})
        prefer(page, "Be brief.")
        page.get_by_label("Floor", exact=True).press("Home")
        ask(page, "The first one?")
        answer(page, "steered")

        page.get_by_role("button", name="New conversation").click()
        expect(page.get_by_label("Preferences in force")).to_have_count(0)  # each has its own
        prefer(page, "Be rude.")
        page.get_by_label("Steer away from: Be rude.").click()
        page.get_by_label("Strength", exact=True).press("End")
        ask(page, "The second one?")
        answer(page, "steered")
        coloured = page.locator("section.steered .token").count()
        page.get_by_role("button", name="Regenerate").wait_for()

        page.reload()
        expect(page.locator(".question")).to_have_text("The second one?")
        assert answer(page, "plain") == "A long answer to the question."
        assert coloured > 0
        expect(page.locator("section.steered .token")).to_have_count(coloured)
        expect(page.get_by_label("Preferences in force")).to_contain_text("Away from: Be rude.")
        expect(page.get_by_label("Strength as a number")).to_have_value("2")

        names = page.locator("nav li .open")
        listed = ["The second one?not: Be rude.", "The first one?Be brief."]
        expect(names).to_have_text(listed)
        names.nth(1).click()
        expect(page.locator("section.steered .text")).to_have_text("Short.")
        expect(page.get_by_label("Preferences in force")).to_contain_text("Be brief.")
        expect(page.get_by_label("Floor as a number")).to_have_value("0")

        page.get_by_role("button", name="Delete: The first one?").click()
        page.get_by_role("button", name="Really delete: The first one?").click()
        page.reload()
        expect(names).to_have_text(listed[:1])


def test_a_conversation_of_an_older_page(visit: Open, tokenizer: Any) -> None:
    """It has no focus and no loop guard: the defaults stand in, in the panel and in the code."""
    with serving(saying(tokenizer, ANSWERS)) as (url, _):
        page = visit(url)
        prefer(page, "Be brief.")
        ask(page, "The first one?")
        answer(page, "steered")
        page.get_by_role("button", name="Regenerate").wait_for()
        page.wait_for_timeout(1500)  # until the browser's copy is written
        page.evaluate(
            """() => new Promise((done, failed) => {
                const open = indexedDB.open("keyval-store");
                open.onsuccess = () => {
                    const change = open.result.transaction("keyval", "readwrite");
                    const all = change.objectStore("keyval").openCursor();
                    all.onerror = failed;
                    all.onsuccess = () => {
                        const cursor = all.result;
                        if (!cursor) return done();
                        const kept = cursor.value;
                        for (const { settings } of [kept, ...kept.turns]) {
                            delete settings.focus;
                            delete settings.loopGuard;
                        }
                        cursor.update(kept).onsuccess = () => cursor.continue();
                    };
                };
            })"""
        )
        page.reload()
        assert answer(page, "steered") == "Short."
        expect(page.get_by_label("Focus as a number")).to_have_value("1")
        expect(page.get_by_label("Loop guard as a number")).to_have_value("4")
        expect(page.get_by_text("The settings have changed")).to_have_count(0)
        page.get_by_role("button", name="The steered answer as code").click()
        expect(page.get_by_role("tabpanel")).to_contain_text("loop_guard=4,")


def test_an_answer_that_was_cut_by_a_reload(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "word " * 600)) as (url, _):
        page = visit(url)
        page.get_by_text("Sampling").click()
        page.get_by_label("Max tokens per answer").fill("4000")
        page.get_by_label("Max tokens per answer").press("Tab")
        ask(page, "Go on.")
        answer(page, "plain", "streaming")
        page.wait_for_timeout(600)  # it is kept now and then while it is written
        page.reload()
        assert answer(page, "plain", "stopped").startswith("word")
        ask(page, "Once more.")  # nothing is in the way of another question
        answer(page, "plain", "streaming")
        page.get_by_role("button", name="Stop").click()
        answer(page, "plain", "stopped")


def test_the_server_goes_away_and_comes_back(visit: Open, tokenizer: Any) -> None:
    amulet = saying(tokenizer, ANSWERS)
    with serving(amulet) as (url, port):
        page = visit(url, expected="ERR_")
        prefer(page, "Be brief.")
        ask(page, "Are you there?")
        answer(page, "steered")
        page.get_by_role("button", name="Regenerate").wait_for()
    # It has gone. The page still thinks that it is there, and finds out by asking.
    ask(page, "And now?")
    answer(page, "steered", "failed")
    page.get_by_text("The server can't be reached. The page tries again").wait_for()
    page.get_by_label("Your question").fill("A draft")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    with serving(amulet, port):
        expect(page.get_by_text("The server can't be reached. The page tries")).to_have_count(0)
        expect(page.get_by_label("Your question")).to_have_value("A draft")
        page.get_by_role("button", name="Regenerate").click()
        assert answer(page, "steered") == "Short."
        assert answer(page, "steered", place=0) == "Short."


def test_a_server_that_stops_in_the_middle(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "word " * 600)) as (url, _):
        page = visit(url, expected="ERR_")
        page.get_by_text("Sampling").click()
        page.get_by_label("Max tokens per answer").fill("4000")
        page.get_by_label("Max tokens per answer").press("Tab")
        ask(page, "Go on.")
        answer(page, "plain", "streaming")
    assert answer(page, "plain", "failed").startswith("word")  # what has come stays
    assert page.locator("section.plain .error").inner_text() != ""


def test_a_model_that_is_still_being_loaded(visit: Open, tokenizer: Any) -> None:
    import threading

    loaded = threading.Event()

    def load() -> Any:
        loaded.wait(60)
        return saying(tokenizer, ANSWERS)

    with serving(load, name=None) as (url, _):  # type: ignore[arg-type]
        page = visit(url, expected="503")
        page.get_by_text("The model is being loaded").wait_for()
        loaded.set()
        page.locator(".server.ready").wait_for()
        ask(page, "Ready?")
        assert answer(page, "plain") == ANSWERS[""]


def test_a_server_that_wants_a_key(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, ANSWERS), api_keys=["secret"]) as (url, _):
        page = visit(url, expected="401")
        page.get_by_label("This server asks for an API key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        ask(page, "Ready?")
        assert answer(page, "plain") == ANSWERS[""]
        page.get_by_role("button", name="The plain answer as code").click()
        code = page.get_by_role("tabpanel").inner_text()
        assert 'api_key=os.environ["AMULET_API_KEY"]' in code
        assert "secret" not in code
