"""What a server tells Prometheus.

Metrics   counts and times of one service, in a registry of its own
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .answers import Answer

if TYPE_CHECKING:
    from .service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests and answers; asks the engine for what it has done, and is doing, when somebody looks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "qwenvl_requests", "Requests, by path and status", ["path", "status"], registry=registry
        )
        self._answers = Counter("qwenvl_answers", "Answers, by how they ended", ["reason"], registry=registry)
        self._first = Histogram(
            "qwenvl_first_token_seconds", "From arrival to the first token", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "qwenvl_answer_seconds", "From arrival to the answer's end", buckets=SECONDS, registry=registry
        )
        registry.register(self)

    def answered(self, path: str, status: int) -> None:
        """A request has its status. `path` is a route's, of which there are few."""
        self._requests.labels(path, str(status)).inc()

    def ended(self, answer: Answer) -> None:
        """An answer is through, in whatever way."""
        self._answers.labels(answer.cut_because or answer.request.finish_reason).inc()
        if answer.first_at is not None:
            self._first.observe(answer.first_at - answer.begun)
            self._whole.observe(time.monotonic() - answer.begun)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for: the engine's numbers, all of one moment."""
        load, totals = self._service.engine.load, self._service.engine.totals
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts that were given a row", totals.prompt_tokens),
            ("reused_tokens", "Of these, taken from earlier texts", totals.reused_tokens),
            ("new_tokens", "Tokens of answers", totals.new_tokens),
            ("steps", "Steps of the engine", totals.steps),
        ):
            yield CounterMetricFamily(f"qwenvl_{name}", what, value)
        for name, what, value in (
            ("busy", "Answers that are prepared, wait or are computed", self._service.busy),
            ("active", "Answers that have a row of the cache", load.active),
            ("waiting", "Answers that wait for a row", load.waiting),
            ("rows", "Rows of the cache", load.rows),
            ("cache_tokens", "Tokens in the rows in use", load.tokens),
            ("cache_slots", "Tokens that all rows have room for", load.slots),
        ):
            yield GaugeMetricFamily(f"qwenvl_{name}", what, value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
