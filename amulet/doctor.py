"""The checks of `amulet doctor`: versions, device, models and extras, each with its fix."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from amulet import __version__
from amulet.cache_folder import cache_folder
from amulet.errors import MissingPackageError, one_line
from amulet.models.embedded import HUB_NAME, INSTALL, PACKAGE

DISTRIBUTION = "amulet-integrations"
STARTED_WITH = ("torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was checked.
        state: "ok"; "note" for what is absent but not needed; "bad" for what Amulet needs.
        text: what was found.
        fix: the command or setting that fixes it, or "".
    """

    topic: str
    state: Literal["ok", "note", "bad"]
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """Run all checks; never raises, loads a model or opens a connection."""
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [
        Finding("amulet", "ok", __version__),
        Finding("Python", "ok", system),
        *_requirements(),
        _device(),
        _native(),
        *_embedded(),
        _gguf(),
        _hub(),
        *_extras(),
    ]


def _declared() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return []


def _problem(requirement: Requirement) -> str:
    """Return how a requirement is not met, or ""."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} {found} is installed, expected {requirement.specifier}"


def _requirements() -> list[Finding]:
    declared = [requirement for requirement in _declared() if requirement.marker is None]
    if not declared:
        return [
            Finding(
                "packages", "note", f"{DISTRIBUTION} itself is not installed", "pip install -e ."
            )
        ]
    findings = []
    for requirement in declared:
        problem = _problem(requirement)
        if problem:
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            findings.append(Finding(requirement.name, "bad", problem, fix))
        elif requirement.name in STARTED_WITH:
            version = metadata.version(requirement.name)
            findings.append(Finding(requirement.name, "ok", version))
    return findings


def _device() -> Finding:
    try:
        import torch

        from amulet.models.loading import default_device
    except (ImportError, OSError) as error:  # a broken install of torch raises either
        fix = "pip install --force-reinstall torch"
        return Finding("device", "bad", f"torch can't be imported: {error}", fix)
    device = default_device()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        triton = "yes" if find_spec("triton") else "no (attention over long texts is slower)"
        text = (
            f"cuda: {gpu.name}, {_size(gpu.total_memory)}, bfloat16: {bfloat16}, Triton: {triton}"
        )
    else:
        text = f"{device}, {threads}"
    return Finding("device", "ok", f"{text}; dtype auto means the dtype of the saved model")


def _native() -> Finding:
    try:
        from amulet.backends.transformers.cpu import native
    except (ImportError, OSError):  # caused by torch, which `_device` reports
        return Finding("C code", "note", "not checked: torch can't be imported")
    if native.library() is not None:
        text = "compiled for this processor: decode steps on the CPU run at memory speed"
        return Finding("C code", "ok", text)
    text = f"not in use ({native.reason()}); decode steps on the CPU are slower"
    return Finding("C code", "note", text)


def _embedded() -> list[Finding]:
    folder = cache_folder()
    copies = sorted(path.parent for path in folder.glob("smollm2-*[0-9]/model.safetensors"))
    findings = [
        Finding("embedded model", "ok", f"{copy} (float32, {_size(_folder_size(copy))})")
        for copy in copies
    ]
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        text = f"{PACKAGE} is not installed; {HUB_NAME} would be downloaded instead"
        return [*findings, Finding("embedded model", "note", text, INSTALL)]
    if copies:
        return findings
    room = shutil.disk_usage(_existing(folder)).free
    text = f"{PACKAGE} {version}; first use converts it into {folder} (20 s, 540 MB)"
    if room < 1_200_000_000:  # the copy, and temporary files during the conversion
        fix = "free some space, or set AMULET_CACHE to another folder"
        return [Finding("embedded model", "note", f"{text}; {_size(room)} are free there", fix)]
    return [Finding("embedded model", "ok", text)]


def _gguf() -> Finding:
    from amulet.backends.llamacpp.model import INSTALL as INSTALL_GGUF
    from amulet.backends.llamacpp.model import library
    from amulet.models.gguf import ollama_names

    try:
        lib = library()
    except MissingPackageError as error:
        return Finding("GGUF", "note", one_line(error), INSTALL_GGUF)
    processor = lib.llama_print_system_info().decode().partition(":")[2]
    flags = [part.split() for part in processor.split("|")]
    used = ", ".join(flag[0] for flag in flags if flag[-1:] == ["1"])
    device = "a GPU" if lib.llama_supports_gpu_offload() else "the CPU only"
    version = metadata.version("llama_cpp_python")
    count = len(ollama_names())
    text = f"llama-cpp-python {version}, built for {device} ({used}); {count} models in Ollama"
    return Finding("GGUF", "ok", text)


def _hub() -> Finding:
    from huggingface_hub import constants

    offline = " HF_HUB_OFFLINE is set: nothing is downloaded." if constants.HF_HUB_OFFLINE else ""
    folder = Path(constants.HF_HUB_CACHE)
    count = len(list(folder.glob("models--*")))
    return Finding("hub", "ok", f"{count} models in {folder}.{offline}")


def _extras() -> list[Finding]:
    """Return one finding per extra, from the package's metadata."""
    groups: dict[str, list[Requirement]] = {}
    for requirement in _declared():
        for extra in re.findall(r"""extra == ["']([\w-]+)["']""", str(requirement.marker)):
            groups.setdefault(extra, []).append(requirement)
    findings = []
    for extra, requirements in groups.items():
        if extra in ("all", "browser", "dev"):  # combinations of others, or for developing Amulet
            continue
        # An extra may consist of another: the page's is the server's.
        own = [groups[name] for r in requirements if r.name == DISTRIBUTION for name in r.extras]
        requirements = [*chain(*own), *(r for r in requirements if r.name != DISTRIBUTION)]
        problems = [problem for r in requirements if (problem := _problem(r))]
        if problems:
            fix = f"pip install '{DISTRIBUTION}[{extra}]'"
            findings.append(Finding(f"extra {extra}", "note", "; ".join(problems), fix))
        else:
            found = ", ".join(f"{r.name} {metadata.version(r.name)}" for r in requirements)
            findings.append(Finding(f"extra {extra}", "ok", found))
    return findings


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
