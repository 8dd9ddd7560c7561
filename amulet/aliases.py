"""Finds the option meant by another library's name or by a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from amulet.errors import RequestError, shown

# Names of one option, ours first. `max_new_tokens` of a `Request` is `max_tokens` in a server's
# body and, better known, in the frameworks' models.
_SAME = (
    (
        *("max_tokens", "max_new_tokens", "max_completion_tokens", "max_output_tokens"),
        *("max_length", "num_predict", "n_predict", "num_output"),
    ),
    ("stop", "stop_sequences", "stop_strings", "stop_words"),
    ("seed", "random_seed", "rng_seed", "random_state"),
    ("repetition_penalty", "repeat_penalty"),
    ("temperature", "temp"),
    ("grammar", "response_format"),
    ("preference", "preferences"),
    ("user_id", "user"),
)


def meant(name: str, known: Collection[str]) -> str | None:
    """Return which of the known options another library calls by this name."""
    for names in _SAME:
        if name in names:
            return next((own for own in names if own in known), None)
    return None


def close(name: str, known: Collection[str]) -> str | None:
    """Return which of the known options a misspelt name comes close to."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return found[0] if found else None


def advice(name: str, known: Collection[str]) -> str:
    """Return what to do about an unknown option, as the end of a sentence."""
    if (called := meant(name, known)) is not None:
        return f"it is called {called} here"
    if (found := close(name, known)) is not None:
        return f"the closest one is {found}"
    return "check its spelling"


def refuse_unnamed(unnamed: Sequence[object], kind: str, example: str) -> None:
    """Raise `RequestError` if a constructor of `kind` got arguments without a name."""
    if unnamed:
        raise RequestError(
            f"{kind}({shown(unnamed[0])}): expected every option by its name, as in "
            f"{kind}({example})."
        )
