"""`Preference`, what a user wants from an answer, and `Steering`, how strongly it acts."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from amulet.aliases import advice, refuse_unnamed
from amulet.errors import RequestError, shown
from amulet.game import game_gain

Placement: TypeAlias = Literal["system", "user", "both"]
PLACEMENTS: tuple[Placement, ...] = ("system", "user", "both")

Strength = Annotated[float, Field(ge=-100.0, le=1000.0, allow_inf_nan=False)]
Floor = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Focus = Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)]
LoopGuard = Annotated[int, Field(ge=0, le=1000)]


class Preference(BaseModel):
    """What a user wants of an answer, in words, and its weight.

    Args:
        text: what the person wants, such as "Answer in one short sentence."
        weight: its share of the push, -10 to 10. A negative weight steers away from the text.

    With strength g a preference of weight w enters as `w·(1 + g)·(p − r)`. Weights that sum to
    more than 1 are scaled down to it: two plain texts push half as hard each, not twice as hard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, text: str, weight: float = 1.0, **unknown: Any) -> None:
        try:
            super().__init__(text=text, weight=weight, **unknown)
        except ValidationError as error:
            raise RequestError(f"Preference: {describe(error, type(self).model_fields)}") from None

    text: str
    weight: Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)] = 1.0

    @field_validator("text")
    @classmethod
    def _text_says_something(cls, text: str) -> str:
        text = text.strip()
        if not text:
            raise ValueError('is empty; to decode plainly give preference=None or ""')
        return text


PreferenceLike: TypeAlias = (
    "str | Preference | dict[str, Any] | Iterable[str | Preference | dict[str, Any]] | None"
)


class Steering(BaseModel):
    """How strongly, and where, preferences are applied; frozen, converts to and from JSON.

    Args:
        strength: g in `log π ∝ p + g·((p − r) + f·(p − u))`. −1 is no preference at all, 0 the
            preference in the prompt alone. Without focus, 2.0 is Linear Alignment and 4.6487 the
            paper's 60-step game.
        floor: the plausibility floor, 0 to 1: only tokens with `p ≥ floor·max p` survive; 0 is off.
        placement: where the preference stands in the prompt: at the end of the last "user" turn,
            in the "system" message, or in "both". Raw text has it before the prompt.
        focus: f, 0 to 10: how strongly the answer is held to the question. The prompt of p has the
            chat and the preference; that of r lacks the preference; that of u lacks what was
            asked, and has the preference as a message of its own. 0 is off and saves the row of u.
            There is no focus at strength 0 and below, for raw text, or for negative weights.
        loop_guard: how many tokens an answer may repeat of itself before further repetition costs
            likelihood, more with each token; 0 is off. It is off at strength 0 and below.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Chosen by data: docs/choosing-strength.md.
    strength: Strength = 0.35
    floor: Floor = 0.1
    placement: Placement = "user"
    focus: Focus = 1.0
    loop_guard: LoopGuard = 4

    def __init__(self, *unnamed: Any, **options: Any) -> None:
        refuse_unnamed(unnamed, "Steering", "strength=0.5")
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise RequestError(f"Steering: {describe(error, type(self).model_fields)}") from None

    @classmethod
    def paper(
        cls, iterations: int = 60, alpha: float = 2.0, lam: float = 2.0, eta: float = 10.0
    ) -> Steering:
        """The paper's setting: its game's gain, the system message, no floor, focus or guard."""
        gain = game_gain(iterations, alpha, lam, eta)
        return cls(strength=gain, floor=0.0, placement="system", focus=0.0, loop_guard=0)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Steering:
        """Read the JSON file that `amulet tune` writes.

        Raises:
            RequestError: the file can't be read, or has other contents; or it is no path.
        """
        if not isinstance(path, str | os.PathLike):
            raise RequestError(
                f"steering is a {type(path).__name__}: expected Steering(strength=0.5), or the "
                "path of the JSON file that `amulet tune` writes."
            )
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RequestError(
                f"steering={os.fspath(path)!r}: expected a JSON file of "
                f"{', '.join(cls.model_fields)}, as `amulet tune` writes it ({error})."
            ) from error


DEFAULT_STEERING = Steering()


def normal_preferences(given: PreferenceLike) -> tuple[Preference, ...]:
    """Return the normal form of preferences given in any accepted form; `()` decodes plainly.

    None, "" and blank text mean no preference; so do an empty list and a weight of 0.

    Raises:
        RequestError: anything other than text, `Preference`, its dict, or a list of them.
    """
    if given is None:
        return ()
    entries = [given] if isinstance(given, str | Preference | dict) else given
    if not isinstance(entries, Iterable) or isinstance(entries, bytes):
        raise RequestError(
            f"a preference of type {type(given).__name__}: expected text, a Preference, a list of "
            "them, or None."
        )
    listed = tuple(entries)
    if not listed and isinstance(entries, Iterator):
        raise RequestError(
            f"a preference of type {type(given).__name__} that is exhausted: it can be read only "
            "once, perhaps by an earlier request; give a list."
        )
    preferences = (_one_preference(entry) for entry in listed if not _is_blank(entry))
    return tuple(preference for preference in preferences if preference.weight != 0)


def _is_blank(entry: object) -> bool:
    return entry is None or (isinstance(entry, str) and not entry.strip())


def _one_preference(entry: object) -> Preference:
    if isinstance(entry, Preference):
        return entry
    if isinstance(entry, str):
        return Preference(entry)
    if isinstance(entry, dict) and "text" in entry:
        return Preference(**entry)
    raise RequestError(
        f"a preference of type {type(entry).__name__}: expected text, a Preference, or a dict "
        "with its text and weight."
    )


def shares(preferences: Sequence[Preference]) -> list[float]:
    """Return each preference's share of the push: weights scaled to sum to 1 at most."""
    total = max(1.0, sum(abs(preference.weight) for preference in preferences))
    return [preference.weight / total for preference in preferences]


