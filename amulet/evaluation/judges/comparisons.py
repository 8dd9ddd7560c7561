"""The comparisons of a run: how they are stored, their cost, and the win rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from amulet.errors import EvaluationError
from amulet.evaluation.bootstrap import interval
from amulet.evaluation.run import Answer, Run, append_lines, read_lines
from amulet.preference import describe

PAIRS = "llm-pairs"

Order: TypeAlias = Literal["ab", "ba"]
Identity: TypeAlias = tuple[str, str, Order]


class Pair(BaseModel):
    """One comparison, a line of `scores/llm-pairs.jsonl`.

    Attributes:
        key_a, key_b: the answers' keys; b is the baseline's.
        order: "ab" if a was shown first.
        winner: "a", "b" or "tie"; None if there was no readable verdict, which is requested again
            when the run is resumed.
        judge: the judging model's name.
        calls: replies paid for; 0 if both answers are identical, which is a tie.
        input_tokens, output_tokens: of all calls, as counted by the endpoint.
        cost_usd: by the prices given; None without prices.
        reason: the judge's sentence.
        error: why there is no verdict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_a: str
    key_b: str
    order: Order
    winner: Literal["a", "b", "tie"] | None
    judge: str
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    reason: str = ""
    error: str | None = None

    @property
    def identity(self) -> Identity:
        """The compared answers and their order."""
        return self.key_a, self.key_b, self.order


@dataclass(frozen=True)
class Spent:
    """The cost of a run's comparisons; `usd` is None if one was made without prices."""

    calls: int
    input_tokens: int
    output_tokens: int
    usd: float | None

    def __str__(self) -> str:
        cost = "no prices given" if self.usd is None else f"${self.usd:.4f}"
        return (
            f"{self.calls:,} calls, {self.input_tokens:,} tokens in, "
            f"{self.output_tokens:,} tokens out, {cost}"
        )


@dataclass(frozen=True)
class WinRate:
    """How often a method's answer is preferred to the baseline's; a tie counts half.

    Attributes:
        rate, low, high: mean over pairs, and its bootstrap interval over questions.
        pairs: pairs of answers with a verdict in both orders; others don't count.
        consistent: share of judged pairs with the same verdict in both orders.
        first: share of the verdicts, without ties, for the answer shown first; far from one half,
            this judge favours a position. None if there is no such verdict.
    """

    rate: float
    low: float
    high: float
    pairs: int
    consistent: float | None
    first: float | None

    def __str__(self) -> str:
        return f"{self.rate:.3f} ({self.low:.3f} to {self.high:.3f}) of {self.pairs:,} pairs"


def append_pair(run: Run, pair: Pair) -> None:
    """Store a comparison; it is in the file when this returns."""
    append_lines(_path(run), [pair.model_dump(mode="json")])


def read_pairs(run: Run) -> list[Pair]:
    """Return a run's comparisons; if one was repeated, the last counts."""
    return list({pair.identity: pair for pair in _all_pairs(run)}.values())


def spent(run: Run) -> Spent:
    """Return the cost of all comparisons of a run, those without a verdict included."""
    pairs = list(_all_pairs(run))
    costs = [pair.cost_usd for pair in pairs if pair.calls]
    known = [cost for cost in costs if cost is not None]
    return Spent(
        calls=sum(pair.calls for pair in pairs),
        input_tokens=sum(pair.input_tokens for pair in pairs),
        output_tokens=sum(pair.output_tokens for pair in pairs),
        usd=sum(known) if len(known) == len(costs) else None,
    )


def win_rates(run: Run, level: float = 0.95) -> dict[tuple[str, str], WinRate]:
    """Return the win rate of every (method, baseline) with pairs judged in both orders."""
    answers = {answer.key: answer for answer in run.answers()}
    both: dict[tuple[str, str], dict[Order, Pair]] = {}
    for pair in read_pairs(run):
        if pair.winner is not None and pair.key_a in answers and pair.key_b in answers:
            both.setdefault((pair.key_a, pair.key_b), {})[pair.order] = pair
    groups: dict[tuple[str, str], list[tuple[Pair, Pair]]] = {}
    for (key_a, key_b), orders in both.items():
        if len(orders) == 2:
            methods = answers[key_a].method, answers[key_b].method
            groups.setdefault(methods, []).append((orders["ab"], orders["ba"]))
    return {methods: _win_rate(group, answers, level) for methods, group in groups.items()}


def _win_rate(
    group: Sequence[tuple[Pair, Pair]], answers: dict[str, Answer], level: float
) -> WinRate:
    points = {"a": 1.0, "tie": 0.5, "b": 0.0}
    by_question: dict[tuple[str, str], list[float]] = {}
    for orders in group:
        answer = answers[orders[0].key_a]
        value = sum(points[str(pair.winner)] for pair in orders) / 2
        by_question.setdefault((answer.set, str(answer.index)), []).append(value)
    asked = [orders for orders in group if any(pair.calls for pair in orders)]
    decided = [pair for orders in asked for pair in orders if pair.winner != "tie"]
    same = sum(one.winner == other.winner for one, other in asked)
    firsts = sum(pair.winner == pair.order[0] for pair in decided)
    rate, low, high = interval(by_question, level)
    return WinRate(
        rate=rate,
        low=low,
        high=high,
        pairs=len(group),
        consistent=same / len(asked) if asked else None,
        first=firsts / len(decided) if decided else None,
    )


def _all_pairs(run: Run) -> Iterator[Pair]:
    path = _path(run)
    for number, record in read_lines(path):
        try:
            yield Pair.model_validate(record)
        except ValidationError as error:
            raise EvaluationError(f"{path.name}, line {number}: {describe(error)}") from None


def _path(run: Run) -> Path:
    return run.folder / "scores" / f"{PAIRS}.jsonl"
