"""The decoding methods to compare: the paper's by name, ours by its settings.

base                     no preference
pref                     the preference in the prompt alone, in the system message
pref:placement=user      the same with another placement, for comparison with ours
beam                     the same prompt, beam search with 16 beams
linear_alignment         g = 2, no floor
amulet                   g = 4.6487, the closed form of the paper's 60-step game; no floor
amulet_literal           the 60 steps played one by one, to check the closed form
ours                     the library's defaults
ours:strength=4,floor=0.05,placement=user,adapt=decay
ours:strength=0.5,focus=0,loop_guard=0
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from amulet.errors import EvaluationError
from amulet.game import game_gain
from amulet.preference import (
    DEFAULT_STEERING,
    Floor,
    Focus,
    LoopGuard,
    Placement,
    Steering,
    Strength,
    describe,
)

Kind = Literal["base", "pref", "beam", "linear_alignment", "amulet", "amulet_literal", "ours"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Adapt = Literal["jsd", "decay", "entropy", "opposite", "default-system", "separate"]
ADAPTS: tuple[Adapt, ...] = get_args(Adapt)

BEAMS = 16


class Method(BaseModel):
    """One decoding method.

    Attributes:
        name: its name in a run; different methods have different names.
        kind: one of the paper's methods, or "ours".
        strength, floor, placement: see `Steering`; None if the method has none.
        focus, loop_guard: see `Steering`; 0 if the method has none.
        adapt: how strength or the base row varies; None is a constant strength against the plain
            prompt. See `amulet.evaluation.pairs` for the formulas.
            "jsd": strength times the Jensen-Shannon divergence of the two rows (AdaCAD).
            "decay": strength halves every 32 tokens.
            "entropy": less strength where the preferred row is certain of its token.
            "opposite": the base row has the opposite preference.
            "default-system": the base row has the template's own system prompt, if any.
            "separate": each part of a preference such as "concise+formal" has its own row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    strength: Strength | None = None
    floor: Floor | None = None
    placement: Placement | None = None
    focus: Focus = 0.0
    loop_guard: LoopGuard = 0
    adapt: Adapt | None = None

    @property
    def steering(self) -> Steering | None:
        """The method's settings; None for plain decoding."""
        if self.strength is None:
            return None
        given = self.model_dump(include=set(Steering.model_fields), exclude_none=True)
        return Steering(**given)

    @property
    def is_steered(self) -> bool:
        """Whether the base row influences the choice of a token."""
        return self.strength is not None and (self.strength != 0 or self.adapt is not None)

    @property
    def in_pairs(self) -> bool:
        """Whether it needs `pairs.py` because the library's own step does not support it."""
        return self.kind == "amulet_literal" or self.adapt not in (None, "separate")

    @property
    def by_generate(self) -> bool:
        """Whether Transformers' `generate` decodes it, and not the library's own step."""
        return self.in_pairs or self.kind == "beam"


