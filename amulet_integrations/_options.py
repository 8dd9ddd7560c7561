"""Options that nobody would read are refused, the same way by every integration."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from amulet.errors import RequestError


def refuse_unknown(
    options: Mapping[str, Any], known: Iterable[str], where: str, hints: Mapping[str, str]
) -> None:
    """Raise `RequestError` for the first option that nobody would read, naming the close match.

    Args:
        options: what was given, by name.
        known: the names that are read.
        where: who refuses, as the sentence begins.
        hints: what to do instead, for names that users of other models bring along.
    """
    names = list(known)
    for name in options:
        if name in names:
            continue
        close = difflib.get_close_matches(name, names, n=1)
        hint = hints.get(name) or (f"did you mean {close[0]}?" if close else "leave it out")
        raise RequestError(f"{where} does not know the option {name}={options[name]!r}: {hint}.")
