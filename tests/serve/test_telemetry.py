"""The server's spans are part of the trace that a request's headers name."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from amulet.output.telemetry import of_caller
from amulet.serve.app import create_app
from tests.serve.conftest import asking, saying, user

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk, of the extra `dev`")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = "/v1/chat/completions"


def chats(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name.startswith("chat ")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_s_trace_goes_on(
    stream: bool, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    app = create_app(saying(tokenizer, "hello"), name="m")
    body = {"messages": user("question"), "preference": "wish", "stream": stream}
    async with asking(app) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert (await client.post(CHAT, json=body, headers=headers)).status_code == 200
        assert (await client.post(CHAT, json=body)).status_code == 200
    below, own = chats(exporter)  # among FastAPI's own spans, in versions that have them
    assert below.context.trace_id == int(TRACE, 16)
    assert below.parent is not None
    assert own.context.trace_id != int(TRACE, 16)
    assert (below.attributes or {})["amulet.strength"] == 0.35
    for word in ("question", "wish", "hello"):
        assert word not in below.to_json()


def test_a_span_of_an_instrumentation_stays_the_parent() -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with of_caller(headers):
        assert trace.get_current_span().get_span_context().span_id == int(PARENT, 16)
        tracer = TracerProvider().get_tracer("asgi")
        with tracer.start_as_current_span("http") as http, of_caller(headers):
            assert trace.get_current_span() is http
    assert not trace.get_current_span().get_span_context().is_valid
