"""What goes wrong with one request is its own affair; running out of memory is a reason to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import pretend
from schedules import asked
from support import one_line_error, random_model, small_config
from torch import Tensor

from qwenvl.errors import CacheError, QwenVLError
from qwenvl.generation import request as request_module
from qwenvl.generation import schedule
from qwenvl.generation.decode import Chosen
from qwenvl.generation.engine import Engine
from qwenvl.generation.rows import Rows
from qwenvl.generation.sampling import warp
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL

SPAN = [60, 62, 62, 62, 62, 61]
POISON = 59  # the id whose embedding is no number, or on which something else fails


@pytest.fixture
def model() -> QwenVL:
    """Random weights, its own for every test."""
    return random_model(small_config()).requires_grad_(False)


@pytest.fixture(params=["eager", "late"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Steps as a CPU takes them, and as a GPU does: captured, their ids read a step late."""
    if request.param == "late":
        pretend(monkeypatch)
    return str(request.param)


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Ordinary ids, none of them the poison."""
    found: list[int] = torch.randint(1, POISON, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def failing(function: Callable[..., Tensor], when: Callable[[Tensor], bool], error: Exception) -> Callable[..., Tensor]:
    """`function`, which fails for some inputs after it has done its work."""

    def fails(given: Tensor, *rest: object, **named: object) -> Tensor:
        done = function(given, *rest, **named)
        if when(given):
            raise error
        return done

    return fails


@pytest.mark.usefixtures("way")
def test_numbers_that_are_none_stay_with_their_request(model: QwenVL) -> None:
    """NaN in one row ends its request with a plain word, neighbours and the row's next owner never see any of it."""
    model.decoder.wte.weight[POISON] = torch.nan
    model.decoder.lm_head.weight[POISON] = 0  # nobody says it by himself
    engine = Engine(model, rows=2, chunk=16)
    first = engine.submit(some_ids(20), max_new_tokens=12)
    sick = engine.submit([*some_ids(20, 1), POISON, *some_ids(20, 1)], max_new_tokens=12)
    following = engine.submit(some_ids(9, 2), max_new_tokens=12)
    with one_line_error(QwenVLError, "no next id can be chosen"):
        sick.result()
    assert sick.finish_reason == "error"
    assert first.result() == asked(model, some_ids(20), new_tokens=12).alone
    assert following.result() == asked(model, some_ids(9, 2), new_tokens=12).alone
    again = engine.submit([*some_ids(20, 1), 7], max_new_tokens=12)
    assert again.result() == asked(model, [*some_ids(20, 1), 7], new_tokens=12).alone


@pytest.mark.parametrize("end", ["scored", "continued", "cancelled", "cancelled in a step"])
def test_numbers_that_are_none_and_nobody_saw(model: QwenVL, end: str, way: str) -> None:
    """NaN that no id was chosen from, as it was scored or cancelled, is not left for the row's next owner either."""
    model.decoder.wte.weight[POISON] = torch.nan
    model.decoder.lm_head.weight[POISON] = 0
    engine = Engine(model, rows=3, chunk=64, max_length=128)
    going = asked(
        model, some_ids(60, 8), new_tokens=60
    )  # ids are read late where somebody decodes; and longer than all
    answers = [going.submit(engine)]
    for _ in range(2):
        engine.step()
    bad = [*some_ids(40, 1), POISON, *some_ids(20, 2)]
    for _ in range(2):  # both rows
        if end in ("scored", "continued"):
            with one_line_error(QwenVLError, "no next id"):
                engine.score(bad if end == "scored" else some_ids(40, 1), [[POISON, 4, 5]])
    sick = [engine.submit([seed, *bad[:40]], max_new_tokens=20) for seed in (1, 2) if end.startswith("cancelled")]
    for request in sick:
        if end == "cancelled":
            request.signs[-1] = request.prompt[-1] = POISON
    if end == "cancelled in a step":
        for _ in range(4):
            engine.step()
        for request in sick:
            engine._rows.next_ids[request.row] = POISON
    engine.step()
    for request in sick:
        assert way == "eager" or request.finish_reason is None
        request.cancel()
    requests = [going, *(asked(model, some_ids(9 + 3 * seed, seed), new_tokens=12) for seed in range(2))]
    answers += [one.submit(engine) for one in requests[1:]]
    assert [answer.result() for answer in answers] == [one.alone for one in requests]


