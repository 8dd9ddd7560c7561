"""A server's metrics in Prometheus's format; they contain no text of requests."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's metrics, in their own registry.

    Args:
        in_flight, waiting, rows, cache_bytes: called when the metrics are read.
    """

    def __init__(
        self,
        *,
        in_flight: Callable[[], float],
        waiting: Callable[[], float],
        rows: Callable[[], float],
        cache_bytes: Callable[[], float],
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, open files, processor time
        self.requests = self._counter(
            "amulet_requests", "Requests by route and status.", "route", "status"
        )
        self.answers = self._counter(
            "amulet_answers", "Answers by finish reason.", "finish_reason", "steered"
        )
        self.tokens = self._counter(
            "amulet_tokens",
            "Tokens: prompt (preferred rows), base_prompt (added by steering), completion.",
            "kind",
        )
        self.seconds = self._histogram("amulet_request_seconds", "Time from a request to its end.")
        self.first = self._histogram("amulet_first_token_seconds", "Time to the first token.")
        self._gauge("amulet_requests_in_flight", "Requests being answered.", in_flight)
        self._gauge(
            "amulet_requests_waiting", "Requests waiting for a place in the batch.", waiting
        )
        self._gauge("amulet_rows", "Rows in the batch.", rows)
        self._gauge("amulet_cache_bytes", "Size of their KV cache.", cache_bytes)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self._registry)

    def _gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(name, about, registry=self._registry).set_function(read)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, registry=self._registry, buckets=SECONDS)
