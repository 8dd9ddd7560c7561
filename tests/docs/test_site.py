"""`make docs`: the site builds without a warning, loads nothing from elsewhere, and is searched
without a server."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT

LOADS = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//"
    r"|<link\b(?![^>]*rel=\"(?:canonical|author)\")[^>]*\bhref=\"(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / ".doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists()


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not LOADS.search(page.read_text(encoding="utf-8")), page
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", text), style


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("sphinx_copybutton"), reason="the package is not installed")
def test_code_has_copy_buttons(site: Path) -> None:
    assert 'src="_static/copybutton.js' in (site / "quick-start.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_search_needs_no_server(site: Path) -> None:
    """The index is a script, which a page opened as a file may load; data by fetch it may not."""
    assert 'src="searchindex.js"' in (site / "search.html").read_text(encoding="utf-8")
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    for word in ("sycophanc", "outofmemoryerror", "guidance_scal", "placement"):
        assert word in index.lower(), word


@pytest.mark.slow
def test_the_reference_has_the_docstrings(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in ("amulet.Amulet.chat", "amulet.Request", "amulet.AmuletError"):
        assert f'id="{name}"' in text
    assert "tokens of the preferred prompt" in text  # of Usage's docstring


def test_what_is_loaded_from_elsewhere_is_found() -> None:
    assert LOADS.search('<script async src="https://cdn.example/x.js">')
    assert LOADS.search('<link rel="stylesheet" href="//fonts.example/css">')
    assert not LOADS.search('<a href="https://arxiv.org"> <img src="images/x.svg">')
