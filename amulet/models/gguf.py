"""Finds and loads GGUF files: on disk, on the hub, or in Ollama's store.

Ollama stores each model as a manifest that lists blobs by their digest; one of them is the file.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from amulet.errors import ModelError

if TYPE_CHECKING:
    from amulet.backends.llamacpp.model import GGUFModel
    from amulet.backends.llamacpp.vocabulary import GGUFTokenizer

    Loaded: TypeAlias = tuple[GGUFModel, GGUFTokenizer]

SUFFIX = ".gguf"
SOON = 1.0  # seconds of loading before a progress bar appears
OLLAMA = "ollama:"
REGISTRY = "registry.ollama.ai"
MODEL_LAYER = "application/vnd.ollama.image.model"
ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[^:]+\.gguf)")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Tell whether a model's name can only mean a GGUF file."""
    return os.fspath(name).endswith(SUFFIX) or os.fspath(name).startswith(OLLAMA)


def load_gguf(source: str | os.PathLike[str], **options: Any) -> Loaded:
    """Return `(model, tokenizer)` of a GGUF file, with a progress bar for long loads.

    Args:
        source: see `find_gguf`.
        options: of `find_gguf` and `GGUFModel`.

    Raises:
        ModelError: there is no such file, or it is not a causal language model.
        MissingPackageError: llama-cpp-python is not installed.
    """
    from amulet.backends.llamacpp.model import GGUFModel
    from amulet.backends.llamacpp.vocabulary import GGUFTokenizer

    where = {key: options.pop(key) for key in ("revision", "token") if key in options}
    _translate(options)
    known = {"name", "gpu_layers", "threads", "context", "kv_type"}
    if unknown := sorted(options.keys() - known):
        raise ModelError(
            f"{os.fspath(source)}: {', '.join(unknown)}: not an option of GGUF files; expected "
            f"{', '.join(sorted(known))}, revision or token. Weights are used as saved, and "
            "gpu_layers puts layers on a GPU."
        )
    path, name = find_gguf(source, **where)
    with _progress(name) as tell:
        model = GGUFModel(path, **{"name": name, **options}, progress=tell)
    return model, GGUFTokenizer(model)


def _translate(options: dict[str, Any]) -> None:
    """Convert the general options: `device`, and a `dtype` that keeps the weights."""
    device, dtype = options.pop("device", None), options.pop("dtype", "auto")
    if dtype != "auto":
        raise ModelError(
            f"dtype={str(dtype)!r}: a GGUF file's weights are used as saved; leave it out, and "
            "use another file for another precision."
        )
    if device is not None and str(device) == "cpu":
        options.setdefault("gpu_layers", 0)
    elif device is not None and not supports_gpu():
        raise ModelError(
            f"device={str(device)!r}: this llama.cpp was built for the CPU only; leave it out, or "
            "build llama-cpp-python for the GPU (its README says how)."
        )


def supports_gpu() -> bool:
    """Tell whether llama.cpp was built for a GPU."""
    from amulet.backends.llamacpp.model import library

    return bool(library().llama_supports_gpu_offload())


def find_gguf(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, str]:
    """Return the path of a GGUF file and the model's name; downloads it if necessary.

    Args:
        source: a path; "owner/name:file.gguf" on the hub; or the name of a model that Ollama has,
            such as "llama3.2:1b" or "ollama:llama3.2:1b".
        revision, token: the hub's branch, tag or commit, and the access token.

    Raises:
        ModelError: it can't be found.
    """
    given = os.fspath(source)
    path = Path(given).expanduser()
    if path.is_file():
        return path, path.name.removesuffix(SUFFIX)
    if path.is_dir() and given.strip():
        files = ", ".join(sorted(file.name for file in path.glob(f"*{SUFFIX}"))) or "none"
        raise ModelError(f"{given} is a folder: give one of its .gguf files ({files}).")
    if hub := _HUB.fullmatch(given):
        return _downloaded(hub["repo"], hub["file"], revision, token), given.removesuffix(SUFFIX)
    if given.endswith(SUFFIX):
        raise ModelError(
            f"{given}: there is no such file. For a file on the hub, give the repository too: "
            '"owner/name:file.gguf".'
        )
    name = given.removeprefix(OLLAMA)
    return _in_ollama(name), name


def _downloaded(repo: str, file: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    names = [file]
    if part := _PART.search(file):  # llama.cpp finds the other parts next to the first
        stem, count = file[: part.start()], int(part[2])
        names = [f"{stem}-{i:05}-of-{count:05}{SUFFIX}" for i in range(1, count + 1)]
    try:
        paths = [hf_hub_download(repo, name, revision=revision, token=token) for name in names]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{repo}:{file} can't be downloaded. Check both names, the network (HF_HUB_OFFLINE "
            f"forbids it), and for a private or gated model pass token=. The hub's client said: "
            f"{said}"
        ) from error
    return Path(paths[0])


# ---- Ollama's store ----


def ollama_folders() -> list[Path]:
    """Return Ollama's possible model folders: the user's, and its service's on Linux."""
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    return [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")]


def ollama_names() -> list[str]:
    """Return the names of the models in the store, in Ollama's form."""
    names = []
    for folder in ollama_folders():
        manifests = folder / "manifests"
        for file in sorted(manifests.glob("*/*/*/*")):
            host, owner, name, tag = file.relative_to(manifests).parts
            shown = f"{name}:{tag}" if owner == "library" else f"{owner}/{name}:{tag}"
            names.append(shown if host == REGISTRY else f"{host}/{owner}/{name}:{tag}")
    return names


def _in_ollama(given: str) -> Path:
    name, _, tag = given.partition(":")
    parts = name.split("/")
    known = [REGISTRY, "library"]
    whole = [*known[: 3 - len(parts)], *parts, tag or "latest"]
    if len(whole) != 4 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in whole):
        raise ModelError(
            f'{given!r}: expected a .gguf file, "owner/name:file.gguf" on the hub, or the name of '
            'a model in Ollama, such as "llama3.2:1b".'
        )
    for folder in ollama_folders():
        manifest = folder.joinpath("manifests", *whole)
        if manifest.is_file():
            return _blob(folder, manifest, given)
    there = ", ".join(ollama_names()) or "none"
    raise ModelError(
        f"{given}: neither a file nor a model in Ollama's store (there: {there}). Get it with "
        f"`ollama pull {given}`, or set OLLAMA_MODELS to the folder of its models."
    )


def _blob(folder: Path, manifest: Path, given: str) -> Path:
    try:
        layers = {
            layer["mediaType"]: str(layer["digest"])
            for layer in json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{manifest} is not a manifest of Ollama: {error!r}.") from error
    if ADAPTER_LAYER in layers:
        raise ModelError(f"{given} is an adapter over another model, which can't be loaded here.")
    digest = layers.get(MODEL_LAYER, "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ModelError(f"{manifest} names no model file: it may be a cloud model.")
    path = folder / "blobs" / digest.replace(":", "-")
    if not path.is_file():
        raise ModelError(f"{given}: {path} is missing; get it again with `ollama pull {given}`.")
    return path


@contextmanager
def _progress(name: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar for a load of a second or more; yields `tell(share)`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(f"Loading {name}", total=1.0)
    begun = time.monotonic()

    def tell(share: float) -> None:
        bar.update(task, completed=share)
        if time.monotonic() - begun > SOON:
            bar.start()

    try:
        yield tell
    finally:
        bar.stop()