def parse_method(text: str) -> Method:
    """Return the method named by a text such as "amulet" or "ours:strength=2,floor=0.1".

    Different spellings of the same settings give the same name, which states every number.

    Raises:
        EvaluationError: there is no such method, option or value.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise EvaluationError(_unknown("method", kind, KINDS))
    if colon and kind not in ("ours", "pref"):
        raise EvaluationError(
            f"method {text!r}: {kind} takes no options; expected pref:placement=... or "
            "ours:strength=...,floor=...,placement=...,focus=...,loop_guard=...,adapt=..."
        )
    if kind == "ours":
        return _ours(text, _options(text, rest, (*Steering.model_fields, "adapt")))
    if kind == "pref":
        return _prompt_only(text, _options(text, rest, ("placement",)))
    fixed: dict[str, dict[str, object]] = {
        "base": {},
        "beam": {"strength": 0.0},
        "linear_alignment": {"strength": 2.0, "floor": 0.0},
        "amulet": {"strength": game_gain(), "floor": 0.0},
        "amulet_literal": {"strength": game_gain(), "floor": 0.0},
    }
    placement = {} if kind == "base" else {"placement": "system"}
    return Method.model_validate({"name": kind, "kind": kind, **placement, **fixed[kind]})


def parse_methods(texts: Iterable[str]) -> list[Method]:
    """Return the methods in the given order, without duplicates."""
    methods = {method.name: method for method in map(parse_method, texts)}
    if not methods:
        raise EvaluationError(f"No methods: expected some of {', '.join(KINDS)}.")
    return list(methods.values())


def with_prompt_only(methods: Iterable[Method]) -> list[Method]:
    """Return the methods, with a `pref` before every ours whose placement has none."""
    methods = list(methods)
    known = {method.placement for method in methods if method.kind == "pref"}
    found: list[Method] = []
    for method in methods:
        if method.kind == "ours" and method.placement not in known:
            found.append(parse_method(f"pref:placement={method.placement}"))
            known.add(method.placement)
        found.append(method)
    return found


def prompt_only_methods(
    methods: Iterable[tuple[str, float | None, str | None, str | None]],
) -> dict[str | None, str]:
    """Return, by placement, the method with the preference in the prompt alone.

    It is `pref`, or ours at strength 0 if a run has no `pref` with that placement. The key None,
    for methods without a preference, has the only prompt-only method; if there are several, none.

    Args:
        methods: the name, strength, placement and adapt of each.
    """
    found: dict[str | None, str] = {}
    for name, strength, placement, adapt in methods:
        kind = name.partition(":")[0]
        if kind == "pref":
            found[placement or "system"] = name
        elif kind == "ours" and strength == 0 and adapt is None:
            found.setdefault(placement or "system", name)
    if len(found) == 1:
        found[None] = next(iter(found.values()))
    return found


def placement_of(strength: float | None, placement: str | None) -> str | None:
    """Return a method's placement, or None if it has no preference."""
    return placement or (None if strength is None else "system")


def label(name: str, placement: str | None) -> str:
    """Return a method's label in reports, which states the placement."""
    return name if placement is None or "placement=" in name else f"{name} ({placement})"


def _options(text: str, rest: str, known: tuple[str, ...]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise EvaluationError(
                f"method {text!r}: {part!r} is not an option; expected name=value."
            )
        if name not in known:
            raise EvaluationError(f"method {text!r}: {_unknown('option', name, known)}")
        if name in options:
            raise EvaluationError(f"method {text!r}: {name} is given twice.")
        options[name] = value
    return options


def _prompt_only(text: str, given: dict[str, str]) -> Method:
    options = {"placement": "system", "strength": 0.0, **given}
    try:
        method = Method.model_validate({"name": "pref", "kind": "pref", **options})
    except ValidationError as error:
        raise EvaluationError(f"method {text!r}: {describe(error)}") from None
    if method.placement == "system":  # the paper's, which has the short name
        return method
    return method.model_copy(update={"name": f"pref:placement={method.placement}"})


def _ours(text: str, given: dict[str, str]) -> Method:
    options: dict[str, object] = {**DEFAULT_STEERING.model_dump(), **given}
    if given.get("adapt", "separate") != "separate":  # not supported by the library's own step
        options.update(focus=given.get("focus", 0.0), loop_guard=given.get("loop_guard", 0))
    try:
        method = Method.model_validate({"name": "ours", "kind": "ours", **options})
    except ValidationError as error:
        raise EvaluationError(f"method {text!r}: {describe(error)}") from None
    if method.in_pairs and (method.focus or method.loop_guard):
        raise EvaluationError(
            f"method {text!r}: adapt={method.adapt} has no focus or loop_guard; leave them out."
        )
    name = (
        f"ours:strength={method.strength:.10g},floor={method.floor:.10g},"
        f"placement={method.placement}"
    )
    if not method.in_pairs:
        name += f",focus={method.focus:.10g},loop_guard={method.loop_guard}"
    if method.adapt is not None:
        name += f",adapt={method.adapt}"
    return method.model_copy(update={"name": name})


def _unknown(what: str, given: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"{given!r} is not a known {what}: expected one of {', '.join(names)}.{meant}"
