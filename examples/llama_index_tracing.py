"""What LlamaIndex's instrumentation and OpenTelemetry record of steered answers."""

from __future__ import annotations

from typing import Any

from llama_index.core import Document, SummaryIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from amulet_integrations.llama_index import AmuletLLM, preference

TEXT = "Bees live in hives. They make honey from the nectar of flowers."


class Printer(BaseEventHandler):
    """Prints how each answer of the model was decoded."""

    @classmethod
    def class_name(cls) -> str:
        return "Printer"

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent | LLMCompletionEndEvent) and event.response:
            raw: Any = event.response.raw
            strength = (raw["steering"] or {}).get("strength")
            tokens = raw["usage"]["completion_tokens"]
            print(f"  event: stage {raw['stage']}, strength {strength}, {tokens} tokens")


def main() -> None:
    spans, provider = InMemorySpanExporter(), TracerProvider()  # or an OTLP exporter
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    get_dispatcher().add_event_handler(Printer())

    llm = AmuletLLM.embedded(max_tokens=32)
    index = SummaryIndex.from_documents([Document(text=TEXT)])
    engine = index.as_chat_engine(chat_mode="condense_plus_context", llm=llm)
    with preference("Answer in one short sentence."):
        for question in ("Where do bees live?", "What do they make there?"):
            print(f"{question} {engine.chat(question)}")  # the second one is condensed first
    for span in spans.get_finished_spans():
        found = dict(span.attributes or {})
        print(f"  span: {span.name}, strength {found.get('amulet.strength')}", end=", ")
        print(f"{found['gen_ai.usage.output_tokens']} tokens")
    assert not any(TEXT in span.to_json() for span in spans.get_finished_spans())


if __name__ == "__main__":
    main()
