"""What the wheel contains, and that it works in fresh environments; `make test-dist` runs it.

It is not named test_*, because it takes minutes and needs package indexes: `make test` is offline.
"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from amulet import __version__
from tests.release import journey
from tests.release.environments import (
    ROOT,
    Environment,
    install_models,
    layered,
    make,
    newest_wheel,
)

SMOKE = Path(__file__).parent / "smoke"
NOT_TRIED = {
    "all": "the newcomer's journey installs it",
    "browser": "`make test-browser` runs in this repository's own environment",
    "dev": "it is what this repository's own environment has",
    "docs": "`make docs` runs in this repository's own environment",
    "otel": "one package of the interface; `tests/output/test_telemetry.py` runs with the SDK",
    "vllm": "needs vLLM's own torch; `tests/vllm` runs where it is installed",
}
"""Extras without a smoke test, and why."""

pytestmark = [pytest.mark.timeout(0), pytest.mark.enable_socket]


@pytest.fixture(scope="session")
def wheel() -> Path:
    return newest_wheel()


@pytest.fixture(scope="session")
def names(wheel: Path) -> set[str]:
    """The paths of all files in the wheel."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def described(wheel: Path) -> Message:
    """The wheel's metadata."""
    folder = f"amulet_integrations-{__version__}.dist-info"
    return message_from_string(zipfile.ZipFile(wheel).read(f"{folder}/METADATA").decode("utf-8"))


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel, no extra, and the small models."""
    environment = make(tmp_path_factory.mktemp("bare") / "venv")
    environment.pip("install", "--quiet", str(wheel))
    install_models(environment)
    return environment


@pytest.fixture(scope="session")
def with_extra(
    bare: Environment, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Environment]:
    """An environment per extra, over the bare one, made when first asked for."""

    class Extras(dict[str, Environment]):
        def __missing__(self, extra: str) -> Environment:
            environment = layered(tmp_path_factory.mktemp(extra) / "venv", bare)
            environment.pip("install", "--quiet", f"{wheel}[{extra}]")
            # pip found the package below; its command must run with this interpreter.
            environment.pip("install", "--quiet", "--no-deps", "--ignore-installed", str(wheel))
            self[extra] = environment
            return environment

    return Extras()


def repository_files() -> set[str]:
    """The files of both packages that git knows or would know."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate",
         "amulet", "amulet_integrations"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    return {name for name in listed if (ROOT / name).exists()}


def program(name: str) -> tuple[str, str]:
    """Return what an interpreter is given to run a smoke test; isolated, so that a file named as
    its extra does not hide the package of that name."""
    return "-I", str(SMOKE / f"{name}.py")


def test_the_wheel_is_the_packages_and_nothing_else(names: set[str]) -> None:
    inside = {name for name in names if ".dist-info/" not in name}
    missing = repository_files() - inside
    front_end = "amulet/playground/web/"  # its source; what is built of it is data
    assert sorted(name for name in missing if not name.startswith(front_end)) == []
    assert [
        name
        for name in sorted(inside)
        if not name.startswith(("amulet/", "amulet_integrations/"))
        or {"tests", "shared", "node_modules", "__pycache__", ".venv"} & set(Path(name).parts)
        or name.endswith((".pyc", ".safetensors", ".gguf"))
    ] == []


@pytest.mark.parametrize(
    "name",
    [
        "amulet/py.typed",
        "amulet_integrations/py.typed",
        "amulet/evaluation/facts.json",
        "amulet/backends/transformers/cpu/native/attention.c",
        "amulet/backends/transformers/cpu/native/attention.h",
        "amulet/backends/transformers/cpu/native/common.h",
        "amulet/backends/transformers/cpu/native/layer.c",
        "amulet/backends/transformers/cpu/native/pages.c",
        "amulet/backends/transformers/cpu/native/pages.h",
        "amulet/backends/transformers/cpu/native/prefill.c",
        "amulet/backends/transformers/cpu/native/products.c",
        "amulet/backends/transformers/cpu/native/products.h",
        "amulet/backends/transformers/cpu/native/rowwise.c",
        "amulet/backends/transformers/cpu/native/rowwise.h",
        "amulet/backends/transformers/cpu/native/threads.c",
        "amulet/backends/transformers/cpu/native/threads.h",
        "amulet/backends/transformers/cpu/native/tiles.h",
        "amulet/evaluation/templates/report.html.j2",
        "amulet/playground/static/index.html",
    ],
)
def test_data_that_the_code_reads_is_inside(names: set[str], name: str) -> None:
    assert name in names


def test_licence_command_and_description_are_inside(names: set[str], described: Message) -> None:
    folder = f"amulet_integrations-{__version__}.dist-info"
    assert f"{folder}/licenses/LICENSE" in names
    assert f"{folder}/entry_points.txt" in names
    assert described["Version"] == __version__
    assert described["License-Expression"] == "Apache-2.0"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert str(described.get_payload()).strip() == readme.strip()


def test_nothing_of_this_machine_is_inside(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    telling = [str(ROOT).encode(), str(Path.home()).encode() + b"/"]
    assert [
        name for name in archive.namelist() if any(path in archive.read(name) for path in telling)
    ] == []


def test_every_requirement_has_a_lower_bound(described: Message) -> None:
    requirements = map(Requirement, described.get_all("Requires-Dist", []))
    assert [
        str(requirement)
        for requirement in requirements
        if requirement.name != "amulet-integrations"
        and not any(part.operator in (">=", "==", "~=") for part in requirement.specifier)
    ] == []


def test_the_sdist_has_what_the_wheel_has_and_what_the_readme_links_to(
    wheel: Path, names: set[str]
) -> None:
    (sdist,) = wheel.parent.glob(f"amulet_integrations-{__version__}.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if ".dist-info/" not in name} <= packed
    assert {"README.md", "LICENSE", "pyproject.toml"} <= packed
    links = re.findall(r"\]\(([\w./-]+)", (ROOT / "README.md").read_text("utf-8"))
    assert {link for link in links if not link.startswith("http")} <= packed
    assert "amulet/playground/web/package.json" in packed
    assert not any(name.startswith((".venv", "shared", "docs/_build")) for name in packed)
    assert not any("node_modules" in name for name in packed)


def test_every_extra_has_a_smoke_test(described: Message) -> None:
    tried = {path.stem for path in SMOKE.glob("*.py")} - {"bare"}
    extras = set(described.get_all("Provides-Extra", []))
    assert sorted(extras - tried - set(NOT_TRIED)) == []
    assert sorted(tried - extras) == []


def test_the_quick_start_runs_without_any_extra(bare: Environment) -> None:
    print(bare.run(*program("bare")).stdout)


@pytest.mark.parametrize("extra", sorted({p.stem for p in SMOKE.glob("*.py")} - {"bare", "remote"}))
def test_an_extra_is_enough_for_its_part(with_extra: dict[str, Environment], extra: str) -> None:
    print(with_extra[extra].run(*program(extra)).stdout)


def test_the_extra_remote_talks_to_the_extra_serve(with_extra: dict[str, Environment]) -> None:
    client = (str(with_extra["remote"].python), *program("remote"))
    print(with_extra["serve"].run(*program("serve"), *client).stdout)


def test_a_newcomer_gets_there() -> None:
    assert journey.main(newest_wheel()) < journey.LIMIT
