"""The pages of the documentation as the tests read them: code blocks, headings, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOT_FILES = sorted(ROOT.glob("*.md"))

_FENCE = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)", re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: the first word behind the fence.
        mark: the words after it, such as "no-run".
        line: the line of the fence, from 1.
    """

    path: Path
    language: str
    mark: str
    text: str
    line: int

    @property
    def name(self) -> str:
        """Where it stands, for messages."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    def compiled(self) -> object:
        """Compile it so that tracebacks name the page's own lines."""
        lines = "\n" * self.line + self.text
        return compile(lines, str(self.path), "exec", dont_inherit=True)


def blocks(path: Path, *languages: str) -> list[Block]:
    """Return the fenced blocks of a page in these languages, in their order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        language, _, mark = fence[2].strip().partition(" ")
        if language in languages:
            line = text.count("\n", 0, fence.start()) + 1
            found.append(Block(path, language, mark.strip(), fence[3], line))
    return found


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def links(path: Path) -> list[str]:
    """Return the targets of a page's links and pictures that lead to files or sections."""
    targets = _LINK.findall(_CODE_SPAN.sub("", prose(path)))
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def anchors(path: Path) -> set[str]:
    """Return the names under which a page's headings can be linked to, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(path)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        name = slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found
