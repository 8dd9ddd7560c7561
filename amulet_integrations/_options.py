"""Refuses unknown options, the same way in every integration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from amulet.aliases import close, meant
from amulet.errors import RequestError


def refuse_unknown(
    options: Mapping[str, Any], known: Iterable[str], where: str, hints: Mapping[str, str]
) -> None:
    """Raise `RequestError` for the first unknown option, and suggest a close match.

    Args:
        options: the options given, by name.
        known: the names that are accepted.
        where: the start of the error message: the class that refuses.
        hints: what to use instead, for option names of other models.
    """
    names = list(known)
    for name in options:
        if name in names:
            continue
        if (hint := hints.get(name)) is None:
            called, similar = meant(name, names), close(name, names)
            hint = f"did you mean {similar}?" if similar else "leave it out"
            hint = f"use {called}" if called else hint
        end = "" if hint.endswith("?") else "."
        raise RequestError(
            f"{where} does not know the option {name}={options[name]!r}: {hint}{end}"
        )


def template_options(given: Any, enable_thinking: Any) -> dict[str, Any]:
    """Return the variables of a chat template, `enable_thinking` among them unless it is None.

    Raises:
        RequestError: `given` is not a dict, or `enable_thinking` is neither True nor False.
    """
    if not isinstance(given, Mapping):
        raise RequestError(f"template_options={given!r}: expected a dict.")
    if enable_thinking is None:
        return dict(given)
    if not isinstance(enable_thinking, bool):  # to a template, "no" would be true
        raise RequestError(f"enable_thinking={enable_thinking!r}: expected True or False.")
    return {**given, "enable_thinking": enable_thinking}


def one_name(options: Mapping[str, Any], alias: str, name: str) -> dict[str, Any]:
    """Return the options with `alias` called `name`.

    Raises:
        RequestError: both are given.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if alias in given and name in given:
        raise RequestError(f"{name} and {alias} are one option: give one of them.")
    if alias not in given:
        return {key: value for key, value in options.items() if key != alias}
    return {name if key == alias else key: options[key] for key in options if key != name}
