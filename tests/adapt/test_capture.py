"""Captured steps, pretended: what a GPU replays. That they equal the loop is in generation/test_decode.py."""

from __future__ import annotations

import pytest
import torch
from captured import PretendedStepper, pretend
from support import random_model, small_config

import qwenvl
from qwenvl.adapt import capture
from qwenvl.adapt.capture import Stepper
from qwenvl.adapt.packed import Kernel
from qwenvl.generation.decode import AHEAD, decode, prefill
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.pipeline import Pipeline


@pytest.fixture(scope="module")
def model() -> QwenVL:
    """Random weights; boundary at 64, 512 positions."""
    return random_model(small_config()).requires_grad_(False)


def prefilled(model: QwenVL, lengths: list[int], slots: int) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """A cache with a prompt in each row, left-padded, their ids, and the logits that follow."""
    width = max(lengths)
    ids = torch.randint(0, 60, (len(lengths), width), generator=torch.Generator().manual_seed(width))
    mask = torch.tensor([[column >= width - length for column in range(width)] for length in lengths])
    cache = KVCache.allocate(model.config, len(lengths), slots)
    return cache, ids, prefill(model, cache, ids, attention_mask=mask)


@pytest.mark.parametrize("lengths", [[5], [63], [64], [130], [60, 5, 90, 64]], ids=str)
def test_a_step_is_a_forward(model: QwenVL, lengths: list[int]) -> None:
    """The same logits and cache from tensors alone, in rows of any lengths, also beyond the trained one."""
    (one, _, _), (other, _, _) = (prefilled(model, lengths, 256) for _ in range(2))
    for slots in (160, 256):  # a later step in a larger bucket
        ids = torch.randint(0, 60, (len(lengths),), generator=torch.Generator().manual_seed(slots))
        with torch.no_grad():
            expected = model(ids[:, None], cache=one)[:, 0]
            stepped = model.decoder.step(ids, other.bucket(slots))
        other.host_lengths += 1
        torch.testing.assert_close(stepped, expected, atol=2e-5, rtol=0)
    assert torch.equal(one.lengths, other.lengths)
    torch.testing.assert_close(one.keys, other.keys, atol=2e-5, rtol=0)
    torch.testing.assert_close(one.values, other.values, atol=2e-5, rtol=0)


def test_a_full_row_harms_nobody(model: QwenVL) -> None:
    """One that has ended is stepped along beyond its last slot; the others do not notice."""
    cache, _, _ = prefilled(model, [20, 5], 20)
    alone, _, _ = prefilled(model, [20, 5], 64)
    ids = torch.tensor([1, 2])
    for _ in range(3):
        with torch.no_grad():
            stepped, expected = model.decoder.step(ids, cache), model.decoder.step(ids, alone)
        torch.testing.assert_close(stepped[1], expected[1], atol=2e-5, rtol=0)
    assert stepped.isfinite().all()


def test_one_capture_for_each_bucket(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets grow as the rows do, the last no further than the cache; none is captured twice."""
    pretend(monkeypatch, bucket=16)
    captured: list[int] = []
    capture = PretendedStepper._capture

    def counted(stepper: PretendedStepper, bucket: int) -> object:
        captured.append(bucket)
        return capture(stepper, bucket)

    monkeypatch.setattr(PretendedStepper, "_capture", counted)
    cache, ids, logits = prefilled(model, [30], 70)
    stepper = PretendedStepper(model, cache)
    options = SamplingOptions(max_new_tokens=38)
    first = [new.ids for new in decode(model, cache, logits, ids, options, stepper=stepper)]
    assert captured == [32, 48, 64, 70]
    cache.rewind([30])
    assert [new.ids for new in decode(model, cache, logits, ids, options, stepper=stepper)] == first
    assert captured == [32, 48, 64, 70]


@pytest.mark.parametrize("taken", [1, 2, AHEAD + 1, 9])
def test_steps_beyond_the_end_are_taken_back(model: QwenVL, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """A stop id, or a reader that goes away: the cache holds the prompt and all that was read but the last."""
    cache, ids, logits = prefilled(model, [60], 128)  # across the trained length, where an alpha would change
    options = SamplingOptions(max_new_tokens=20)
    every = [new.ids[0] for new in decode(model, cache, logits, ids, options)]
    pretend(monkeypatch)
    for stop_ids in ((), (every[taken - 1],)):
        expected = every[: every.index(every[taken - 1]) + 1] if stop_ids else every[:taken]
        cache.rewind([60])
        stream = decode(model, cache, logits, ids, options, stop_ids=[id_ for id_ in stop_ids if id_ is not None])
        found = []
        for new in stream:
            found.append(new.ids[0])
            if not stop_ids and len(found) == taken:
                break
        stream.close()  # type: ignore[attr-defined]
        assert found == expected
        assert cache.host_lengths.tolist() == cache.lengths.tolist() == [60 + len(expected) - 1]


def test_chats_reuse_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round has the stepper of the first while its cache lasts; and both say what they say uncaptured."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)

    def rounds() -> tuple[list[str], list[Stepper | None]]:
        talk, steppers, history = [], [], None
        for question in ("What is there?", "有几个图形？", "Yes or no?"):
            reply, history = vl.chat(question, history, do_sample=False, max_new_tokens=20)
            talk.append(reply)
            steppers.append(None if vl._session is None else vl._session.stepper)
        return talk, steppers

    plain, _ = rounds()
    pretend(monkeypatch)
    vl = Pipeline(vl.model, vl.tokenizer, vl.generation_config)
    talk, steppers = rounds()
    assert talk == plain
    assert isinstance(steppers[0], PretendedStepper)
    assert steppers[0] is steppers[1] is steppers[2]


def test_without_a_gpu_nothing_is_captured(model: QwenVL) -> None:
    """On a CPU a step is a forward, which reads no more of the cache than there is."""
    cache, _, _ = prefilled(model, [5], 64)
    assert not Stepper(model, cache).captures


@pytest.mark.parametrize("fails_at", [32, 48])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors"), "not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory to capture"),
    ],
    ids=["uncapturable", "memory"],
)
def test_a_capture_that_fails(
    model: QwenVL,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails_at: int,
    error: Exception,
    told: str,
) -> None:
    """The first or a later one: from there on steps are run as they are, with the same ids, and one line says so.

    What cannot be captured is not tried again; where memory ran out, another cache may have the room.
    """
    cache, ids, logits = prefilled(model, [28, 9], 80)
    options = SamplingOptions(max_new_tokens=40)
    expected = [new.ids for new in decode(model, cache, logits, ids, options)]
    lengths = cache.lengths.tolist()
    pretend(monkeypatch)
    monkeypatch.setattr(capture, "GRAPHS", Kernel("a CUDA graph"))
    captures = PretendedStepper._capture
    tried: list[int] = []

    def failing(stepper: PretendedStepper, bucket: int) -> object:
        tried.append(bucket)
        if bucket < fails_at:
            return captures(stepper, bucket)
        stepper.model.decoder.step(stepper._ids, stepper.cache.bucket(bucket))  # once for real, which counts a token
        raise error

    monkeypatch.setattr(PretendedStepper, "_capture", failing)
    for _ in range(2):
        cache.rewind([28, 9])
        assert [new.ids for new in decode(model, cache, logits, ids, options)] == expected
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == lengths
    lines = capsys.readouterr().err.splitlines()
    again = isinstance(error, torch.OutOfMemoryError)
    assert len(lines) == (2 if again else 1)
    assert all(told in line for line in lines)
    assert tried == list(range(32, fails_at + 1, 16)) * (2 if again else 1)
