"""The documentation site: Markdown pages and the API reference out of docstrings.

`make docs` builds it with warnings as errors. Search works without a server, and no page loads a
font or a script from elsewhere.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import amulet

# Before autodoc does: pydantic can't build some classes once Sphinx has changed `typing`.
for module in (
    "amulet_integrations.langchain.middleware",
    "amulet_integrations.llama_index",
    "amulet.serve.app",
    "amulet.evaluation.tune",
):
    importlib.import_module(module)

project = "Amulet"
copyright = "the Amulet authors, Apache-2.0"
version = release = amulet.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# `python no-run` is `python` to the highlighter; the tests read the second word.
myst_fence_as_directive: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"Amulet {version}"
html_static_path = ["static"]
html_css_files = ["amulet.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# Files of the repository's root that have a page here; links to them work in both places.
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
DOCS = Path(__file__).parent
PENDING = ("notebook", "playground", "scaling", "vllm")  # pages that another change may bring
_NAME = re.compile(r"(?<![`\w:])`([^`\n]+)`(?!`)(\w?)")
_LINK = re.compile(r"(\]\()((?:\.\./)*)([\w./-]+\.(?:md|py))(#[\w-]+)?\)")


def _read(app: Any, name: str, source: list[str]) -> None:
    """Turn links that fit the repository's folders into links that fit the site."""
    source[0] = site_links(source[0])
    for page in PENDING:
        if not (DOCS / f"{page}.md").exists():
            source[0] = source[0].replace(f"\n{page}\n", "\n")


def site_links(text: str) -> str:
    """Return Markdown whose links to the root's files lead to their pages."""

    def moved(link: re.Match[str]) -> str:
        opening, up, path, anchor = link[1], link[2], link[3], link[4] or ""
        if up and path in ROOT_PAGES:
            depth = up.count("../") - 1
            return f"{opening}{'../' * depth}{ROOT_PAGES[path]}{anchor})"
        return link[0]

    return _LINK.sub(moved, text)


def _names(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make `name` in docstrings what reStructuredText takes for code, whatever letter follows."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = _NAME.sub(
                lambda found: f"``{found[1]}``" + (f"\\ {found[2]}" if found[2] else ""), line
            )


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _names)
