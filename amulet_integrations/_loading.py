"""Loads the model of an integration's class; objects with the same model share its weights."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from amulet import Amulet
from amulet.errors import MOST_SHOWN, ModelError, RequestError, shown
from amulet.models.given import call_for, is_model

EMBEDDED = "SmolLM2-135M-Instruct"

LIVE = "live "  # prefix of a given object's name

_loaded: WeakValueDictionary[str, Amulet] = WeakValueDictionary()
_live: WeakValueDictionary[str, Amulet] = WeakValueDictionary()  # given objects, by a random name
_lock = threading.Lock()


def key(name: str, options: Mapping[str, Any]) -> str:
    """Return a key that distinguishes loaded models."""
    name = EMBEDDED if name == "embedded" else name
    return repr((name, sorted(options.items(), key=lambda item: item[0])))


def load(name: str, options: Mapping[str, Any]) -> Amulet:
    """Return the `Amulet` of a hub id, a folder or "embedded", loaded once per set of options."""
    with _lock:
        amulet = _loaded.get(key(name, options))
        if amulet is None:
            if name in (EMBEDDED, "embedded"):
                amulet = Amulet.embedded(**options)
            else:
                amulet = Amulet.from_pretrained(name, **options)
            _loaded[key(name, options)] = amulet
        return amulet


def name_live(amulet: Amulet) -> str | None:
    """Return a name by which this process finds a given object; None for one from `load`."""
    if amulet in _loaded.values():
        return None
    with _lock:
        known = next((name for name, live in _live.items() if live is amulet), None)
        name = known or f"{LIVE}{secrets.token_hex(8)}"
        _live[name] = amulet
    return name


def find_live(name: str, where: str) -> Amulet:
    """Return the object that `name_live` named.

    Raises:
        ModelError: it is not in this process.
    """
    if (amulet := _live.get(name)) is None:
        raise ModelError(
            f"This {where} comes from a checkpoint, and the Amulet that it had is not in this "
            "process: keep the chat model out of the state and pass it to the node, or create "
            "it with model='hub id or folder', which is loaded again."
        )
    return amulet


def named(unnamed: tuple[Any, ...], options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return a constructor's options, with the path of a model as text.

    Raises:
        RequestError: an option has no name, `model` is no name, or `amulet` is no `Amulet`.
    """
    where = kind.__name__
    if unnamed:
        raise RequestError(
            f"{where}({_shown(unnamed[0])}): expected every option by its name. "
            f"Use {_call(unnamed[0], kind)}."
        )
    model, amulet = options.get("model"), options.get("amulet")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str | None):
        raise RequestError(
            f"{where}(model={_shown(model)}): expected a hub id, a folder or a GGUF file. "
            f"Use {_call(model, kind)}."
        )
    restored = isinstance(amulet, str) and amulet.startswith(LIVE)
    if not isinstance(amulet, Amulet | None) and not restored:
        raise RequestError(
            f"{where}(amulet={_shown(amulet)}): expected an Amulet. Use {_call(amulet, kind)}."
        )
    return {**options, "model": model} if model is not None else dict(options)


def _call(given: Any, kind: type) -> str:
    """Return the call of a class that takes what stands in its model's place."""
    where = kind.__name__
    if isinstance(given, Amulet):
        return f"{where}(amulet=...)"
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        if call_for(name).startswith("Amulet.connect"):
            return f"{where}(amulet={call_for(name)})"
        if len(name) <= MOST_SHOWN:
            return f"{where}.embedded()" if name == "embedded" else f"{where}(model={name!r})"
    if is_model(given):
        return f"{where}(amulet=Amulet(model, tokenizer))"
    takes = next(name for name in ("from_pipeline", "from_huggingface") if hasattr(kind, name))
    if any(hasattr(given, name) for name in ("pipeline", "tokenizer", "_tokenizer", "llm")):
        return f"{where}.{takes}(...)"
    return f"{where}(model='hub id or folder')"


def _shown(given: Any) -> str:
    """Return a name as it was given, and of another object its kind: a model's repr is long."""
    return shown(given) if isinstance(given, str) else f"<{type(given).__name__}>"


def check_given(amulet: Amulet, model: str | None, options: Mapping[str, Any], where: str) -> None:
    """Check the options given with a loaded model.

    Raises:
        RequestError: it has another name, or options for loading are given.
    """
    if model not in (None, amulet.name):
        raise RequestError(
            f"{where}: model={model!r} and amulet= ({amulet.name!r}) are two models: give one."
        )
    if options:
        raise RequestError(
            f"{where}: {', '.join(options)}: the given amulet is loaded already; give them to "
            "Amulet.from_pretrained, or give model= instead of amulet=."
        )


def refuse_source(options: Mapping[str, Any], where: str) -> None:
    """Refuse a model in the options of a constructor that has its own.

    Raises:
        RequestError: `model` or `amulet` is among the options.
    """
    for name in ("model", "amulet"):
        if options.get(name) is not None:
            raise RequestError(f"{where} takes no {name}={shown(options[name])}: it has its own.")
