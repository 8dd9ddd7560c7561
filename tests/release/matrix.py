"""Tests with the oldest and newest supported LangChain, LlamaIndex and Transformers.

    python -m tests.release.matrix [ROW ...] [--keep FOLDER] [--python PYTHON] [-- TESTS ...]

Rows: `oldest` and `newest` take all frameworks at once, and are what runs when none is named;
`transformers-oldest`, `langchain-oldest` and `llama-index-oldest` take one at its oldest and the
others at their newest. The oldest releases are the lower bounds of pyproject.toml, so a bound that
isn't true fails here. Each row gets an environment of its own; torch is shared where it can be.
`--python python3.10` makes it with another interpreter. What stands behind `--` is given to pytest
instead of `TESTS`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

from tests.release.environments import ROOT, Environment, install_models, make, report

FRAMEWORKS = {
    "transformers": ("transformers",),
    "langchain": ("langchain-core", "langchain", "langgraph"),
    "llama-index": ("llama-index-core",),
}
ROWS = ("oldest", "newest", *(f"{name}-oldest" for name in FRAMEWORKS))

TOOLS = (
    "pytest>=8", "pytest-asyncio>=1", "pytest-socket>=0.7", "pytest-timeout>=2", "hypothesis>=6",
    "langchain-tests>=1,<2", "langchain-classic>=1,<2", "langchain-text-splitters>=1",
    "langgraph-checkpoint-sqlite",
)  # fmt: skip
"""What the subset of tests needs besides the package; no lower bound that would lift the others."""

TESTS = (
    "tests/langchain",
    "tests/llama_index",
    "tests/integrations",
    "tests/decoding/test_engine.py",
    "tests/core/test_grammar.py",
    "tests/models/test_loading.py",
    "tests/core/test_model.py",
    "tests/prompting/test_prompts.py",
    "tests/output/test_detokenizer.py",
    "tests/tool_calls/test_dialects.py",
    "tests/oracles/test_decode.py",
)
"""What meets the frameworks; arithmetic and the command line don't change with them."""


NEWER = ("tests/prompting/test_prompts.py::test_sanitised_contents_equal_transformers",)
"""Left out: it compares with what Transformers has since 5.20 only, and the package doesn't use."""


def lower_bounds() -> dict[str, str]:
    """Return `name==version` of each framework's oldest release by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        listed += extra
    wanted = {package for packages in FRAMEWORKS.values() for package in packages}
    found = {}
    for requirement in map(Requirement, listed):
        if requirement.name in wanted:
            (bound,) = [part for part in requirement.specifier if part.operator == ">="]
            found[requirement.name] = f"{requirement.name}=={bound.version}"
    return found


def pins(row: str) -> list[str]:
    """Return what pip is told of the frameworks' versions in a row; the rest is the newest."""
    bounds = lower_bounds()
    if row == "oldest":
        return list(bounds.values())
    if row == "newest":
        return []
    return [bounds[package] for package in FRAMEWORKS[row.removesuffix("-oldest")]]


def environment_of(row: str, folder: Path, python: str = sys.executable) -> Environment:
    """Make a row's environment; this repository is installed in it as it stands."""
    environment = make(folder / row, python=python)
    extras = f"{ROOT}[grammar,langchain,llama-index]"
    environment.pip("install", "--quiet", *pins(row), *TOOLS, "-e", extras)
    install_models(environment)
    return environment


def versions(environment: Environment) -> str:
    """Return the frameworks' versions in an environment, in one line."""
    names = (name for group in FRAMEWORKS.values() for name in group)
    return environment.versions("torch", "tokenizers", *names)


def main() -> int:
    """Run the rows; return how many failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--keep", type=Path, help="a folder in which the environments stay")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the rows")
    words = sys.argv[1:]
    own = words.index("--") if "--" in words else len(words)
    arguments, tests = parser.parse_args(words[:own]), words[own + 1 :] or TESTS
    rows = arguments.rows or list(ROWS[:2])
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            started = time.perf_counter()
            environment = environment_of(row, arguments.keep or Path(folder), arguments.python)
            print(f"\n{row}: {versions(environment)}", flush=True)
            installed = time.perf_counter()
            # Old releases warn of newer packages under them; that is theirs to fix.
            options = ("-m", "pytest", "-q", "-o", "filterwarnings=default", "-m", "not slow")
            options += tuple(f"--deselect={test}" for test in NEWER)
            code = environment.watch(*options, *tests, cwd=ROOT)
            took = time.perf_counter() - installed
            print(f"{row}: installed in {installed - started:.0f} s, tested in {took:.0f} s")
            if code:
                failed.append(row)
    return report("rows", len(rows), failed)


if __name__ == "__main__":
    sys.exit(main())
