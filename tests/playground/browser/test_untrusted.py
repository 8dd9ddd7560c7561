"""An answer is untrusted: what it says of HTML, scripts and addresses does nothing."""

from __future__ import annotations

from typing import Any

from tests.playground.browser.conftest import Open, answer, ask, prefer, serving
from tests.serve.conftest import saying

HOSTILE = """\
# <img src=x onerror="window.hacked=1">

<script>window.hacked = 1</script>

<iframe src="javascript:parent.hacked=1"></iframe> <svg onload=window.hacked=1>

<a href="javascript:window.hacked=1" onclick="window.hacked=1">raw</a>
[one](javascript:window.hacked=1) [two](data:text/html,<script>parent.hacked=1</script>)
[three](https://example.org/safe) ![four](https://example.org/pixel.png)

<style>body{display:none}</style><form action="/v1/chat/completions"><input name=q></form>

`<b>code</b>` **bold *and* more** &lt;i&gt; \\*not\\*

| a | b |
|---|---|
| <b>1</b> | `2` |
"""


def test_html_and_scripts_do_nothing(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, HOSTILE)) as (url, _):
        page = visit(url)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.get_by_text("Sampling").click()
        page.get_by_label("Max tokens per answer").fill("2000")
        page.get_by_label("Max tokens per answer").press("Tab")
        prefer(page, "<img src=x onerror=window.hacked=1>")
        ask(page, "<script>window.hacked=1</script>")
        said = answer(page, "plain"), answer(page, "steered")
        for text in said:  # it is shown as what it is
            assert "<script>window.hacked = 1</script>" in text
            assert '<img src=x onerror="window.hacked=1">' in text
            assert "bold and more" in text
            assert "<i> *not*" in text
        for column in ("plain", "steered"):
            box = page.locator(f"section.{column} .text")
            for tag in ("script", "iframe", "svg", "img", "style", "form", "input", "b"):
                assert box.locator(tag).count() == 0, tag
            assert [link.get_attribute("href") for link in box.locator("a").all()] == [
                None,
                None,
                "https://example.org/safe",
            ]
            assert box.locator("a").last.get_attribute("rel") == "noopener noreferrer nofollow"
            assert box.locator("strong em").inner_text() == "and"
            assert box.locator("td code").inner_text() == "2"
            box.get_by_text("one", exact=True).click()
        page.reload()
        answer(page, "steered")
        assert page.evaluate("window.hacked") is None
        assert all(address.startswith(url) for address in asked)


def test_tokens_keep_their_place_in_markdown(visit: Open, tokenizer: Any) -> None:
    text = "> a **bold** \\* &amp; `c d`\n> two\n\n```py\nx = 1\n```\n\n- one\n- two"
    with serving(saying(tokenizer, text)) as (url, _):
        page = visit(url)
        prefer(page, "Be brief.")
        ask(page, "Write.")
        answer(page, "steered")
        # Each token is a byte: what a span shows is the very character at its number.
        spans = page.locator("section.steered .token").evaluate_all(
            "spans => spans.map(span => [Number(span.dataset.token), span.textContent])"
        )
        shown = "".join(character for _, character in spans)
        assert shown == "abold*&cdtwox=1onetwo"
        wrong = [(n, c) for n, c in spans if text[n] != c]
        assert wrong == []
        assert [n for n, _ in spans] == sorted(n for n, _ in spans)
        assert [n for n, c in spans if c == "x"] == [text.index("x = 1")]


def test_the_policy_stops_what_would_get_in(visit: Open, tokenizer: Any) -> None:
    with serving(saying(tokenizer, "Fine.")) as (url, _):
        page = visit(url, expected="Content Security Policy|TrustedScript")
        page.locator(".server.ready").wait_for()
        blocked = page.evaluate(
            """() => {
                const script = document.createElement("script");
                try { script.text = "window.hacked = 1"; document.body.append(script); }
                catch (error) { return error.name; }
                return String(window.hacked);
            }"""
        )
        assert blocked == "TypeError"  # trusted types: no text becomes a script
        refused = page.evaluate("fetch('https://example.org/').then(() => 'sent', e => e.name)")
        assert refused == "TypeError"
