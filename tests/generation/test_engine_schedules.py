"""Whatever comes, whenever it comes: nobody's answer depends on the others, nobody waits for ever, no row is lost."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from captured import pretend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schedules import Asked, differs, mixed
from support import Golden, random_model, small_config

import qwenvl
from qwenvl.generation.engine import Engine
from qwenvl.generation.request import Request
from qwenvl.model.qwenvl import QwenVL

SLOTS = 256
POOL = 40  # requests to draw from, whose answers alone are computed once


@dataclass
class Live:
    """A request on its way: what was asked, and the steps at which it came and had its row."""

    asked: Asked
    request: Request
    came: int
    ahead: int  # in the queue when it came
    began: int | None = None
    ended: int | None = None


@dataclass(frozen=True)
class Schedule:
    """How an engine is made, and what happens to it."""

    rows: int
    chunk: int
    lookup: int
    late: bool
    seed: int
    asked: list[int]
    pace: float  # how likely another request comes in a step
    hang_ups: float  # how many of them are cancelled at some time
    no_memory: float  # how likely a computation of several rows runs out of memory


schedules = st.builds(
    Schedule,
    rows=st.integers(1, 5),
    chunk=st.sampled_from([3, 9, 32, 64, 2048]),
    lookup=st.sampled_from([0, 0, 3]),
    late=st.booleans(),
    seed=st.integers(0, 10_000),
    asked=st.lists(st.integers(0, POOL - 1), min_size=1, max_size=8),
    pace=st.sampled_from([0.1, 0.5, 1.0]),
    hang_ups=st.sampled_from([0.0, 0.0, 0.3]),
    no_memory=st.sampled_from([0.0, 0.0, 0.0, 0.1]),
)


@pytest.fixture(scope="module")
def model() -> QwenVL:
    """Random weights; prompts of more than 64 ids, and of more than 128, stretch their rotation."""
    return random_model(small_config()).requires_grad_(False)


@pytest.fixture(scope="module")
def pool(model: QwenVL) -> list[Asked]:
    """Prompts with and without pictures, of all lengths, some of which go on from others."""
    found = mixed(model, 2 * POOL, 90)[:POOL]
    assert len(found) == POOL
    assert max(len(one.ids) for one in found) > 128
    return found


def span(one: Live, chunk: int, rows: int) -> int:
    """Steps after which a request leaves its row at the latest, as the engine's docstring says."""
    request, shown = one.request, 0 if one.asked.pixels is None else len(one.asked.pixels)
    prompt = math.ceil(len(request.prompt) / chunk)
    return rows * (prompt + shown + 1) + request.limit + 1


def run(model: QwenVL, pool: list[Asked], schedule: Schedule) -> Iterator[Live]:
    """Let it all happen; yield each request, once everything is over."""
    draw = random.Random(schedule.seed)
    engine = Engine(model, rows=schedule.rows, chunk=schedule.chunk, lookup=schedule.lookup, max_length=SLOTS)
    coming, live, steps = [pool[number] for number in schedule.asked], [], 0
    doomed: set[int] = set()
    while True:
        while coming and draw.random() < schedule.pace:
            waiting = sum(one.began is None and one.request.finish_reason is None for one in live)
            live.append(Live(one := coming.pop(0), one.submit(engine), steps, waiting))
            if draw.random() < schedule.hang_ups:
                doomed.add(len(live) - 1)
        for number in doomed:
            if draw.random() < 0.1:
                live[number].request.cancel()
        more = engine.step()
        steps += 1
        for one in live:
            if one.began is None and (one.request.row >= 0 or one.request.finish_reason is not None):
                one.began = steps
            if one.ended is None and one.request.finish_reason is not None:
                one.ended = steps
        load, rows = engine.load, engine._rows
        assert [request.row for request in rows.requests] == list(range(load.active))
        assert rows.decoding <= load.active <= sum(one.request.finish_reason in (None, "cancelled") for one in live)
        assert (rows._known <= rows.cache.host_lengths.numpy()).all()
        if not more and not coming:
            break
        assert steps < 20_000, "it never ends"
    assert (load.active, load.waiting, load.tokens) == (0, 0, 0)
    assert all(one.request.row == -1 and one.request.embeddings is None for one in live)
    assert not engine._scheduler._turns
    assert not engine._scheduler._unread
    answered = [one.request for one in live if one.request.finish_reason != "cancelled"]
    totals, everyone = engine.totals, [one.request for one in live]
    assert totals.new_tokens == sum(len(request.ids) for request in everyone)
    assert totals.reused_tokens == sum(request.reused for request in everyone)
    assert sum(len(r.prompt) for r in answered) <= totals.prompt_tokens <= sum(len(r.prompt) for r in everyone)
    assert totals.steps <= steps
    yield from live


