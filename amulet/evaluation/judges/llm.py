"""The judge llm: a language model behind an OpenAI-compatible endpoint compares answers.

Each pair is shown twice, with the positions swapped, because judges favour a position. Every
verdict is a line of `scores/llm-pairs.jsonl`, written when it arrives, so that an interrupted run
pays for nothing twice. The client, the package `openai`, has the time-outs and the retries with
growing waits that endpoints require.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import openai
from openai import OpenAI

from amulet.errors import EvaluationError
from amulet.evaluation.judges.comparisons import (
    PAIRS,
    Identity,
    Order,
    Pair,
    append_pair,
    read_pairs,
    spent,
)
from amulet.evaluation.judges.verdict import SCHEMA, Verdict, messages_of, parse_verdict
from amulet.evaluation.judging import JudgeOptions, Tell
from amulet.evaluation.methods import placement_of, prompt_only_methods
from amulet.evaluation.run import Answer, Run

ATTEMPTS = 3  # replies per comparison without a verdict before it is given up
LONG_REPLY = 16_000  # token limit after a reply was cut off at the first limit
UNREADABLE = 10  # comparisons given up before the first verdict: this model can't judge

_AGAIN = "That is not the JSON object asked for. Reply with that object and nothing else."
# Options that an endpoint may not support, and how its error names them.
_EXTRAS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1000, "response_format": SCHEMA}
_NAMED = {name: (name,) for name in _EXTRAS} | {"response_format": ("response_format", "schema")}

_log = logging.getLogger("amulet")


def score_llm(run: Run, options: JudgeOptions, tell: Tell | None = None) -> None:
    """Compare every answer of a run with the baseline's answer to the same question.

    Args:
        run: its answers are read; verdicts go to `scores/llm-pairs.jsonl`.
        options: `model`, `base_url` (None is OpenAI's), `baseline`, `prices` and `concurrency`. The
            key is read from the environment variable OPENAI_API_KEY; a `base_url` may need none.
        tell: called with (verdicts, verdicts in all).

    Raises:
        EvaluationError: as for `judge_pairs`, or no model or key is given.
    """
    if options.model is None:
        raise EvaluationError(
            "The judge 'llm' needs the judging model's name at its endpoint: give "
            "--judge-model, and --judge-url if the endpoint is not OpenAI's."
        )
    key = os.environ.get("OPENAI_API_KEY")
    if not key and options.base_url is None:
        raise EvaluationError(
            "The judge 'llm' has no key: set OPENAI_API_KEY, or give --judge-url for an endpoint "
            "that needs none."
        )
    with OpenAI(
        api_key=key or "none", base_url=options.base_url, max_retries=6, timeout=180.0
    ) as client:
        judge_pairs(
            run,
            client,
            options.model,
            baseline=options.baseline,
            prices=options.prices,
            concurrency=options.concurrency,
            tell=tell,
        )
    _log.info("Judged by %s: %s", options.model, spent(run))


def judge_pairs(
    run: Run,
    client: OpenAI,
    model: str,
    *,
    baseline: str | None = None,
    prices: tuple[float, float] | None = None,
    concurrency: int = 4,
    tell: Tell | None = None,
) -> None:
    """Request every missing verdict of a run.

    Args:
        run: its answers are read; verdicts go to `scores/llm-pairs.jsonl`.
        client: the client of an OpenAI-compatible endpoint; its retries and time-out apply.
        model: the judging model's name at the endpoint.
        baseline: the method that every other method is compared with; None is the preference in
            the prompt alone, with the same placement.
        prices: US dollars per million tokens, (input, output); None records no cost.
        concurrency: concurrent requests, at least 1.
        tell: called with (verdicts, verdicts in all).

    Raises:
        EvaluationError: there is nothing to compare, the run was judged by another model, the
            endpoint refuses or fails, or no reply can be read. Existing verdicts are kept.
    """
    if concurrency < 1:
        raise EvaluationError(f"concurrency={concurrency!r}: expected 1 or more.")
    if prices is not None and min(prices) < 0:
        raise EvaluationError(f"prices={prices!r}: expected US dollars per million tokens.")
    known = read_pairs(run)
    _check_judge(known, model)
    judged = {pair.identity for pair in known if pair.winner is not None}
    comparisons = list(_comparisons(run.answers(), baseline))
    waiting = [entry for entry in comparisons if entry.identity not in judged]
    done, total = len(comparisons) - len(waiting), len(comparisons)
    if tell is not None:
        tell(done, total)
    judge = _Judge(run, client, model, prices)
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(judge.judge, comparison) for comparison in waiting]
        try:
            for future in as_completed(futures):
                done += future.result()
                if tell is not None:
                    tell(done, total)
        finally:
            # Running requests are paid for, so they finish and are stored.
            pool.shutdown(wait=True, cancel_futures=True)
    judge.check_read(at_least=1)
    if judge.unread:
        _log.warning(
            "%d of %d comparisons have no verdict, the last because: %s Judging again asks them "
            "again.",
            judge.unread,
            total,
            judge.last_error,
        )


@dataclass(frozen=True)
class _Comparison:
    a: Answer
    b: Answer
    order: Order

    @property
    def identity(self) -> Identity:
        return self.a.key, self.b.key, self.order


def _comparisons(answers: Sequence[Answer], baseline: str | None) -> Iterator[_Comparison]:
    """Yield every answer with the baseline's for the same question and preference, twice."""
    methods = list(dict.fromkeys(answer.method for answer in answers))
    by_place = prompt_only_methods((a.method, a.strength, a.placement, a.adapt) for a in answers)
    if len(methods) < 2 or (not by_place if baseline is None else baseline not in methods):
        wanted = baseline or "pref"
        raise EvaluationError(
            f"The judge 'llm' compares with the method {wanted!r}, and the run's methods are "
            f"{', '.join(methods) or 'none'}: decode {wanted!r} and another one, or give "
            "another baseline."
        )
    known = {(a.method, a.set, a.index, a.preference): a for a in answers}
    orders: tuple[Order, Order] = ("ab", "ba")
    for answer in answers:
        against = baseline or by_place.get(placement_of(answer.strength, answer.placement))
        other = known.get((against or "", answer.set, answer.index, answer.preference))
        if answer.method != against and other is not None:
            for order in orders:
                yield _Comparison(answer, other, order)


@dataclass
class _Judge:
    """Requests and stores verdicts; shared by the threads."""

    run: Run
    client: OpenAI
    model: str
    prices: tuple[float, float] | None
    read: int = 0
    unread: int = 0
    last_error: str = ""
    failed: bool = False
    extras: dict[str, Any] = field(default_factory=lambda: dict(_EXTRAS))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def judge(self, comparison: _Comparison) -> bool:
        """Make and store one comparison, with or without verdict; False once another failed."""
        if self.failed:
            return False
        try:
            self._write(self._tie(comparison) or self._ask(comparison))
            self.check_read(at_least=UNREADABLE)
        except BaseException:
            self.failed = True
            raise
        return True

    def _write(self, pair: Pair) -> None:
        with self.lock:
            append_pair(self.run, pair)
            self.read += pair.winner is not None and pair.calls > 0
            self.unread += pair.winner is None
            self.last_error = pair.error or self.last_error

    def _tie(self, comparison: _Comparison) -> Pair | None:
        """Return the tie of two identical answers, or None if they differ."""
        same = comparison.a.answer.strip() == comparison.b.answer.strip()
        return self._pair(comparison, winner="tie") if same else None

    def check_read(self, at_least: int) -> None:
        """Raise EvaluationError if this many comparisons failed and none has a verdict."""
        if not self.read and self.unread >= at_least:
            raise EvaluationError(
                f"The judge {self.model!r} gave no readable verdict in {self.unread} "
                f"comparisons, the last because: {self.last_error} Use another model."
            )

    def _ask(self, comparison: _Comparison) -> Pair:
        a, b = comparison.a, comparison.b
        first, second = (a, b) if comparison.order == "ab" else (b, a)
        messages = messages_of(a.question, a.preference_text, first.answer, second.answer)
        calls = tokens_in = tokens_out = 0
        verdict: Verdict | None = None
        error: str | None = None
        while verdict is None and calls < ATTEMPTS:
            try:
                reply = self._complete(messages)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as refusal:
                error = f"the endpoint refused: {_short(refusal)}"
                break
            calls += 1
            if reply.usage is not None:  # some local servers don't count tokens
                tokens_in += reply.usage.prompt_tokens
                tokens_out += reply.usage.completion_tokens
            text, cut = _text_of(reply)
            verdict = parse_verdict(text)
            if verdict is None:
                error = f"the reply was {_short(text)!r}{', cut for its length' if cut else ''}."
                if cut and "max_tokens" in self.extras:  # it thinks at length before its verdict
                    self.extras["max_tokens"] = LONG_REPLY
                said = [{"role": "assistant", "content": text}] if text else []
                messages = [*messages[:2], *said, {"role": "user", "content": _AGAIN}]
        sides = {"first": comparison.order[0], "second": comparison.order[1], "tie": "tie"}
        return self._pair(
            comparison,
            winner=sides[verdict.winner] if verdict else None,
            reason=verdict.reason if verdict else "",
            error=None if verdict else error,
            calls=calls,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
        )

    def _pair(self, comparison: _Comparison, **values: Any) -> Pair:
        cost = None
        if self.prices is not None:
            counts = values.get("input_tokens", 0), values.get("output_tokens", 0)
            cost = sum(n * price for n, price in zip(counts, self.prices, strict=True)) / 1e6
        key_a, key_b, order = comparison.identity
        return Pair.model_validate(
            {"key_a": key_a, "key_b": key_b, "order": order, "judge": self.model, **values}
            | {"cost_usd": cost}
        )

    def _complete(self, messages: list[dict[str, str]]) -> Any:
        """Return the endpoint's reply; permanently drops options that the endpoint refuses."""
        while True:
            extras = dict(self.extras)
            try:
                return self.client.chat.completions.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]  # typed per role there
                    **extras,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                said = str(error)
                refused = [n for n in extras if any(word in said for word in _NAMED[n])]
                if not refused:
                    raise
                for name in refused:
                    self.extras.pop(name, None)
            except openai.OpenAIError as error:
                raise EvaluationError(self._explain(error)) from error

    def _explain(self, error: openai.OpenAIError) -> str:
        host = self.client.base_url.host
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{host} refuses the key: set OPENAI_API_KEY to a valid one."
        if isinstance(error, openai.NotFoundError):
            return f"{host} has no model {self.model!r}, or no chat completions: {_short(error)}"
        return (
            f"{host} failed, even after {self.client.max_retries} retries: {_short(error)} -- "
            "existing verdicts are kept; judge again to resume."
        )


def _check_judge(pairs: Sequence[Pair], model: str) -> None:
    others = sorted({pair.judge for pair in pairs if pair.winner and pair.calls} - {model})
    if others:
        raise EvaluationError(
            f"The run was judged by {others[0]!r}: verdicts of two judges can't be mixed. Give "
            f"that model instead of {model!r}, or move scores/{PAIRS}.jsonl out of the run."
        )


def _text_of(reply: Any) -> tuple[str, bool]:
    """Return a reply's text, or "", and whether it was cut off at the limit."""
    if not reply.choices:
        return "", False
    choice = reply.choices[0]
    return choice.message.content or "", choice.finish_reason == "length"


def _short(said: object) -> str:
    text = " ".join(str(said).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."
