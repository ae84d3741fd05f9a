"""What a server tells Prometheus.

Metrics   counts and times of one service, in a registry of its own
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answers import Answer

if TYPE_CHECKING:
    from .service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests and answers; asks the engine for what it is doing when somebody looks."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "qwenvl_requests", "Requests, by path and status", ["path", "status"], registry=registry
        )
        self._answers = Counter("qwenvl_answers", "Answers, by how they ended", ["reason"], registry=registry)
        self._prompt = Counter("qwenvl_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self._reused = Counter("qwenvl_reused_tokens", "Prompt tokens taken from earlier texts", registry=registry)
        self._new = Counter("qwenvl_new_tokens", "Tokens of answers", registry=registry)
        self._first = Histogram(
            "qwenvl_first_token_seconds", "From arrival to the first token", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "qwenvl_answer_seconds", "From arrival to the answer's end", buckets=SECONDS, registry=registry
        )
        for name, what, read in (
            ("qwenvl_active", "Answers that have a row of the cache", lambda: service.engine.load.active),
            ("qwenvl_waiting", "Answers that wait for a row", lambda: service.engine.load.waiting),
            ("qwenvl_busy", "Answers that are prepared, wait or are computed", lambda: service.busy),
            ("qwenvl_rows", "Rows of the cache", lambda: service.engine.load.rows),
            ("qwenvl_cache_tokens", "Tokens in the rows in use", lambda: service.engine.load.tokens),
            ("qwenvl_cache_slots", "Tokens that all rows have room for", lambda: service.engine.load.slots),
        ):
            Gauge(name, what, registry=registry).set_function(read)

    def answered(self, path: str, status: int) -> None:
        """A request has its status. `path` is a route's, of which there are few."""
        self._requests.labels(path, str(status)).inc()

    def ended(self, answer: Answer) -> None:
        """An answer is through, in whatever way."""
        request = answer.request
        self._answers.labels(answer.cut_because or request.finish_reason or "").inc()
        self._prompt.inc(len(request.prompt))
        self._reused.inc(request.reused)
        self._new.inc(len(request.ids))
        if answer.first_at is not None:
            self._first.observe(answer.first_at - answer.begun)
            self._whole.observe(time.monotonic() - answer.begun)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
