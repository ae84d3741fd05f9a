"""The parts of one model, on a small one: all are measured, one that fails takes no other with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import small_config

import qwenvl
from qwenvl.adapt import capture
from qwenvl.bench import decoding, measure
from qwenvl.bench.decoding import Stretch, TimedStepper, longest_run, stretch
from qwenvl.bench.device import Device, Timing, timed
from qwenvl.bench.figures import Figure, Missing
from qwenvl.bench.measure import compiled, measure_model
from qwenvl.bench.plan import IN_A_MODEL, TINY
from qwenvl.bench.random_weights import random_model, write_checkpoint
from qwenvl.bench.roofline import Limits, stepping
from qwenvl.bench.subject import Subject
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.errors import CheckpointError
from qwenvl.generation.decode import decode, prefill
from qwenvl.generation.sampling import SamplingOptions
from qwenvl.model.cache import KVCache
from qwenvl.model.qwenvl import QwenVL
from qwenvl.training.memory import weight_bytes

CPU = Device(torch.device("cpu"))
CONFIG = small_config()
PACKED = replace(CONFIG, quantization_config=QuantizationConfig(group_size=64))
PLAN = replace(TINY, parts=IN_A_MODEL, prefill=12, decode=(20, 10_000), repeats=2, rows=(1, 3), most_steps=16)


@pytest.fixture(scope="module")
def model() -> QwenVL:
    """Random weights; 512 positions."""
    return random_model(CONFIG, torch.float32, CPU)


def subject(model: QwenVL) -> Subject:
    """On a CPU that moves 1 GB and does 1 GFLOP in a second."""
    return Subject(model, CPU, Limits(1e9, 1e9), "float32")


def test_every_part_has_its_figures(model: QwenVL) -> None:
    """Encoding, prefill with and without it, the first token, batches, and lengths as far as positions last."""
    events = list(measure_model(subject(model), PLAN, 60))
    figures = [event for event in events if isinstance(event, Figure)]
    assert [(figure.part, figure.name, figure.unit) for figure in figures] == [
        ("encode", "encode one image", "ms"),
        ("prefill", "prefill 12 with an image", "ms"),
        ("prefill", "prefill 12, image encoded before", "ms"),
        ("first-token", "first token behind an image", "ms"),
        ("batch", "batch of 1, 16 + 8 tokens", "tok/s"),
        ("batch", "batch of 3, 16 + 8 tokens", "tok/s"),
        ("decode", "decode 20", "tok/s"),
        ("decode", "decode 506", "tok/s"),
    ]
    assert all(figure.value > 0 and figure.limit > 0 and figure.limited_by for figure in figures)
    assert [event for event in events if isinstance(event, str)][:2] == ["float32: encode", "float32: prefill"]
    assert not any(isinstance(event, Missing) for event in events)
    *_, longest = figures
    assert (longest.whole, longest.note) == (False, "16 of 505 steps, from 250 tokens on")
    assert longest.details["bytes_per_step"] == stepping(CONFIG, 4, 1, 250 + 17 / 2).bytes


@pytest.mark.parametrize("where", ["cache", "prefill"])
def test_out_of_memory_says_what_would_fit(model: QwenVL, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """One line for the batch that does not fit; those before and after it are measured."""
    allocate = KVCache.allocate.__func__  # type: ignore[attr-defined]

    def full(config: QwenVLConfig, batch: int, *rest: object) -> KVCache:
        if batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        cache: KVCache = allocate(KVCache, config, batch, *rest)
        return cache

    def full_prefill(model: QwenVL, cache: KVCache, *rest: torch.Tensor, **images: torch.Tensor) -> torch.Tensor:
        if cache.batch == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return prefill(model, cache, *rest, **images)

    if where == "cache":
        monkeypatch.setattr(KVCache, "allocate", full)
    else:
        monkeypatch.setattr(decoding, "prefill", full_prefill)
    events = list(measure_model(subject(model), PLAN, 60))
    (missing,) = (event for event in events if isinstance(event, Missing))
    assert (missing.part, missing.failed) == ("batch", True)
    assert missing.reason.startswith("out of memory on cpu: the cache of 3 x 24 tokens takes ")
    assert missing.reason.endswith("ask for fewer tokens or rows, or load an int4 checkpoint")
    assert "\n" not in missing.reason
    assert len([event for event in events if isinstance(event, Figure)]) == 7


def test_a_part_that_fails_takes_no_other_with_it(
    model: QwenVL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its traceback goes to stderr, for it is a bug."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")

    monkeypatch.setattr(measure, "generate_batch", broken)
    events = list(measure_model(subject(model), PLAN, 60))
    missing = [event for event in events if isinstance(event, Missing)]
    assert [event.part for event in missing] == ["prefill"]
    assert "encountered and much more (test_measure.py, line " in missing[0].reason
    assert "Traceback" in capsys.readouterr().err
    assert len([event for event in events if isinstance(event, Figure)]) == 6


class Clock:
    """Seconds that pass as the steps of `stretch` are said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "most", "steps"), [(1000, 0, 200), (1000, 50, 50), (100, 0, 73), (1, 0, 16)])
