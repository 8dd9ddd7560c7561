"""What must agree before a release: the version, the changelog, the bounds, the workflows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from amulet import __version__
from tests.release.clients import CLIENTS, SCRIPTS, script_of
from tests.release.environments import ROOT
from tests.release.matrix import FRAMEWORKS, ROWS, lower_bounds, pins

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))


def commands(path: Path) -> list[str]:
    """The commands of all steps of a workflow."""
    jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def whole_links() -> str:
    """The command by which a release makes README's links whole."""
    called = commands(ROOT / ".github" / "workflows" / "release.yml")
    (command,) = [command for command in called if command.startswith("sed ")]
    return command


def test_the_version_is_a_version_and_the_newest_of_the_changelog() -> None:
    assert str(Version(__version__)) == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = next(re.finditer(r"^## \[(\d\S*)\] - (\S+)$", changelog, re.MULTILINE))
    assert newest[1] == __version__
    assert re.fullmatch(r"Unreleased|\d{4}-\d\d-\d\d", newest[2])


def test_the_oldest_frameworks_are_the_lower_bounds() -> None:
    wanted = {package for packages in FRAMEWORKS.values() for package in packages}
    bounds = lower_bounds()
    assert set(bounds) == wanted
    for name, pin in bounds.items():
        assert re.fullmatch(re.escape(name) + r"==\d+(\.\d+)*", pin)
    assert pins("newest") == []
    assert len(pins("oldest")) == len(wanted)
    assert pins("transformers-oldest") == [bounds["transformers"]]


def test_what_is_installed_here_is_in_the_ranges() -> None:
    for requirement in map(Requirement, metadata.requires("amulet-integrations") or ()):
        if requirement.name in lower_bounds():
            assert requirement.specifier.contains(metadata.version(requirement.name))


def test_contributing_explains_every_target() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    explained = re.findall(r"^\| `make ([a-z-]+)` \|", contributing, re.MULTILINE)
    assert sorted(explained) == sorted(make_targets() - {"help", "install"})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_the_makes_targets_that_there_are(path: Path) -> None:
    called = commands(path)
    assert called
    for command in called:
        if command.startswith("make "):
            words = re.sub(r"\w+=.*", "", command).split()[1:]
            assert words
            assert set(words) <= make_targets(), command
        else:
            assert command.startswith("test ") or command == whole_links(), command


def test_a_hosted_ci_runs_what_the_local_one_runs_and_every_further_check() -> None:
    commanded = commands(ROOT / ".github" / "workflows" / "ci.yml")
    called = " ".join(c for c in commanded if c.startswith("make ")).split()
    (local,) = re.findall(r"^make (.*)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert {*local.split(), "docs", "test-dist", "matrix"} <= set(called)


def test_a_release_has_no_link_that_pypi_could_not_follow(tmp_path: Path) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    told = {
        "GITHUB_SERVER_URL": "https://host",
        "GITHUB_REPOSITORY": "owner/name",
        "GITHUB_REF_NAME": "v1",
    }
    subprocess.run(["bash", "-c", whole_links()], cwd=tmp_path, env=os.environ | told, check=True)
    links = re.findall(r"\]\(([^)]*)\)", (tmp_path / "README.md").read_text("utf-8"))
    assert "https://host/owner/name/blob/v1/docs/images/steered.svg?raw=true" in links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_matrix_of_the_workflow_has_every_row() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["frameworks"]["strategy"]["matrix"]["row"] == list(ROWS)


def test_every_client_has_a_script_and_a_row_in_the_docs() -> None:
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-z-]+) [\d.]+ \|", page, re.MULTILINE)
    installed = [re.sub(r"\[.*", "", packages[0]) for packages in CLIENTS.values()]
    assert rows == installed
    scripts = {path.name for path in SCRIPTS.glob("*.py")}
    assert scripts == {script_of(client).name for client in CLIENTS}


def test_the_workflows_try_the_pythons_that_the_pinned_versions_run_on() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    tried = set(workflow["jobs"]["check"]["strategy"]["matrix"]["python"])
    classifiers = metadata.metadata("amulet-integrations").get_all("Classifier") or []
    declared = {c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)}
    assert declared - tried == {"3.10"}  # constraints.txt's versions need 3.11; see the matrix
