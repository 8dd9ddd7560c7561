"""The paper's protocol: its eight preferences, a neutral system prompt, preferences by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from amulet.errors import EvaluationError
from amulet.evaluation.run import PreferenceMeta

TEMPLATE = "Your answer should be {} as much as possible."
OPPOSITE_TEMPLATE = "Your answer should be as little {} as possible."
NAMES = (
    "creative",
    "sycophantic",
    "verbose",
    "complex",
    "formal",
    "pleasant",
    "concise",
    "uplifting",
)
SYSTEM_PROMPT = "You are an assistant. Answer the question that the user asks."
METHODS = ("base", "pref", "beam", "linear_alignment", "amulet")


def preferences_of(names: Iterable[str]) -> list[PreferenceMeta]:
    """Return preferences by name, without duplicates.

    Args:
        names: "paper" (the eight), "rules" (all that a program can check), "rules-dev" and
            "rules-heldout" (the halves for choosing and for reporting the defaults),
            one of the eight, or a rule's name. If a name is both, it means the paper's, and
            "rule:NAME" the rule's. "concise+formal" is one preference that combines both.

    Raises:
        EvaluationError: there is no such preference.
    """
    found = [preference for name in names for preference in _asked(name.strip())]
    if not found:
        raise EvaluationError('No preferences: expected "paper", "rules" or names.')
    return list({preference.name: preference for preference in found}.values())


def parts_of(preference: PreferenceMeta) -> list[PreferenceMeta]:
    """Return the parts of a preference such as "concise+formal"."""
    return [part for name in preference.name.split("+") for part in _named(name)]


def opposite_of(preference: PreferenceMeta) -> str:
    """Return the text of the opposite of a preference.

    Raises:
        EvaluationError: the preference has none.
    """
    opposites = []
    for part in parts_of(preference):
        if part.rule is None:
            opposites.append(OPPOSITE_TEMPLATE.format(part.name))
            continue
        from amulet.evaluation.rules import rule

        opposite = rule(part.rule).opposite
        if opposite is None:
            raise EvaluationError(
                f"The preference {part.name!r} has no opposite: leave it out, or the method "
                "with adapt=opposite."
            )
        opposites.append(opposite)
    return " ".join(opposites)


def _asked(name: str) -> list[PreferenceMeta]:
    if "+" not in name:
        return _named(name)
    parts = preferences_of(name.split("+"))
    rules = [part.rule for part in parts if part.rule is not None]
    return [
        PreferenceMeta(
            name="+".join(part.name for part in parts),
            text=" ".join(part.text for part in parts),
            rule="+".join(rules) if len(rules) == len(parts) else None,
        )
    ]


def _named(name: str) -> list[PreferenceMeta]:
    if name == "paper":
        return [_of_paper(adjective) for adjective in NAMES]
    if name in NAMES:
        return [_of_paper(name)]
    from amulet.evaluation import rules

    groups = {
        "rules": tuple(rules.RULES),
        "rules-dev": tuple(rules.DEV),
        "rules-heldout": tuple(rules.HELD_OUT),
    }
    if name in groups:
        return [_of_rule(member) for member in groups[name]]
    own = name.removeprefix("rule:")
    if own not in rules.RULES:
        known = [*groups, "paper", *NAMES, *rules.RULES]
        close = difflib.get_close_matches(own, known, n=3)
        meant = f" Close to it: {', '.join(close)}." if close else ""
        raise EvaluationError(
            f"{name!r} is not a preference: expected paper, {', '.join(groups)}, one of "
            f"{', '.join(NAMES)}, or a rule: {', '.join(rules.RULES)} (`amulet tune --list-rules` "
            f"says what they check).{meant}"
        )
    return [_of_rule(own)]


def _of_paper(adjective: str) -> PreferenceMeta:
    return PreferenceMeta(name=adjective, text=TEMPLATE.format(adjective))


def _of_rule(name: str) -> PreferenceMeta:
    from amulet.evaluation.rules import rule

    # A rule and a preference of the paper may have the same name; the run distinguishes them.
    shown = f"rule:{name}" if name in NAMES else name
    return PreferenceMeta(name=shown, text=rule(name).preference, rule=name)
