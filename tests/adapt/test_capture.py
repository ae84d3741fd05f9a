"""Captured steps, pretended: what a GPU replays. That they equal the loop is in generation/test_decode.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from captured import PretendedStepper, pretend
from packed_layers import packed_tensors
from support import random_model, small_config

import qwenvl
from qwenvl.adapt import capture
from qwenvl.adapt.capture import Stepper
from qwenvl.adapt.fuse import fuse
from qwenvl.adapt.int4 import quantize_structure
from qwenvl.adapt.packed import Kernel
from qwenvl.config import QuantizationConfig
from qwenvl.generation.decode import AHEAD, decode, prefill
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.pipeline import Pipeline
from qwenvl.weights.keymap import entries


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


def test_begun_in_inference_mode(model: QwenVL) -> None:
    """A session's stepper outlives the mode that its first round ran in; writing its ids once failed in the next."""
    with torch.inference_mode():
        cache, ids, _ = prefilled(model, [5], 64)
        stepper = PretendedStepper(model, cache)
    assert stepper(ids[:, 0]).isfinite().all()


def test_the_first_id_waits_for_no_step(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known after the prefill; whoever waits for it need not wait for a capture and the steps behind it."""
    pretend(monkeypatch)
    cache, ids, logits = prefilled(model, [5], 64)
    new = decode(model, cache, logits, ids, SamplingOptions(max_new_tokens=8))
    assert next(new).ids == logits.argmax(-1).tolist()
    assert cache.host_lengths.tolist() == [5]
    new.close()


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


# --- on a GPU --------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def gpu_model(packed: bool) -> QwenVL:
    """Random weights on the GPU, fused, as `load` leaves them."""
    if not packed:
        model = random_model(small_config())
    else:
        config = replace(small_config(), quantization_config=QuantizationConfig(group_size=32))
        model = QwenVL(config).eval()
        quantize_structure(model, config)
        tensors = packed_tensors(config)
        state = {e.ours: e.translate(tensors[e.reference], "reference", "qwenvl", config) for e in entries(config)}
        model.load_state_dict(state)
    model = model.requires_grad_(False).cuda()
    fuse(model)
    return model


def on_gpu(model: QwenVL, lengths: list[int], *, captured: bool) -> list[list[int | None]]:
    """Ids behind prompts of these lengths."""
    width = max(lengths)
    ids = torch.randint(0, 60, (len(lengths), width), generator=torch.Generator().manual_seed(width)).cuda()
    mask = torch.tensor([[column >= width - length for column in range(width)] for length in lengths]).cuda()
    cache = KVCache.allocate(model.config, len(lengths), 100, device="cuda")
    logits = prefill(model, cache, ids, attention_mask=mask)
    stepper = Stepper(model, cache)
    stepper.captures &= captured
    options = SamplingOptions(max_new_tokens=40)
    found = [new.ids for new in decode(model, cache, logits, ids, options, history_mask=mask, stepper=stepper)]
    assert stepper.captures == (captured and not capture.GRAPHS.failed)
    assert torch.equal(cache.lengths.cpu(), cache.host_lengths)
    return found


@on_a_gpu
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("lengths", [[30], [28, 9], [40] * 20], ids=["one row", "two rows", "twenty rows"])
def test_captured_steps_on_a_gpu(packed: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the loop's ids, bucket after bucket, and so does a second cache with its own captures."""
    monkeypatch.setattr(capture, "BUCKET", 16)
    model = gpu_model(packed)
    expected = on_gpu(model, lengths, captured=False)
    for _ in range(2):
        assert on_gpu(model, lengths, captured=True) == expected


@on_a_gpu
def test_a_capture_that_fails_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that waits for the device cannot be captured: the ids are the loop's, the stream is the one before."""
    monkeypatch.setattr(capture, "GRAPHS", Kernel("a CUDA graph"))
    model = gpu_model(packed=False)
    expected, stream = on_gpu(model, [30], captured=False), torch.cuda.current_stream()
    step = model.decoder.step

    def waiting(ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        int(ids.sum())
        return step(ids, cache)

    monkeypatch.setattr(model.decoder, "step", waiting)
    assert on_gpu(model, [30], captured=True) == expected
    assert torch.cuda.current_stream() == stream
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("a CUDA graph cannot be used here (")
