"""SmolLM2 behind the page: the code that it shows gives the same answers, and pictures of it.

`SCREENSHOTS=docs/images make test-browser` renews the pictures of the documentation.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from amulet import Amulet
from amulet.serve.store import MEMORY
from tests.playground.browser.conftest import (
    COLUMNS,
    Open,
    answer,
    ask,
    copied,
    run,
    serving,
    shown_code,
)

NAME = "SmolLM2-135M-Instruct"
WISH = "Explain it as to a child of six, with simple words."


@pytest.fixture(scope="module")
def amulet() -> Amulet:
    return Amulet.embedded()


@pytest.fixture(scope="module")
def url(amulet: Amulet) -> Iterator[str]:
    with serving(amulet, name=NAME, thumbs=MEMORY) as (url, _):
        yield url


def finished(page: Page) -> None:
    for column in COLUMNS:
        answer(page, column)
    page.get_by_role("button", name="Regenerate").wait_for()


def test_the_code_gives_the_same_answers(visit: Open, url: str, tmp_path: Path) -> None:
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="For a child").click()
    page.get_by_role("button", name="Formal").click()
    page.get_by_label("Steer away from: Write formally").click()
    page.get_by_label("Weight of: Write formally").fill("0.25")
    page.get_by_text("Sampling").click()
    page.get_by_label("Max tokens per answer").fill("24")
    page.get_by_label("Max tokens per answer").press("Tab")
    ask(page, "What's a \"black hole\"?\nIn Earth's neighbourhood \\ sky")
    finished(page)
    page.get_by_label("Temperature").fill("0.7")  # the second turn is drawn, with a seed
    page.get_by_label("Temperature").press("Tab")
    ask(page, "And why?")
    finished(page)

    for column in ("steered", "prompt-only", "plain"):
        said = copied(page, column)
        assert said
        # The options are written once for all three; for the plain answer one will do.
        for language in ("Python", "LangChain", "LlamaIndex")[: 3 if column == "steered" else 1]:
            assert run(shown_code(page, column, language)) == said, (column, language)
        shell = shown_code(page, column, "curl").replace("curl ", "curl --silent ", 1)
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == said, column


def pictures(otherwise: Path) -> Path:
    """Return the folder of the pictures."""
    return Path(os.environ.get("SCREENSHOTS") or otherwise)


@pytest.mark.parametrize(
    ("name", "scheme", "preset", "question", "width"),
    [
        ("playground-light", "light", "For a child", "What is a black hole?", 1280),
        ("playground-dark", "dark", "Poetic", "What is a black hole?", 1280),
        ("playground-phone", "light", "For a child", "What is a black hole?", 390),
    ],
)
def test_pictures(
    visit: Open,
    url: str,
    tmp_path: Path,
    name: str,
    scheme: str,
    preset: str,
    question: str,
    width: int,
) -> None:
    size = {"width": width, "height": 800}
    page = visit(url, color_scheme=scheme, viewport=size, reduced_motion="reduce")
    page.locator(".server.ready").wait_for()
    if width < 1200:
        page.get_by_role("button", name="Preference and steering").click()
    page.get_by_role("button", name=preset).click()
    page.get_by_text("Sampling").click()
    page.get_by_label("Max tokens per answer").fill("60")
    page.get_by_label("Max tokens per answer").press("Tab")
    page.get_by_text("Sampling").click()
    if width < 1200:
        page.keyboard.press("Escape")
    ask(page, question)
    finished(page)
    page.get_by_label("Answers", exact=True).evaluate("box => box.scrollTo(0, 0)")
    if width < 900:  # one below the other: the steered answer is the last
        page.locator("section.steered").evaluate("section => section.scrollIntoView()")
    else:
        page.locator(".right").evaluate("panel => panel.scrollTo(0, 0)")
        # A late token: the tooltip is below it, and covers no other.
        token = page.locator("section.steered .token.other").last
        token.hover()
        tip = page.get_by_role("tooltip").bounding_box()
        assert tip is not None
        assert tip["x"] <= token.evaluate("token => [...token.getClientRects()].at(-1).left") + 1
    picture = pictures(tmp_path) / f"{name}.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size < 300_000
    assert page.locator("section.steered .token.up3, section.steered .token.up4").count() > 0


def test_picture_of_a_notebook(browser: Browser, amulet: Amulet, tmp_path: Path) -> None:
    """The last line of a cell is shown as this HTML."""
    found = amulet.compare("What is a black hole?", WISH, max_new_tokens=60)
    page = browser.new_page(viewport={"width": 980, "height": 100})
    page.set_content(f'<body style="font: 15px sans-serif; margin: 20px">{found._repr_html_()}')
    picture = pictures(tmp_path) / "notebook.png"
    page.screenshot(path=picture, full_page=True)
    page.close()
    assert picture.stat().st_size < 200_000
    assert found.plain.text != found.steered.text
