"""An engine driven with a clock of the test's own: when ids are there, and the arithmetic on these times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from qwenvl.bench import driving
from qwenvl.bench.driving import Answer, Driver, TimeUp, decoding_rate, gaps, percentiles, rate
from qwenvl.bench.workload import Ask
from qwenvl.generation.engine import Load


@dataclass(eq=False)
class Request:
    """One of the engine below."""

    new: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def cancel(self) -> None:
        """End it."""
        self.finish_reason = "cancelled"


class Engine:
    """One second a step, in which each of the first `rows` requests gets an id."""

    def __init__(self, rows: int = 2) -> None:
        self.now, self.rows = 100.0, rows
        self.requests: list[Request] = []
        self.given: dict[str, Any] = {}

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def submit(self, ids: list[int], pictures: object, **options: Any) -> Request:
        """Take one in."""
        self.given = {"ids": ids, "pictures": pictures, **options}
        self.requests.append(Request(options["max_new_tokens"]))
        return self.requests[-1]

    def step(self) -> bool:
        """One id for each that has a row."""
        self.requests = [request for request in self.requests if request.finish_reason is None]
        if not self.requests:
            return False
        self.now += 1
        for request in self.requests[: self.rows]:
            request.ids.append(7)
            if len(request.ids) == request.new:
                request.finish_reason = "length"
        self.requests = [request for request in self.requests if request.finish_reason is None]
        return bool(self.requests)

    @property
    def load(self) -> Load:
        """As an engine's."""
        waiting = max(len(self.requests) - self.rows, 0)
        return Load(len(self.requests) - waiting, waiting, self.rows, 10, 100)


def driver(engine: Engine, seconds: float = 1000) -> Driver:
    """Of an engine that is none."""
    return Driver(engine, engine.clock, engine.now + seconds)  # type: ignore[arg-type]


def ask(new: int) -> Ask:
    """A prompt of one id."""
    return Ask([1], (), new)


def times(*found: list[float]) -> list[Answer]:
    """Answers whose ids were there at these times, all due at 100."""
    return [Answer(Request(len(own)), 100.0, own) for own in found]  # type: ignore[arg-type]


def test_ids_are_timed_by_the_steps_that_brought_them() -> None:
    """All at once: those without a row wait, and that is part of their first token's time. No stop id ends one."""
    engine = Engine()
    answers = driver(engine).together([ask(2), ask(3), ask(1)])
    assert [answer.times for answer in answers] == [[101, 102], [101, 102, 103], [103]]
    assert [answer.first for answer in answers] == [1, 1, 3]
    assert engine.given == {"ids": [1], "pictures": None, "stop_ids": (), "max_new_tokens": 1}


def test_one_at_a_time_is_one_after_the_other() -> None:
    """The next is due when the one before has ended: nobody waits."""
    answers = driver(Engine()).in_turn([ask(2), ask(3)])
    assert [(answer.due, answer.times) for answer in answers] == [(100, [101, 102]), (102, [103, 104, 105])]


def test_a_request_counts_from_its_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from when the driver came to submit it, behind the step in which it arrived; an idle engine sleeps."""
    engine, slept = Engine(), list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        engine.now += seconds

    monkeypatch.setattr(driving, "sleep", sleep)
    answers = driver(engine).arriving([ask(2), ask(1), ask(1)], [0.25, 0.75, 10.0])
    assert [answer.due for answer in answers] == [100.25, 100.75, 110.0]
    assert [answer.times for answer in answers] == [[101.25, 102.25], [102.25], [111]]
    assert answers[1].first == 1.5
    assert slept == [0.25, 7.75]


def test_what_is_in_use_is_noted_after_each_step() -> None:
    """Rows, the queue and the cache, while there is something to do."""
    driven = driver(Engine())
    driven.together([ask(2), ask(2), ask(1)])
    assert [(load.active, load.waiting) for load in driven.loads] == [(2, 1), (1, 0), (0, 0)]


def test_a_stream_that_takes_too_long_is_ended() -> None:
    """It is an error, told in one line, for figures of half a stream are none; no row stays taken."""
    engine = Engine()
    with pytest.raises(TimeUp, match="not enough time"):
        driver(engine, seconds=3).together([ask(10)])
    assert engine.now == 104
    assert engine.requests == []


def test_what_goes_wrong_with_a_request_is_raised() -> None:
    """An engine goes on without it; a benchmark that did would measure less work."""
    engine = Engine()
    driven = driver(engine)
    driven.ask(ask(5))
    engine.requests[0].error = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"):
        driven.finish()


def test_rates_by_hand() -> None:
    """All ids from when the first was due; of decoding, those after the last first id, in the time after it."""
    answers = times([101, 102, 103, 106], [102, 103, 104])
    assert rate(answers) == 7 / 6
    assert decoding_rate(answers) == 4 / 4
    assert decoding_rate(times([101, 102], [110])) == 0  # the last began when the others had ended


def test_gaps_by_hand() -> None:
    """Between the ids of one answer, never of two; those that end after a time."""
    answers = times([101, 102, 105], [103, 103.5], [104])
    assert gaps(answers) == [1, 3, 0.5]
    assert gaps(answers, 103) == [3, 0.5]


@pytest.mark.parametrize(
    ("values", "middle", "high"),
    [([5.0], 5, 5), ([1.0, 3.0], 2, 2.9), (list(range(101)), 50, 95), ([0.0] * 19 + [100.0], 0, 5)],
)
def test_percentiles_by_hand(values: list[float], middle: float, high: float) -> None:
    """Between two values by their distance, in any order."""
    assert percentiles(values) == pytest.approx((middle, high))
    assert percentiles(values[::-1]) == pytest.approx((middle, high))
