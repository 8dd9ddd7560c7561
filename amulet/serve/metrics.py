"""Counters and times of a server, in Prometheus's form; they hold no text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's figures, in a registry of their own.

    Args:
        in_flight, waiting, rows, cache_bytes: called when the figures are read.
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
            "amulet_answers", "Answers by how they ended.", "finish_reason", "steered"
        )
        self.tokens = self._counter(
            "amulet_tokens",
            "Tokens: prompt (preferred rows), base_prompt (what steering adds), completion.",
            "kind",
        )
        self.seconds = self._histogram("amulet_request_seconds", "Time from request to its end.")
        self.first = self._histogram("amulet_first_token_seconds", "Time to the first token.")
        self._gauge("amulet_requests_in_flight", "Requests being answered.", in_flight)
        self._gauge("amulet_requests_waiting", "Requests without a place yet.", waiting)
        self._gauge("amulet_rows", "Rows of the batch being decoded.", rows)
        self._gauge("amulet_cache_bytes", "Their keys and values.", cache_bytes)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text form."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self._registry)

    def _gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(name, about, registry=self._registry).set_function(read)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, registry=self._registry, buckets=SECONDS)
