"""The documentation site: Markdown pages and the API reference out of docstrings.

`make docs` builds it with warnings as errors. Search works without a server, and no page loads a
font or a script from elsewhere.
"""

from __future__ import annotations

import importlib
import inspect
import re
from importlib.util import find_spec
from typing import Any

from docutils import nodes
from pydantic import BaseModel

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
if find_spec("sphinx_copybutton"):  # a site built without it lacks the buttons and nothing else
    extensions.append("sphinx_copybutton")
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# `python no-run` is `python` to the highlighter; the tests read the second word.
myst_fence_as_directive: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "model_config",
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

smartquotes = False  # commands and JSON stand in the text too, and are copied
pygments_dark_style = "github-dark"  # the theme's own underlines names, as if they were links

html_theme = "furo"
html_title = f"Amulet {version}"
html_static_path = ["static"]
html_css_files = ["amulet.css"]
html_favicon = "../amulet/playground/web/src/icon.svg"
html_show_sourcelink = False
html_copy_source = False
html_use_index = html_domain_indices = False  # nothing leads there; the search finds more
html_theme_options = {"navigation_with_keys": True}

# Files of the repository's root that have a page here; links to them work in both places.
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "BENCHMARKS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
_NAME = re.compile(r"(?<![`\w:])`([^`\n]+)`(?!`)(\w?)")
_TYPES = re.compile(r"Annotated|~typing|<factory>")
_SECTION = re.compile(r"[A-Z][a-z]+:")
_ENTRY = re.compile(r"    (\w+(?:, \w+)+): (.*)")
_LINK = re.compile(r"(\]\()((?:\.\./)*)([\w./-]+\.(?:md|py))(#[\w-]+)?\)")


def _read(app: Any, name: str, source: list[str]) -> None:
    """Turn links that fit the repository's folders into links that fit the site."""
    source[0] = site_links(source[0])


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


def _blocks(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon: indented blocks are literal, and `a, b: text` are two attributes."""
    out: list[str] = []
    section = before = ""
    for line in lines:
        if line and not line[0].isspace():
            section = line if _SECTION.fullmatch(line) else ""
        elif line and not section and not out[-1] and not before[0].isspace():
            out += ["::", ""]
        entry = _ENTRY.fullmatch(line) if section == "Attributes:" else None
        out += [f"    {each}: {entry[2]}" for each in entry[1].split(", ")] if entry else [line]
        before = line or before
    lines[:] = out


def _signature(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Write a pydantic model's fields without their types, which fill half a page, and its own."""
    if what != "class" or not issubclass(thing, BaseModel) or not _TYPES.search(signature):
        return None
    own = {
        field
        for base in thing.__mro__
        if base.__module__.startswith("amulet")
        for field in inspect.get_annotations(base)
    }
    shown = [
        field if what.is_required() else f"{field}={what.get_default(call_default_factory=True)!r}"
        for field, what in thing.model_fields.items()
        if field in own
    ]
    return f"(*, {', '.join(shown)})", returned


def _dashes(app: Any, doctree: nodes.document, page: str) -> None:
    """Set the dash between a parameter and its text, which `smartquotes` would have set."""
    for text in list(doctree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _blocks, priority=400)
    app.connect("autodoc-process-docstring", _names)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-resolved", _dashes)
