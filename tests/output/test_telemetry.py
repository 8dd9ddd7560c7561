"""OpenTelemetry: what is recorded of answers where a program has configured it; never a text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from amulet import Amulet, DecodeError, RequestError
from tests.models import ScriptedModel

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk, of the extra `dev`")

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

SECRETS = ("question", "wish", "hello")
QUESTION = [{"role": "user", "content": "question"}]


@dataclass
class Recorded:
    """What the SDK was given."""

    exporter: InMemorySpanExporter
    reader: InMemoryMetricReader
    provider: TracerProvider

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    @property
    def points(self) -> dict[str, list[Any]]:
        data = json.loads(self.reader.get_metrics_data().to_json())
        found = [
            m for r in data["resource_metrics"] for s in r["scope_metrics"] for m in s["metrics"]
        ]
        return {metric["name"]: metric["data"]["data_points"] for metric in found}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    spans, meters = TracerProvider(), MeterProvider([reader])
    spans.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: spans)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: meters)
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    yield Recorded(exporter, reader, spans)
    spans.shutdown()
    meters.shutdown()


@pytest.fixture
def amulet(tokenizer: PreTrainedTokenizerFast) -> Amulet:
    return Amulet(ScriptedModel(tokenizer, "hello"), tokenizer)


def seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None
    assert span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_steered_answer_is_a_span(amulet: Amulet, recorded: Recorded) -> None:
    reply = amulet.chat(
        QUESTION, preference="wish", strength=1.5, focus=0.5, max_new_tokens=20, seed=7
    )
    (span,) = recorded.spans
    name = amulet.name
    assert (span.name, span.kind, span.status.status_code) == (
        f"chat {name}",
        SpanKind.INTERNAL,
        StatusCode.UNSET,
    )
    found = dict(span.attributes or {})
    phases = [found.pop(f"amulet.{phase}.duration") for phase in ("queue", "prefill", "decode")]
    assert min(phases) >= 0
    assert sum(phases) <= seconds(span)
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "amulet",
        "gen_ai.request.model": name,
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": reply.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 6,  # five letters and the end
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
        "amulet.preferences": 1,
        "amulet.strength": 1.5,
        "amulet.focus": 0.5,
        "amulet.floor": 0.1,
        "amulet.placement": "user",
        "amulet.usage.base_input_tokens": reply.usage.base_prompt_tokens,
        "amulet.rows": 3,
    }


def test_a_plain_answer_has_no_strength(amulet: Amulet, recorded: Recorded) -> None:
    amulet.complete("question", max_new_tokens=2)
    (span,) = recorded.spans
    found = span.attributes or {}
    assert span.name == f"text_completion {amulet.name}"
    assert (found["amulet.preferences"], found["amulet.rows"]) == (0, 1)
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert [key for key in ("strength", "focus", "floor") if f"amulet.{key}" in found] == []


def test_metrics_count_tokens_and_time(amulet: Amulet, recorded: Recorded) -> None:
    replies = amulet.batch([{"messages": QUESTION}, {"messages": QUESTION, "preference": "wish"}])
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "amulet",
        "gen_ai.request.model": amulet.name,
    }
    points = recorded.points
    assert sorted(points) == [
        "gen_ai.client.operation.duration",
        "gen_ai.client.token.usage",
        "gen_ai.server.time_per_output_token",
        "gen_ai.server.time_to_first_token",
    ]
    usage = {
        point["attributes"].pop("gen_ai.token.type"): point
        for point in points.pop("gen_ai.client.token.usage")
    }
    assert usage["input"]["sum"] == sum(reply.usage.prompt_tokens for reply in replies)
    assert usage["output"]["sum"] == 12
    for point in (*usage.values(), *(point for (point,) in points.values())):
        assert (point["attributes"], point["count"]) == (common, 2)
    (first,), (whole,) = (
        points[f"gen_ai.{name}"]
        for name in ("server.time_to_first_token", "client.operation.duration")
    )
    assert 0 < first["sum"] < whole["sum"]
    assert whole["explicit_bounds"][:3] == [0.01, 0.02, 0.04]


def test_nothing_that_was_written_is_recorded(amulet: Amulet, recorded: Recorded) -> None:
    amulet.chat(QUESTION, preference="wish", stop=["question"])
    everything = recorded.spans[0].to_json() + json.dumps(recorded.points)
    assert [word for word in SECRETS if word in everything] == []


def test_a_failed_answer_names_the_kind_of_error_alone(amulet: Amulet, recorded: Recorded) -> None:
    def fail(ids: Any, scores: Any) -> Any:
        raise ValueError("the question was secret")

    with pytest.raises(DecodeError):
        amulet.chat(QUESTION, logits_processor=[fail])
    (span,) = recorded.spans
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert (span.attributes or {})["error.type"] == "ValueError"
    assert "secret" not in span.to_json()
    (point,) = recorded.points["gen_ai.client.operation.duration"]
    assert point["attributes"]["error.type"] == "ValueError"


def test_a_closed_stream_ends_its_span_once(amulet: Amulet, recorded: Recorded) -> None:
    with amulet.stream(QUESTION) as stream:
        next(stream)
    stream.close()
    (span,) = recorded.spans
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert span.status.status_code is StatusCode.UNSET


def test_what_is_refused_or_never_read_has_no_span(amulet: Amulet, recorded: Recorded) -> None:
    with pytest.raises(RequestError):
        amulet.chat(QUESTION, max_new_tokens=0)
    amulet.astream(QUESTION)
    assert recorded.spans == []


async def test_spans_are_below_the_caller_s(amulet: Amulet, recorded: Recorded) -> None:
    tracer = recorded.provider.get_tracer("test")
    with tracer.start_as_current_span("mine") as mine:
        amulet.chat(QUESTION)
        await amulet.achat(QUESTION)
        await amulet.abatch([{"messages": QUESTION}])
    assert len(recorded.spans) == 4
    for span in recorded.spans[:-1]:
        assert span.parent is not None
        assert span.parent.span_id == mine.get_span_context().span_id


def test_without_a_provider_nothing_is_imported() -> None:
    """Neither by the import nor by an answer; the scripted model is the test's own."""
    code = """if True:
        import sys
        from amulet import Amulet
        from tests.models import ScriptedModel, byte_tokenizer
        tokenizer = byte_tokenizer()
        amulet = Amulet(ScriptedModel(tokenizer, "hello"), tokenizer)
        amulet.chat([{"role": "user", "content": "x"}])
        sys.exit(len({"opentelemetry.trace", "opentelemetry.metrics"} & set(sys.modules)))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_api_without_a_provider_records_nothing(amulet: Amulet) -> None:
    assert amulet.chat(QUESTION).text == "hello"
