"""Builds the tables of a report from scored answers: scores, guards, facts and comparisons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amulet.evaluation.bootstrap import at_zero, interval
from amulet.evaluation.judges.comparisons import WinRate, win_rates
from amulet.evaluation.methods import label, placement_of, prompt_only_methods
from amulet.evaluation.rules import words
from amulet.evaluation.run import Answer, Run

PLAIN = "base"
# Guards that don't depend on an answer's length, and so can be compared.
COMPARED = ("guards.log_probability", "guards.distinct_3", "guards.similarity")
NONE = "–"
PROMPT_ONLY_NOTE = (
    "Against prompt only: the difference to the preference in the prompt alone, same placement."
)


@dataclass(frozen=True)
class Entry:
    """An answer with its scores; `run` is "" if the report has only one run."""

    run: str
    answer: Answer
    values: dict[str, float]

    @property
    def arm(self) -> str:
        """The label of its method, after its run's name if there are several runs."""
        called = label(self.answer.method, self.answer.placement)
        return f"{self.run}: {called}" if self.run else called

    @property
    def asked(self) -> tuple[str, str]:
        """The question, the unit that intervals resample."""
        return self.answer.set, str(self.answer.index)

    @property
    def placement(self) -> str | None:
        """The placement of the preference, or None without one."""
        return placement_of(self.answer.strength, self.answer.placement)


_PromptOnly = dict[tuple[str | None, ...], Entry]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title, note: shown above and below the table.
        columns, rows: texts; a mean with its interval is one text, such as "0.50 [0.40, 0.60]".
        is_detail: a detail of the table before it, which may be collapsed.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    is_detail: bool = False


def score_tables(entries: Sequence[Entry], name: str, title: str) -> list[Table]:
    """Return scores of methods by preferences, in all and per set, against the prompt alone."""
    entries = [entry for entry in entries if name in entry.values]
    sets = list(dict.fromkeys(entry.answer.set for entry in entries))
    parts = [("all sets", entries)] if len(sets) > 1 else []
    parts += [(one, [entry for entry in entries if entry.answer.set == one]) for one in sets]
    tables: list[Table] = []
    for part, own in parts:
        wishes = _wishes(own)
        before = _prompt_only(own)
        rows = tuple(
            (
                arm,
                _mean(of_arm, name),
                _difference(of_arm, before, name),
                _at_equal_length(of_arm, before, name),
                *(_mean([e for e in of_arm if e.answer.preference == w], name) for w in wishes),
            )
            for arm, of_arm in _arms(own)
        )
        columns = ("method", "all", "against prompt only", "at equal length", *wishes)
        is_detail = len(sets) > 1 and bool(tables)
        note = "" if is_detail else PROMPT_ONLY_NOTE
        tables.append(Table(f"{title}, {part}", columns, rows, note, is_detail))
    return tables


def guard_tables(entries: Sequence[Entry]) -> list[Table]:
    """Return tables of the guards' means and times, and of differences to the prompt alone."""
    names = {name for entry in entries for name in entry.values if _is_guard(name)}
    found = [name for name in COMPARED if name in names] + sorted(names - set(COMPARED))
    rows = []
    for arm, of_arm in _arms(entries):
        tokens = sum(len(entry.answer.token_ids) for entry in of_arm)
        seconds = math.fsum(entry.answer.seconds for entry in of_arm)
        rows.append(
            (
                arm,
                str(len(of_arm)),
                *(_mean(of_arm, name) for name in found),
                f"{tokens / len(of_arm):.1f}",
                f"{1000 * seconds / tokens:.1f}" if tokens else NONE,
            )
        )
    columns = ("method", "answers", *map(_guard_title, found), "tokens", "ms per token")
    tables = [Table("Guards and time", columns, tuple(rows))]
    wishes = _wishes(entries)
    before = _prompt_only(entries)
    for name in COMPARED:
        own = [entry for entry in entries if name in entry.values]
        rows = [
            (
                arm,
                _difference(of_arm, before, name),
                *(
                    _difference([e for e in of_arm if e.answer.preference == wish], before, name)
                    for wish in wishes
                ),
            )
            for arm, of_arm in _arms(own)
        ]
        rows = [row for row in rows if set(row[1:]) != {NONE}]
        if rows:
            title = f"{_guard_title(name).capitalize()} against prompt only"
            tables.append(Table(title, ("method", "all", *wishes), tuple(rows)))
    return tables


def fact_tables(runs: Sequence[tuple[str, Run]]) -> list[Table]:
    """Return the share of facts for which the right option is likeliest under each method."""
    tables = []
    for name, run in runs:
        right = run.facts()
        wishes = [meta.name for meta in run.meta.preferences]
        prompt_only = prompt_only_methods(
            (meta.name, meta.strength, meta.placement, meta.adapt) for meta in run.meta.methods
        )
        rows = []
        for meta in run.meta.methods:
            method = meta.name
            before = prompt_only.get(placement_of(meta.strength, meta.placement), "")
            own = {wish: right[method, wish] for wish in wishes if (method, wish) in right}
            plain = right.get((method, ""))
            if not own and plain is None:
                continue
            cells = [_interval(_by_fact([own[wish]])) if wish in own else NONE for wish in wishes]
            rows.append(
                (
                    label(method, meta.placement),
                    _interval(_by_fact([plain] if plain is not None else own.values())),
                    _fact_difference(own, {wish: right.get((PLAIN, "")) for wish in wishes}),
                    _fact_difference(own, {wish: right.get((before, wish)) for wish in own}),
                    *cells,
                )
            )
        if rows:
            title = "Facts answered right" + (f", {name}" if len(runs) > 1 else "")
            columns = ("method", "all", "against no preference", "against prompt only", *wishes)
            note = "Intervals are over the facts."
            tables.append(Table(title, columns, tuple(rows), note))
    return tables