def test_a_run_is_cut_to_its_time(
    model: QwenVL, monkeypatch: pytest.MonkeyPatch, seconds: float, most: int, steps: int
) -> None:
    """In the middle of what was wanted, where attention takes what it does on average; at least a few steps."""
    clock = Clock()

    def one_second_a_step(stepper: TimedStepper, *_: object, seconds: float) -> Stretch:  # noqa: ARG001
        (_, _, count), begun = _, int(stepper.cache.host_lengths[0])
        clock.now += count
        return Stretch(begun, count, count, float(count), 0, 0.0)

    monkeypatch.setattr(decoding, "stretch", one_second_a_step)
    cache = KVCache.allocate(CONFIG, 1, 512)
    ids = torch.zeros(1, 10, dtype=torch.int64)
    logits = prefill(model, cache, ids)
    stepper = TimedStepper(model, cache, Device(torch.device("cpu"), clock))
    first, run = longest_run(stepper, logits, ids, 200, seconds=seconds, most=most)
    assert (first.begin, first.steps) == (10, 8)
    assert (run.steps, run.wanted) == (steps, 200)
    assert run.begin == 10 + (200 - steps) // 2
    assert int(cache.host_lengths[0]) == run.begin


def test_the_first_token_of_several(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that the loop did before it read the first id would count; there are none, also where ids are read late."""
    clock, step = Clock(), capture.Stepper.__call__

    def a_second(stepper: capture.Stepper, ids: torch.Tensor, going: torch.Tensor | None = None) -> torch.Tensor:
        clock.now += 1
        return step(stepper, ids, going)

    ids, pixels = subject(model).prompt(subject(model).span), subject(model).pixels("cpu")
    monkeypatch.setattr(capture.Stepper, "__call__", a_second)
    device = Device(torch.device("cpu"), clock)
    assert decoding.first_id(model, ids, pixels, device) == 0
    monkeypatch.setattr(capture.Stepper, "captures", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(capture.Stepper, "_replay", lambda *_: None)
    assert decoding.first_id(model, ids, pixels, device) == 0


def test_a_stretch_counts_steps(model: QwenVL) -> None:
    """The first new token takes no step; attention reads what was there, and its own."""
    cache, ids = KVCache.allocate(CONFIG, 1, 64), torch.zeros(1, 10, dtype=torch.int64)
    logits = prefill(model, cache, ids)
    found = stretch(TimedStepper(model, cache, CPU), logits, ids, 9, seconds=60)
    assert (found.begin, found.steps, found.graphs) == (10, 9, 0)
    assert found.context == sum(range(11, 20)) / 9 == 15
    assert int(cache.host_lengths[0]) == 19


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["float32", "int4"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_choose_the_same(config: QwenVLConfig, backend: str) -> None:
    """A step is one graph of operations for torch.compile, packed weights and all, and greedy ids are the same."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    model = random_model(config, torch.float32, CPU)
    ids = torch.randint(0, 60, (1, 40), generator=torch.Generator().manual_seed(0))

    def chosen(**options: str) -> tuple[list[list[int | None]], TimedStepper]:
        cache = KVCache.allocate(config, 1, 100)
        logits, stepper = prefill(model, cache, ids), TimedStepper(model, cache, CPU, **options)
        stream = decode(model, cache, logits, ids, SamplingOptions(max_new_tokens=40), stepper=stepper)
        return [new.ids for new in stream], stepper

    (plain, _), (new, stepper) = chosen(), chosen(backend=backend)
    assert new == plain
    assert (stepper.captured, stepper.captures) == (1, True)
    assert stepper.capture_seconds > 0


def test_without_a_compiler_compiling_is_left_out(model: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and no failure."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    (event,) = compiled(subject(model), PLAN, 60)
    reason = "torch.compile needs a compiler, and there is no no-such-compiler"
    assert event == Missing("compile", "float32", reason, failed=False)


def test_a_step_that_does_not_compile_is_left_out(
    model: QwenVL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uncompiled figure stays, one line says why there is no other, and nothing else is passed off as compiled.

    That torch.compile failed was once told as CUDA graphs that fail, which no stepper of the process then captured.
    """

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("backend='inductor' raised:\nno kernel\n" + 1000 * "more ")

    def compile_badly(step: object, **_: object) -> object:  # noqa: ARG001
        return broken

    monkeypatch.setattr(decoding.torch, "compile", compile_badly)
    monkeypatch.setattr(measure.shutil, "which", lambda name: name)
    monkeypatch.setattr(capture, "GRAPHS", capture.Kernel("a graph"))
    events = list(measure.guarded("compile", "float32", lambda: compiled(subject(model), PLAN, 60)))
    assert [event.name for event in events if isinstance(event, Figure)] == ["decode 250, not compiled"]
    (missing,) = (event for event in events if isinstance(event, Missing))
    told = "RuntimeError: a step compiled by torch.compile failed: RuntimeError: backend='inductor' raised: no kernel"
    assert missing.reason.startswith(told)
    assert not capture.GRAPHS.failed
    assert "CUDA graph" not in capsys.readouterr().err
    assert len(missing.reason) < 300
    assert not missing.failed


def test_first_calls_are_told_apart() -> None:
    """The median is of the calls after the first; there is one at least, whatever the time."""
    clock, taken = Clock(), iter([50.0, 3.0, 1.0, 2.0])

    def call() -> None:
        clock.now += next(taken)

    assert timed(call, Device(torch.device("cpu"), clock), runs=3, seconds=1000) == Timing(50.0, 2.0, 3)
    taken = iter([50.0, 3.0])
    assert timed(call, Device(torch.device("cpu"), clock), runs=3, seconds=1) == Timing(50.0, 3.0, 1)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_weights_are_a_checkpoint(config: QwenVLConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    """The folder loads; the model that is drawn in place has the same tensors; a step of each is finite."""
    write_checkpoint(tmp_path / "made", config, dtype, CPU)
    written = qwenvl.load(tmp_path / "made", "cpu", dtype, quiet=True).model
    drawn = random_model(config, dtype, CPU)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in written.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in drawn.state_dict().items()}
    stored = sum(path.stat().st_size for path in (tmp_path / "made").glob("*.safetensors"))
    assert 0 <= stored - weight_bytes(config, dtype.itemsize) < 20_000  # the header
    for made in (written, drawn):
        with torch.no_grad():
            assert made(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what they take, what there is, and what would fit, before anything is drawn."""
    needed, packed = weight_bytes(CONFIG, 4), weight_bytes(replace(CONFIG, quantization_config=QuantizationConfig()), 2)
    for free, advice in ((needed - 1, "--int4 takes"), (packed - 1, "use a device with more memory")):
        monkeypatch.setattr(Device, "free", lambda _, free=free: free)
        with pytest.raises(CheckpointError, match=f"^out of memory: the weights take .* are free; {advice}"):
            random_model(CONFIG, torch.float32, CPU)