def check(model: QwenVL, pool: list[Asked], schedule: Schedule) -> None:
    """What must be true of every schedule."""
    with pytest.MonkeyPatch.context() as patch:
        if schedule.late:
            pretend(patch)
        if schedule.no_memory:
            scarce(patch, model, schedule)
        lives = list(run(model, pool, schedule))
    longest = max(span(one, schedule.chunk, schedule.rows) for one in lives)
    for one in lives:
        assert one.request.error is None, one.request.error
        if one.request.finish_reason == "cancelled":
            said = one.request.ids
            assert said == one.asked.alone[: len(said)]
            continue
        assert one.request.finish_reason == "length"
        assert differs(model, one.asked, one.request.ids) == ""
        assert one.began is not None
        assert one.ended is not None
        if not schedule.no_memory:  # in which they wait for one another
            assert one.ended - one.began <= span(one, schedule.chunk, schedule.rows)
            assert one.began - one.came <= (one.ahead // schedule.rows + 1) * longest + 1


def scarce(patch: pytest.MonkeyPatch, model: QwenVL, schedule: Schedule) -> None:
    """Computations of several rows, or beside others, run out of memory now and then; of one row alone, never."""
    draw = random.Random(schedule.seed)
    forward, step = model.decoder.forward, model.decoder.step

    def sometimes(compute: object, rows: int, *given: object, **more: object) -> object:
        if rows > 1 and draw.random() < schedule.no_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(*given, **more)  # type: ignore[operator]

    patch.setattr(model.decoder, "forward", lambda x, *a, **k: sometimes(forward, len(x), x, *a, **k))
    patch.setattr(model.decoder, "step", lambda ids, *a: sometimes(step, len(ids), ids, *a))


@pytest.fixture(scope="module", params=["tiny-112", "tiny-448", "tiny"])
def real(request: pytest.FixtureRequest) -> tuple[QwenVL, list[Asked]]:
    """The goldens' models and the embedded one, with prompts to draw from."""
    if request.param == "tiny":
        model = qwenvl.load("tiny", dtype="float32", device="cpu", quiet=True).model
    else:
        golden: Golden = request.getfixturevalue(request.param.replace("-", "_"))
        model = golden.model
    room = SLOTS - 17
    found = [one for one in mixed(model, 30, 60) if len(one.ids) <= room]
    assert len(found) > 8
    return model, found


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_schedules_of_other_models(real: tuple[QwenVL, list[Asked]], schedule: Schedule) -> None:
    """So too with the goldens' weights, where the real grid of patches is, and with weights that have learnt."""
    model, pool = real
    check(model, pool, replace(schedule, asked=[number % len(pool) for number in schedule.asked]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_any_schedule(model: QwenVL, pool: list[Asked], schedule: Schedule) -> None:
    """Arrivals, lengths, pictures, cancellations, chunks, reuse, guesses, scarce memory: all answers are as alone."""
    check(model, pool, schedule)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_a_thousand_schedules(model: QwenVL, pool: list[Asked], schedule: Schedule) -> None:
    """The same, of many more."""
    check(model, pool, schedule)
