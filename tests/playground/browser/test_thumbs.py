"""Thumbs: given, changed and taken back; exported as `amulet tune --thumbs` reads them; deleted."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from amulet.evaluation.thumbs import read_thumbs
from tests.playground.browser.conftest import COLUMNS, Open, answer, ask, prefer, serving
from tests.serve.conftest import saying

ANSWERS = {"Be brief": "Short.", "": "A long answer."}


def stored(file: Path) -> list[dict[str, Any]]:
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT user, id, thumb FROM thumbs ORDER BY id").fetchall()
    return [{"user": user, "id": id_, **json.loads(thumb)} for user, id_, thumb in rows]


def thumb(page: Page, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def said(page: Page, question: str) -> None:
    ask(page, question)
    for column in COLUMNS:
        answer(page, column)
    page.get_by_role("button", name="Regenerate").wait_for()


def test_thumbs_from_the_page_to_a_fit(visit: Open, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "thumbs.sqlite"
    with serving(saying(tokenizer, ANSWERS), thumbs=file) as (url, _):
        page = visit(url)
        panel = page.get_by_role("group", name="Your thumbs")
        expect(panel.get_by_role("status")).to_have_text("0 pairs")
        expect(panel.get_by_role("button", name="Export pairs")).to_be_disabled()
        ask(page, "Without a preference?")
        answer(page, "plain")
        page.get_by_role("button", name="Regenerate").wait_for()
        expect(page.get_by_role("button", name="Like")).to_have_count(0)  # it would fit nothing
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("button", name="New conversation").click()
        prefer(page, "Be brief.")
        said(page, "What is tea?")
        disliked = thumb(page, "Dislike the prompt-only answer")
        for pressed in ("true", "false"):  # given and taken back
            disliked.click()
            expect(disliked).to_have_attribute("aria-pressed", pressed)
            page.wait_for_load_state("networkidle")
        thumb(page, "Like the steered answer").click()
        expect(thumb(page, "Like the steered answer")).to_have_attribute("aria-pressed", "true")
        page.wait_for_load_state("networkidle")
        thumb(page, "Like the plain answer").click()
        thumb(page, "Dislike the plain answer").click()  # changed
        expect(thumb(page, "Like the plain answer")).to_have_attribute("aria-pressed", "false")
        expect(panel.get_by_role("status")).to_have_text("1 pair")

        plain, steered = stored(file)
        assert plain["user"] == steered["user"]
        assert len(plain["user"]) == 32
        assert (plain["thumb"], plain["answer"]) == ("down", "A long answer.")
        assert (steered["thumb"], steered["answer"]) == ("up", "Short.")
        assert plain["preferences"] == steered["preferences"] == ["Be brief."]
        assert plain["settings"] == {"preference": "", "max_tokens": 256}
        assert steered["settings"] == {
            "preference": "Be brief.",
            "strength": 0.35,
            "floor": 0.1,
            "placement": "user",
            "focus": 1,
            "loop_guard": 4,
            "max_tokens": 256,
        }

        with page.expect_download() as download:
            panel.get_by_role("button", name="Export pairs").click()
        assert download.value.suggested_filename == "thumbs.jsonl"
        export = tmp_path / "thumbs.jsonl"
        download.value.save_as(export)
        (pair,) = read_thumbs(export)
        assert (pair.a, pair.b, pair.chosen) == ("Short.", "A long answer.", "a")
        assert (pair.focus, pair.loop_guard) == (1, 4)
        assert [dict(message) for message in pair.messages] == [
            {"role": "user", "content": "What is tea?"}
        ]
        assert read_thumbs(file, plain["user"]) == [pair]

        page.wait_for_timeout(2000)  # the browser's copy is written 0.4 s after a change
        page.reload()  # they are shown again
        expect(thumb(page, "Like the steered answer")).to_have_attribute("aria-pressed", "true")
        expect(panel.get_by_role("status")).to_have_text("1 pair")

        other = visit(url)  # another browser has another name, and sees nothing of these
        prefer(other, "Be brief.")
        said(other, "What is tea?")
        thumb(other, "Dislike the steered answer").click()
        # Shown once it is stored; the panel says "0 pairs" before that, too.
        expect(thumb(other, "Dislike the steered answer")).to_have_attribute("aria-pressed", "true")
        expect(other.get_by_role("group", name="Your thumbs").get_by_role("status")).to_have_text(
            "0 pairs"
        )
        assert len({one["user"] for one in stored(file)}) == 2

        panel.get_by_role("button", name="Delete all thumbs").click()
        panel.get_by_role("button", name="Really delete all?").click()
        expect(panel.get_by_role("status")).to_have_text("0 pairs")
        expect(thumb(page, "Like the steered answer")).to_have_attribute("aria-pressed", "false")
        assert [one["thumb"] for one in stored(file)] == ["down"]  # the other's


def test_a_thumb_that_is_not_kept_is_not_shown(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, ANSWERS), thumbs=":memory:") as (url, _):
        page = visit(url, expected="500")
        prefer(page, "Be brief.")
        said(page, "What is tea?")
        page.route("**/v1/thumbs/**", lambda route: route.fulfill(status=500, body="{}"))
        thumb(page, "Like the steered answer").click()
        expect(page.get_by_role("status").last).to_contain_text("status 500")
        expect(thumb(page, "Like the steered answer")).to_have_attribute("aria-pressed", "false")


def test_a_server_that_keeps_no_thumbs(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, ANSWERS)) as (url, _):
        page = visit(url)
        prefer(page, "Be brief.")
        said(page, "What is tea?")
        expect(page.get_by_role("button", name="Like")).to_have_count(0)
        expect(page.get_by_role("group", name="Your thumbs")).to_have_count(0)