def win_tables(runs: Sequence[tuple[str, Run]]) -> list[Table]:
    """Return the win rates of the language model that judges pairs."""
    tables = []
    for name, run in runs:
        if rates := win_rates(run):
            title = "Win rates, language model as judge" + (f", {name}" if len(runs) > 1 else "")
            columns = ("method", "against", "win rate", "pairs", "consistent", "first one won")
            called = {meta.name: label(meta.name, meta.placement) for meta in run.meta.methods}
            rows = tuple(
                (called.get(method, method), called.get(other, other), *_win(rate))
                for (method, other), rate in rates.items()
            )
            note = (
                "A tie is half a win. Consistent: the same verdict with the positions swapped. "
                "First one won: share of the verdicts without ties; far from .5, the judge goes by "
                "the position."
            )
            tables.append(Table(title, columns, rows, note))
    return tables


def _arms(entries: Iterable[Entry]) -> Iterable[tuple[str, list[Entry]]]:
    arms: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        arms[entry.arm].append(entry)
    return arms.items()


def _wishes(entries: Iterable[Entry]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.answer.preference for entry in entries))


def _is_guard(name: str) -> bool:
    return name.startswith("guards.")


def _guard_title(name: str) -> str:
    return name.removeprefix("guards.").replace("_", " ")


def _prompt_only(entries: Iterable[Entry]) -> _PromptOnly:
    """Return the prompt-only answers by run, placement, question and preference."""
    by_run: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_run[entry.run].append(entry)
    found: _PromptOnly = {}
    for run, own in by_run.items():
        answers = [entry.answer for entry in own]
        methods = prompt_only_methods((a.method, a.strength, a.placement, a.adapt) for a in answers)
        for placement, method in methods.items():
            for entry in own:
                if entry.answer.method == method:
                    found[(run, placement, *entry.asked, entry.answer.preference)] = entry
    return found


def _paired(
    of_arm: Iterable[Entry], before: _PromptOnly, name: str
) -> Iterable[tuple[Entry, Entry]]:
    """Yield each answer with the prompt-only one: same question, preference and placement."""
    for entry in of_arm:
        other = before.get((entry.run, entry.placement, *entry.asked, entry.answer.preference))
        if other is None or other is entry:
            continue
        if name in entry.values and name in other.values:
            yield entry, other


def _mean(entries: Iterable[Entry], name: str) -> str:
    by_question: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry in entries:
        if name in entry.values:
            by_question[entry.asked].append(entry.values[name])
    return _interval(by_question)


def _difference(of_arm: Sequence[Entry], before: _PromptOnly, name: str) -> str:
    by_question: dict[tuple[str, str], list[float]] = defaultdict(list)
    for entry, other in _paired(of_arm, before, name):
        by_question[entry.asked].append(entry.values[name] - other.values[name])
    return _interval(by_question)


def _at_equal_length(of_arm: Sequence[Entry], before: _PromptOnly, name: str) -> str:
    """Return the difference that the answers' lengths in words do not explain."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for entry, other in _paired(of_arm, before, name):
        longer = float(len(words(entry.answer.answer)) - len(words(other.answer.answer)))
        points[entry.asked].append((longer, entry.values[name] - other.values[name]))
    return _bracketed(*at_zero(points)) if points else NONE


def _by_fact(asked: Iterable[dict[str, bool]]) -> dict[str, list[float]]:
    by_fact: dict[str, list[float]] = defaultdict(list)
    for right in asked:
        for fact, is_right in right.items():
            by_fact[fact].append(float(is_right))
    return by_fact


def _fact_difference(
    own: dict[str, dict[str, bool]], others: dict[str, dict[str, bool] | None]
) -> str:
    by_fact: dict[str, list[float]] = defaultdict(list)
    for wish, right in own.items():
        before = others.get(wish) or {}
        for fact in right.keys() & before.keys():
            by_fact[fact].append(float(right[fact]) - float(before[fact]))
    # In a fixed order, so that the same draws give the same interval.
    return _interval(dict(sorted(by_fact.items())))


def _win(rate: WinRate) -> tuple[str, str, str, str]:
    def share(value: float | None) -> str:
        return NONE if value is None else f"{value:.2f}"

    return (
        _bracketed(rate.rate, rate.low, rate.high),
        f"{rate.pairs:,}",
        share(rate.consistent),
        share(rate.first),
    )


def _interval(by_question: Mapping[Any, Sequence[float]]) -> str:
    return _bracketed(*interval(by_question)) if by_question else NONE


def _bracketed(mean: float, low: float, high: float) -> str:
    return f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
