"""Checks what stands in a model's place, and names the call that takes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from amulet.backends.llamacpp.model import GGUFModel
from amulet.errors import MOST_SHOWN, RequestError, shown
from amulet.models.gguf import is_gguf
from amulet.preference import Steering
from amulet.request import Request

HUB = "https://huggingface.co/"
_EXAMPLE = "Qwen/Qwen3-0.6B"
MOST_NAME = 255  # bytes of a file's name: the system's own error would repeat a longer one


def call_for(name: str) -> str:
    """Return the call that makes an `Amulet` of a name.

    >>> call_for("http://127.0.0.1:8000")
    "Amulet.connect('http://127.0.0.1:8000')"
    """
    if name == "embedded":
        return "Amulet.embedded()"
    if name.startswith(HUB):  # the address of a model's page
        name = "/".join(name.removeprefix(HUB).split("/")[:2])
    if len(name) > MOST_SHOWN:  # somebody's text, which no error repeats
        name = _EXAMPLE
    if name.startswith(("http://", "https://")):
        return f"Amulet.connect({name!r})"
    return f"Amulet.{'from_gguf' if is_gguf(name) else 'from_pretrained'}({name!r})"


def check_parts(model: Any, tokenizer: Any) -> None:
    """Check that these are a loaded model and its tokenizer or processor.

    Raises:
        RequestError: they are not.
    """
    if model is None:
        raise RequestError(
            "Amulet() has no model: expected Amulet(model, tokenizer), both loaded. Use "
            f"{call_for(_EXAMPLE)} for a model by name, or Amulet.embedded()."
        )
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        raise RequestError(
            f"Amulet({shown(name)}) has a name: expected a loaded model and its tokenizer. Use "
            f"{call_for(name)}."
        )
    if not is_model(model):
        raise RequestError(
            f"Amulet has a model of type {type(model).__name__}: expected a loaded causal language "
            f"model and its tokenizer. {_parts_of(model)}".rstrip()
        )
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        config = getattr(model, "config", None)  # a GGUF file's model has none
        name = os.fspath(tokenizer or getattr(config, "name_or_path", "") or _EXAMPLE)
        raise RequestError(
            f"Amulet has tokenizer={tokenizer!r}: expected the model's loaded tokenizer, such as "
            f"AutoTokenizer.from_pretrained({name!r}). {call_for(name)} loads both."
        )
    if not hasattr(tokenizer, "eos_token_id") and not hasattr(tokenizer, "image_processor"):
        raise RequestError(
            f"Amulet has a tokenizer of type {type(tokenizer).__name__}: expected one of "
            "Transformers, such as AutoTokenizer.from_pretrained(...), or the model's processor."
        )


def is_model(given: Any) -> bool:
    """Tell whether something is a loaded model: of Transformers, around one, or a GGUF file's."""
    return isinstance(given, GGUFModel) or hasattr(getattr(given, "config", None), "model_type")


def check_options(options: Iterable[str]) -> None:
    """Check that options for loading a model are not those of an answer.

    Raises:
        RequestError: one of them is; the message says where it is given.
    """
    for name in options:
        if name in Steering.model_fields:
            raise RequestError(
                f"{name}: no option for loading a model. Use steering=Steering({name}=...), or "
                f"give it with the call: chat(..., {name}=...)."
            )
        if name in Request.model_fields:
            raise RequestError(
                f"{name}: no option for loading a model. Give it with the call: "
                f"chat(..., {name}=...)."
            )


def checked_name(given: Any, where: str) -> str:
    """Return the name or path of a model that is to be loaded.

    Raises:
        RequestError: it is neither, or too long for one; `where` is the call that got it.
    """
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        if any(len(os.fsencode(part)) > MOST_NAME for part in name.split("/")):
            raise RequestError(
                f"{where} has a name of {len(name)} characters: expected a hub id such as "
                f"{_EXAMPLE!r}, a folder or a GGUF file. A preference belongs to a call, as in "
                'amulet.chat(messages, preference="...").'
            )
        return name
    use = "Use Amulet(model, tokenizer)." if is_model(given) else _parts_of(given)
    raise RequestError(
        f"{where} has a name of type {type(given).__name__}: expected a hub id such as "
        f"{_EXAMPLE!r}, a folder or a GGUF file. {use}".rstrip()
    )


def _parts_of(given: Any) -> str:
    """Return what to do with a pipeline or another object that holds both; "" for others."""
    holds_both = is_model(getattr(given, "model", None)) and hasattr(given, "tokenizer")
    return "Use Amulet(it.model, it.tokenizer)." if holds_both else ""
