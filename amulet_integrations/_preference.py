"""The rule of precedence for preferences: call > conversation > user > constructor.

Each setting (the preference and those of `Steering`) is looked up separately, from the nearest
level outwards. None means "not set" and inherits; a preference of "" (or an empty list) is set and
means off, so a nested call can turn off an inherited preference.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, TypeAlias, TypedDict, get_args

from pydantic import BaseModel, field_serializer

from amulet.aliases import close, meant
from amulet.errors import RequestError
from amulet.preference import Placement, PreferenceLike, Steering, normal_preferences

Source: TypeAlias = Literal["call", "conversation", "user", "constructor"]
SOURCES: tuple[Source, ...] = get_args(Source)
SETTINGS = ("preference", *Steering.model_fields)
# What may be between a user's program and a call of a model: this, the frameworks, what runs them.
BETWEEN = {
    *("amulet", "amulet_integrations", "langchain", "langchain_classic", "langchain_core"),
    *("langgraph", "langsmith", "llama_index", "llama_index_instrumentation", "workflows"),
    *("asyncio", "concurrent", "contextlib", "functools", "pydantic", "tenacity", "threading"),
}


class Push(TypedDict, total=False):
    """How to steer; see `Steering`. None inherits."""

    strength: float | None
    floor: float | None
    placement: Placement | None
    focus: float | None
    loop_guard: int | None


class Chosen(BaseModel, frozen=True):
    """What is in force for one answer.

    Frameworks write the arguments of a call to traces and use them as keys of caches, so its
    `repr` and its JSON have the digest of the preference in the place of the text.

    Attributes:
        preference: as plain JSON (see `plain`); None if not set, "" if off.
        strength, floor, placement, focus, loop_guard: None takes the model's default.
        source: the level that set the preference; None if no level did.
    """

    preference: Any = None
    strength: float | None = None
    floor: float | None = None
    placement: Placement | None = None
    focus: float | None = None
    loop_guard: int | None = None
    source: Source | None = None

    @field_serializer("preference")
    def _without_text(self, preference: Any) -> str | None:
        return digest(preference)

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """Return what `repr` shows."""
        return self.model_dump(warnings=False).items()

    def as_dict(self) -> dict[str, Any]:
        """The settings that were given, by name, without their source."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in settings.items() if value is not None}


def choose(
    *,
    call: Mapping[str, Any] | None = None,
    conversation: Mapping[str, Any] | None = None,
    user: Mapping[str, Any] | None = None,
    constructor: Mapping[str, Any] | None = None,
) -> Chosen:
    """Return the settings in force, each from the nearest level that sets it.

    Args:
        call: settings of the call itself, or bound to the model.
        conversation: settings of the thread or session.
        user: settings of the user, for all threads.
        constructor: settings of the model object.
            Only the keys in `SETTINGS` of each mapping are read; None inherits.

    >>> choose(call={"strength": 1.0}, user={"preference": "Be brief."}).source
    'user'
    >>> choose(call={"preference": ""}, user={"preference": "Be brief."}).preference
    ''
    """
    levels: dict[Source, Mapping[str, Any]] = {
        "call": call or {},
        "conversation": conversation or {},
        "user": user or {},
        "constructor": constructor or {},
    }
    found: dict[str, Any] = {}
    for source in SOURCES:
        for name in SETTINGS:
            value = levels[source].get(name)
            if value is None or name in found:
                continue
            found[name] = plain(value) if name == "preference" else value
            if name == "preference":
                found["source"] = source
    return Chosen.model_construct(**found)  # `Request` checks the values


def digest(preference: PreferenceLike) -> str | None:
    """Return a name for a preference that doesn't show its text; None and "" (off) stay themselves.

    Equal preferences have equal digests, so traces can be grouped by them. It is a plain SHA-256:
    whoever guesses a text can check the guess.
    """
    settled = plain(preference)
    if settled is None:
        return None
    wishes = [wish.model_dump() for wish in normal_preferences(settled)]
    hashed = sha256(json.dumps(wishes, sort_keys=True).encode()).hexdigest()
    return f"sha256:{hashed[:32]}" if wishes else ""


def without_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the preference's digest in the place of its text."""
    found = dict(settings)
    if "preference" in found:
        found["preference"] = digest(found["preference"])
    return found


def meant_by(key: object, names: Sequence[str] = SETTINGS) -> str | None:
    """Return the setting, or other name, that a key names or probably means, or None.

    Other components' keys are in the same place, so words such as "reference" and "length" must not
    match: a typo seldom changes the first letter.
    """
    if not isinstance(key, str):
        return None
    name = key.lower().replace("-", "_").removeprefix("amulet_")
    found = name if name in names else meant(name, names) or close(name, names)
    return found if found and found[0] == name[0] else None


def warn_of_typos(keys: Iterable[object], where: str, names: Sequence[str] = SETTINGS) -> None:
    """Warn about unused keys that probably mean a setting, or another of `names`.

    >>> warn_of_typos(["preferance"], "configurable")  # UserWarning: did you mean 'preference'?
    """
    for key in keys:
        if key not in names and (found := meant_by(key, names)) is not None:
            warn(f"{where}: the key {key!r} is not used; did you mean {found!r}?")


def warn(message: str) -> None:
    """Warn at the line of the user's own program that made the call.

    In another thread than the user's there may be no such line; then it is the thread's first.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in BETWEEN:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def plain(preference: PreferenceLike) -> str | list[str | dict[str, Any]] | None:
    """Return a preference as plain JSON: text, or a list of texts and dicts; "" if it is off.

    Equal preferences then have equal JSON, which matters for cache keys. None stays None.

    Raises:
        RequestError: it is not text, a `Preference`, its dict, or a list of them.
    """
    if preference is None or isinstance(preference, str):
        return preference
    if isinstance(preference, Iterator):
        raise RequestError(
            f"a preference of type {type(preference).__name__} can be read only once, and settings "
            "hold for many calls: give a list."
        )
    return [
        wish.text if wish.weight == 1.0 else wish.model_dump()
        for wish in normal_preferences(preference)
    ] or ""
