"""The page of errors lists messages that the code really has, and every kind of error."""

from __future__ import annotations

import ast
import re

import pytest

import amulet.errors
from amulet import AmuletError
from tests.docs.pages import DOCS, ROOT, anchors, prose

PAGE = DOCS / "troubleshooting.md"
SAYS_NOTHING = 8  # letters besides "…" below which a message could be any


def kinds() -> list[type[AmuletError]]:
    found = [kind for kind in vars(amulet.errors).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, AmuletError) and kind is not AmuletError]


def listed() -> list[str]:
    """Return the messages of the page: the code that a list's line begins with."""
    text = prose(PAGE).partition("## RequestError")[2]
    found = []
    for line in text.splitlines():
        if line.startswith("- `"):
            spans = re.findall(r"`` (.+?) ``|`([^`]+)`", line)
            first = spans[0][0] or spans[0][1]
            found.append(first)
            found += [a or b for a, b in spans[1:] if " and `" in line]
    return found


def spoken() -> list[str]:
    """Return every text in the source; what is filled in when it is raised is "…"."""
    found = []
    for package in ("amulet", "amulet_integrations"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


TEXT = "\n".join(text.replace("\n", " ") for text in spoken())


def pattern(message: str) -> str:
    return r"[^\n]*".join(re.escape(part) for part in message.split("…"))


@pytest.mark.parametrize("message", listed(), ids=lambda message: message[:50])
def test_the_code_has_this_message(message: str) -> None:
    if len(message.replace("…", "").strip(" :.")) >= SAYS_NOTHING or message.startswith("api_key"):
        assert re.search(pattern(message), TEXT), message
    else:
        pytest.fail(f"{message!r} says too little to be found in the source")


def test_every_kind_of_error_has_its_section() -> None:
    sections = anchors(PAGE)
    for kind in kinds():
        documentation, page, *section = kind.help_page.split(", ")
        assert documentation == "Amulet's documentation"
        assert PAGE.read_text(encoding="utf-8").startswith(f"# {page} ")
        assert section in ([kind.__name__], [])
        assert not section or section[0].lower() in sections, kind


def test_an_error_tells_its_page_beside_its_message() -> None:
    error = amulet.errors.PromptTooLongError("too long")
    assert str(error) == "too long"
    assert error.help_page == "Amulet's documentation, Troubleshooting, PromptTooLongError"
    assert error.__notes__ == [f"More: {error.help_page}"]


def test_an_invented_message_is_not_found() -> None:
    assert not re.search(pattern("The … has a message that nobody ever raises."), TEXT)