@pytest.mark.parametrize("phase", ["prompt", "step"])
def test_a_computation_that_fails_for_one_row_fails_for_it_alone(
    model: QwenVL, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that raises is computed row by row, so that only those fail whose fault it is."""
    engine = Engine(model, rows=3, chunk=512)
    requests = [asked(model, some_ids(9 + seed, seed), new_tokens=6) for seed in range(3)]
    culprit = requests[1].ids[3] if phase == "prompt" else requests[1].alone[2]
    told = model.decoder.wte.weight[culprit]
    answers = [one.submit(engine) for one in requests]

    def shown(x: Tensor) -> bool:
        """Among the embeddings of a prompt that is longer than the first, or in a step."""
        return bool((x == told).all(-1).any()) and (x.shape[1] == 1 if phase == "step" else x.shape[1] >= 10)

    monkeypatch.setattr(model.decoder, "forward", failing(model.decoder.forward, shown, RuntimeError("broken kernel")))
    for _ in range(30):
        engine.step()
    said = [request.alone for request in requests]
    for number, answer in enumerate(answers):
        fed = requests[number].ids if phase == "prompt" else said[number][:-1]
        if culprit in fed and len(requests[number].ids) > 9 * (phase == "prompt"):
            with pytest.raises(RuntimeError, match="broken kernel"):
                answer.result()
            assert answer.ids == ([] if phase == "prompt" else said[number][: said[number].index(culprit) + 1])
        else:
            assert answer.result() == said[number]
    assert engine.load.active == 0


@pytest.mark.usefixtures("way")
def test_a_callback_that_raises_ends_its_own_request(model: QwenVL) -> None:
    """`should_stop` is somebody's code: its error is raised where its request is iterated over, after the ids."""
    engine = Engine(model, rows=2)

    def broken(_: int) -> bool:
        raise ZeroDivisionError

    sick = engine.submit(some_ids(9), max_new_tokens=5, should_stop=broken)
    well = engine.submit(some_ids(8), max_new_tokens=5)
    alone = asked(model, some_ids(9), new_tokens=5).alone
    assert next(sick) == alone[0]
    with pytest.raises(ZeroDivisionError):
        next(sick)
    assert well.result() == asked(model, some_ids(8), new_tokens=5).alone


def test_too_large_beside_others_is_computed_alone(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt for which the device has no memory while others hold theirs waits until they have ended, first in the
    queue; what it has said and drawn at random so far stands.
    """
    engine = Engine(model, rows=3, chunk=64)
    beside = [asked(model, some_ids(9, seed), new_tokens=9, do_sample=True, seed=seed) for seed in range(2)]
    answers = [one.submit(engine) for one in beside]
    engine.step()

    def large(x: Tensor) -> bool:
        return x.shape[1] > 30 and engine.load.active > 1

    big = asked(model, some_ids(40, 7), new_tokens=5)
    monkeypatch.setattr(
        model.decoder, "forward", failing(model.decoder.forward, large, torch.OutOfMemoryError("CUDA out of memory"))
    )
    answer, after = big.submit(engine), beside[0].submit(engine)
    engine.step()
    assert (engine.load.active, engine.load.waiting) == (2, 2)
    assert answer.result() == big.alone
    assert [one.finish_reason for one in answers] == ["length"] * 2
    assert not after.ids
    assert [one.result() for one in (*answers, after)] == [beside[0].alone, beside[1].alone, beside[0].alone]


def test_a_step_without_memory_sends_the_last_away(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are too many: the youngest goes back to the queue with what it has said, and ends as it would have."""
    engine = Engine(model, rows=3)
    requests = [asked(model, some_ids(9, seed), new_tokens=12, do_sample=True, seed=seed) for seed in range(3)]
    answers = [one.submit(engine) for one in requests]
    for _ in range(4):
        engine.step()
    assert [len(answer.ids) for answer in answers] == [4, 4, 4]
    failure = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(model.decoder, "forward", failing(model.decoder.forward, lambda x: len(x) > 2, failure))
    engine.step()
    engine.step()
    assert engine.load.waiting == 1
    assert [len(answer.ids) for answer in answers] == [5, 5, 4]
    assert [answer.result() for answer in answers] == [one.alone for one in requests]


def test_too_large_alone_says_what_would_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that does not fit into the device's memory by itself is refused in one line; the next is answered."""
    engine = Engine(model, rows=2, chunk=512)
    monkeypatch.setattr(
        model.decoder,
        "forward",
        failing(model.decoder.forward, lambda x: x.shape[1] > 30, torch.OutOfMemoryError("CUDA out of memory")),
    )
    with one_line_error(CacheError, "out of memory"):
        engine.submit(some_ids(40)).result()
    assert len(engine.submit(some_ids(20), max_new_tokens=3).result()) == 3


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("where", ["forward", "step", "choose", "read", "hand out", "finish", "swap"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_interrupted_step_loses_nothing(
    model: QwenVL, where: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C anywhere in a step, or memory that runs out where no request can be named: whoever goes on driving gets
    what would have come, drawn ids too; nobody waits for a driver that is gone.
    """
    requests = [
        asked(model, some_ids(9 + 5 * seed, seed), new_tokens=4 + 3 * seed, do_sample=seed > 0, seed=seed)
        for seed in range(4)
    ]
    place: tuple[object, str] = {
        "forward": (model.decoder.blocks[1], "forward"),
        "step": (model.decoder.ln_f, "forward"),
        "choose": (schedule, "choose"),
        "read": (Chosen, "read"),
        "hand out": (Rows, "note"),
        "finish": (schedule.Scheduler, "_finish"),
        "swap": (KVCache, "reorder"),
    }[where]
    plain = getattr(*place)
    for at in (1, 2, 3, 5, 8):
        calls = 0

        def now_and_then(*given: object, at: int = at, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise kind
            return plain(*given, **named)

        engine = Engine(model, rows=3, chunk=16)
        answers = [one.submit(engine) for one in requests]
        with monkeypatch.context() as patch:
            patch.setattr(*place, now_and_then)
            for _ in range(200):
                try:
                    if not engine.step():
                        break
                except KeyboardInterrupt:
                    assert kind is KeyboardInterrupt
        assert [answer.result() for answer in answers] == [one.alone for one in requests]
        assert engine.load.active == engine.load.waiting == 0
        totals = engine.totals
        assert totals.prompt_tokens == sum(len(one.ids) for one in requests)
        assert totals.new_tokens == sum(len(one.alone) for one in requests)
        assert totals.reused_tokens == sum(answer.reused for answer in answers) == 0


def test_what_fails_again_and_again_is_everyones_error(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried for ever: where computing anew does not help either, requests end with what went wrong."""
    engine = Engine(model, rows=3)
    answers = [engine.submit(some_ids(9, seed), max_new_tokens=4) for seed in range(3)]

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "note", broken)
        for answer in answers:
            with pytest.raises(RuntimeError, match="broken"):
                answer.result()
    assert engine.submit(some_ids(9), max_new_tokens=4).result() == asked(model, some_ids(9), new_tokens=4).alone


def test_a_row_that_cannot_be_given_is_an_error(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cannot be admitted is told so, instead of waiting for ever."""
    engine = Engine(model, rows=2)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "take", broken)
        with pytest.raises(RuntimeError, match="broken"):
            engine.submit(some_ids(9)).result()
    assert engine.submit(some_ids(9), max_new_tokens=4).result() == asked(model, some_ids(9), new_tokens=4).alone


def test_a_failed_choice_is_not_drawn_twice(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose ids could not all be chosen is taken anew: what had been drawn for some was once drawn again."""
    requests = [
        asked(model, some_ids(9, seed), new_tokens=8, do_sample=True, seed=seed, top_k=seed) for seed in range(3)
    ]
    engine = Engine(model, rows=3)
    answers = [one.submit(engine) for one in requests]
    calls = 0

    def fails(*given: Any, **named: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in (5, 12):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return warp(*given, **named)

    monkeypatch.setattr(request_module, "warp", fails)
    assert [answer.result() for answer in answers] == [one.alone for one in requests]
