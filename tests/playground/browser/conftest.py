"""A server with the page in a thread, and a real Chromium that looks at it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from amulet import Amulet
from amulet.playground import page as playground
from amulet.serve.app import create_app
from tests.serve.conftest import listening

TIMEOUT = 60_000  # milliseconds; a busy machine is slow, and nothing here measures time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.allow_hosts(["127.0.0.1"]))


@contextlib.contextmanager
def serving(amulet: Amulet, port: int = 0, **options: Any) -> Iterator[tuple[str, int]]:
    """Serve a model with the page; give the page's address and the port."""
    app = create_app(amulet, **{"name": "scripted", **options})
    with listening(
        app, keep_alive=True, around=playground.Page, port=port, drain_seconds=1, patience=30
    ) as (url, _):
        yield f"{url}/", int(url.rpartition(":")[2])


# Of this package: Playwright's event loop runs in the main thread until its end, and the tests of
# other packages need their own there.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "There is no chromium: `make test-browser` installs it."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            # Chromium's sandbox wants a user who is not root; the pages here are our own.
            args=["--no-sandbox"],
        )
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open an address in a fresh browser profile. What the page logs as an error fails the test.

    `expected` is a pattern of what it may log.
    """
    contexts: list[Any] = []
    wrong: list[str] = []

    def visit(url: str, *, expected: str = "^$", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        expect.set_options(timeout=TIMEOUT)
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()

        def told(message: Any) -> None:
            if message.type == "error" and not re.search(expected, message.text):
                wrong.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


COLUMNS = ("plain", "prompted", "steered")


def ask(page: Page, question: str) -> None:
    """Send a question and return; the answers are still to come."""
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Send").click()


def prefer(page: Page, wish: str) -> None:
    """Add a preference in own words."""
    page.get_by_label("Your own preference").fill(wish)
    page.get_by_role("button", name="Add", exact=True).click()


def answer(page: Page, column: str, state: str = "done", place: int = -1) -> str:
    """Return an answer's text once it has come to a state; by default the last turn's."""
    turns = page.locator("article.turn")
    turn = turns.last if place == -1 else turns.nth(place)
    section = turn.locator(f"section.{column}[data-state={state}]")
    section.wait_for()
    return section.locator(".text").inner_text()


def posted(page: Page) -> list[Any]:
    """Return a list of the bodies that the page posts from now on."""
    bodies: list[Any] = []

    def note(request: Any) -> None:
        if request.method == "POST":
            bodies.append(json.loads(request.post_data or "null"))

    page.on("request", note)
    return bodies


def run(code: str) -> str:
    """Run Python as a user would, and return what it prints."""

    def execute() -> str:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, "<playground>", "exec"), {"__name__": "__main__"})
        return said.getvalue().removesuffix("\n")

    with ThreadPoolExecutor(1) as pool:  # not where the browser's event loop runs
        return pool.submit(execute).result()


def shown_code(page: Page, column: str, language: str) -> str:
    """Return what "As code" shows of a column's last answer."""
    page.get_by_role("button", name=f"The {column} answer as code").last.click()
    page.get_by_role("tab", name=language).click()
    code = page.get_by_role("tabpanel").locator("code").text_content() or ""
    page.get_by_role("button", name="Close").click()
    return code


def copied(page: Page, column: str) -> str:
    """Return a column's last answer from the clipboard, which the page must be permitted to use."""
    page.get_by_role("button", name=f"Copy the {column} answer").last.click()
    page.get_by_text("Copied", exact=True).wait_for()
    page.get_by_text("Copied", exact=True).wait_for(state="detached")
    return str(page.evaluate("navigator.clipboard.readText()"))
