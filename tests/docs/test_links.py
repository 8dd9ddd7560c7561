"""Every link of the pages and of the root's files leads to a file, and to a section of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, ROOT_FILES, anchors, links


@pytest.mark.parametrize(
    "path", [*ROOT_FILES, *PAGES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target}: there is no such file"
        assert file.is_relative_to(ROOT), f"{target}: leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{target}: the page has no such section"


def test_a_wrong_section_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two_three`\n\n[a](x.md) [b](#one-two_three)\n\n```sh\n# none\n[c](y.md)\n```\n"
    )
    assert links(page) == ["x.md", "#one-two_three"]
    assert anchors(page) == {"one-two_three"}