def row_weights(
    preferences: Sequence[Preference], strength: float, focus: float = 0.0
) -> list[float]:
    """Return the w_i of `r + Σ w_i·(p_i − r)`: one per preferred row, then one for the row of u.

    There is a row of u only with focus, a strength above 0, and a preference of positive weight.
    """
    own = shares(preferences)
    held = max(strength, 0.0) * focus  # of p − u, which is (p − r) − (u − r)
    wanted = [max(share, 0.0) * held for share in own]
    weights = [share * (1.0 + strength) + more for share, more in zip(own, wanted, strict=True)]
    return [*weights, -sum(wanted)] if any(wanted) else weights


def guard_of(steering: Steering) -> int:
    """Return the loop guard in force: 0 where nothing is steered."""
    return steering.loop_guard if steering.strength > 0 else 0


MOST_FINDINGS = 8  # that one error tells


def describe(error: ValidationError, known: Collection[str] = ()) -> str:
    """Return pydantic's errors as one sentence per field: name, value given, value expected.

    Args:
        error: the error that pydantic raised.
        known: names of the options that exist.
    """
    findings = []
    for finding in error.errors(include_url=False)[:MOST_FINDINGS]:
        name = ".".join(str(part) for part in finding["loc"]) or "request"
        if finding["type"] == "extra_forbidden":
            findings.append(f"{name}: unknown option; {advice(name, known)}")
        else:
            message = finding["msg"].removeprefix("Value error, ").removesuffix(".")
            given = f"={shown(finding['input'])}" if finding["loc"] else ""  # not the whole chat
            findings.append(f"{name}{given}: {message[:1].lower()}{message[1:]}")
    if (more := error.error_count() - len(findings)) > 0:
        findings.append(f"and {more} more")
    return "; ".join(findings) + "."
