"""OpenTelemetry: a span and four metrics per answer, by the conventions for generative AI; no text.

Nothing is imported here: a program that has configured a provider has loaded `opentelemetry`, and
without a provider its API records nothing. Names: https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amulet.decoding.generation import Generation
from amulet.preference import Steering
from amulet.reply import Usage
from amulet.request import Request

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram
    from opentelemetry.trace import Span

PROVIDER = "amulet"
# The boundaries that the conventions name.
DURATION = [0.01 * 2**i for i in range(14)]
TOKENS = [float(4**i) for i in range(14)]
FIRST = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]
HISTOGRAMS = {
    "gen_ai.client.operation.duration": ("s", "Time of a request.", DURATION),
    "gen_ai.client.token.usage": ("{token}", "Tokens of prompts and answers.", TOKENS),
    "gen_ai.server.time_to_first_token": ("s", "Waiting and prefill.", FIRST),
    "gen_ai.server.time_per_output_token": ("s", "Per token after the first.", PER_TOKEN),
}


class Call:
    """What is recorded of one answer, from `begin` to `end`.

    Args:
        model: its name; of a folder the last part.
        request: what is asked.
        steering: the settings in force; None is plain.
    """

    def __init__(self, model: str, request: Request, steering: Steering | None) -> None:
        folder = Path(model)
        name = folder.name if folder.is_absolute() else model
        operation = "chat" if request.prompt is None else "text_completion"
        self._common: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": name,
        }
        asked: dict[str, Any] = {
            "gen_ai.request.max_tokens": request.max_new_tokens,
            "gen_ai.request.temperature": float(request.temperature),
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.top_k": request.top_k,
            "gen_ai.request.seed": request.seed,
            "amulet.preferences": len(request.preference) if steering is not None else 0,
            "amulet.strength": None if steering is None else steering.strength,
            "amulet.focus": None if steering is None else steering.focus,
            "amulet.floor": None if steering is None else steering.floor,
            "amulet.placement": None if steering is None else steering.placement,
        }
        self._asked = {key: value for key, value in asked.items() if value is not None}
        self._began = 0
        self._span: Span | None = None

    def begin(self) -> None:
        """Open the span below the caller's current one; the answer is queued now."""
        self._began = time.time_ns()
        if (trace := sys.modules.get("opentelemetry.trace")) is None:
            return
        self._span = trace.get_tracer(PROVIDER).start_span(
            f"{self._common['gen_ai.operation.name']} {self._common['gen_ai.request.model']}",
            attributes={**self._common, **self._asked},
            start_time=self._began,
        )

    def end(self, generation: Generation, usage: Usage, reason: str) -> None:
        """Close the span, and count; what was never begun isn't.

        Args:
            generation: it has ended.
            usage: its tokens.
            reason: why it ended, if without an error.
        """
        if not self._began:
            return
        ended = time.time_ns()
        failed = {} if generation.error is None else {"error.type": _kind(generation.error)}
        if (span := self._span) is not None and span.is_recording():
            span.set_attributes({**_phases(self._began, generation), **failed})
            span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                    "gen_ai.response.finish_reasons": ["error" if failed else reason],
                    "amulet.usage.base_input_tokens": usage.base_prompt_tokens,
                    "amulet.rows": len(generation.prompts),
                }
            )
            if failed:
                from opentelemetry.trace import StatusCode

                span.set_status(StatusCode.ERROR)
            span.end(ended)
        if (histograms := _histograms()) is None:
            return
        duration, tokens, first, per_token = histograms.values()
        duration.record((ended - self._began) / 1e9, {**self._common, **failed})
        for kind, number in (("input", usage.prompt_tokens), ("output", usage.completion_tokens)):
            tokens.record(number, {**self._common, "gen_ai.token.type": kind})
        if generation.first_at:
            first.record((generation.first_at - self._began) / 1e9, self._common)
        if usage.completion_tokens > 1:
            seconds = (generation.last_at - generation.first_at) / 1e9
            per_token.record(seconds / (usage.completion_tokens - 1), self._common)


@contextlib.contextmanager
def of_caller(headers: Mapping[str, str]) -> Iterator[None]:
    """Put the spans of the block below the trace that a request's headers name.

    A span that is current already, such as that of an instrumentation of ASGI, stays so.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or trace.get_current_span().get_span_context().is_valid:
        yield
        return
    from opentelemetry import context, propagate

    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def _phases(began: int, generation: Generation) -> dict[str, float]:
    """Return the seconds in the queue, of the prefill, and of decoding after the first token."""
    stamps = [began, generation.admitted_at, generation.first_at, generation.last_at]
    names = ("amulet.queue.duration", "amulet.prefill.duration", "amulet.decode.duration")
    pairs = zip(names, stamps, stamps[1:], strict=False)
    return {name: (end - start) / 1e9 for name, start, end in pairs if end}


def _kind(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")


_made: tuple[Any, dict[str, Histogram]] | None = None


def _histograms() -> dict[str, Histogram] | None:
    """Return the instruments by name, made once per provider; None if nobody measures."""
    global _made
    if (metrics := sys.modules.get("opentelemetry.metrics")) is None:
        return None
    provider = metrics.get_meter_provider()
    if _made is None or _made[0] is not provider:
        meter = metrics.get_meter(PROVIDER)
        made = {
            name: meter.create_histogram(
                name, unit, about, explicit_bucket_boundaries_advisory=boundaries
            )
            for name, (unit, about, boundaries) in HISTOGRAMS.items()
        }
        _made = provider, made
    return _made[1]
