"""What is measured on one model, part by part: encoding, prefill, the first token, decoding, batches.

Subject         a model, where it is, and what the device can do
measure_model   all parts, within a number of seconds; one that fails does not stop the others
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import QwenVLConfig
from ..errors import QwenVLError
from ..generation.batch import generate_batch
from ..generation.decode import prefill
from ..generation.sampling import SamplingOptions
from ..model.cache import KVCache
from ..model.qwenvl import QwenVL
from .decoding import Stretch, TimedStepper, longest_run
from .device import Device, Timing, out_of_memory, timed
from .figures import Event, Figure, Missing
from .plan import Budget, Plan
from .roofline import Limits, Work
from .work import encoding, kv_bytes, prefilling, stepping

EXPECTED_RATE = 130.0  # tokens a second, by which decoding runs share the time with the other parts
Measurement = Callable[[float], Iterator[Event]]  # what is measured in so many seconds


@dataclass(frozen=True)
class Subject:
    """What is measured. name: "int4" where the decoder's weights are packed, else the dtype."""

    model: QwenVL
    device: Device
    limits: Limits
    name: str

    @property
    def config(self) -> QwenVLConfig:
        """The model's."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of weights that are not packed."""
        return self.model.decoder.wte.weight.dtype

    @property
    def span(self) -> int:
        """Ids of one picture with its tags."""
        return self.config.visual.n_queries + 2

    def cache(self, rows: int, slots: int) -> KVCache:
        """An empty one for this model."""
        return KVCache.allocate(self.config, rows, slots, self.dtype, self.device.torch)

    def prompt(self, tokens: int) -> Tensor:
        """Ids [1,T] of a picture and random text behind it."""
        vision = self.config.visual
        picture = [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
        text = self.text(1, tokens - len(picture))
        return torch.cat((torch.tensor([picture], device=self.device.torch), text), dim=1)

    def text(self, rows: int, tokens: int) -> Tensor:
        """Random ids [B,T] without a picture."""
        ordinary = min(self.config.visual.image_start_id, self.config.vocab_size)
        return torch.randint(0, ordinary, (rows, tokens), device=self.device.torch)

    def pixels(self, device: torch.device | str) -> Tensor:
        """One picture [1,3,S,S] as `preprocess` gives it, on the host or already on the device."""
        size = self.config.visual.image_size
        return torch.randn(1, 3, size, size, device="cpu").to(device)

    def milliseconds(self, part: str, name: str, timing: Timing, *steps: Work) -> Figure:
        """What repeats took, beside the least that they could."""
        return Figure(
            part,
            self.name,
            name,
            round(1e3 * timing.median, 3),
            "ms",
            limit=round(1e3 * self.limits.seconds(*steps), 3),
            limited_by=self.limits.binding(*steps),
            warm_up=round(timing.first, 4),
            details={"runs": timing.runs},
        )

    def peak(self, part: str, name: str) -> Event:
        """The most memory that was allocated since `forget_peak`."""
        if peak := self.device.peak():
            return Figure(part, self.name, f"peak memory, {name}", round(peak / 1e9, 3), "GB")
        kind = self.device.torch.type
        return Missing(part, self.name, f"peak memory, {name}: torch does not count memory on {kind}", failed=False)


def measure_model(subject: Subject, plan: Plan, seconds: float, tell: Callable[[str], None]) -> Iterator[Event]:
    """Figures of all parts of the plan that need no more than the model. `tell` hears what is being measured."""
    parts = list(_parts(subject, plan))
    budget = Budget(seconds, [weight for _, _, weight, _ in parts], subject.device.clock)
    for part, name, _, measurement in parts:
        tell(f"{subject.name}: {name}")
        yield from guarded(part, subject, partial(measurement, budget.share()))
        subject.device.release()


def _parts(subject: Subject, plan: Plan) -> Iterator[tuple[str, str, float, Measurement]]:
    """Part, name, weight and measurement, the longest last: what is short is measured whatever the time."""
    if "encode" in plan.parts:
        yield "encode", "encode", 2, partial(_encode, subject, plan)
    if "prefill" in plan.parts:
        yield "prefill", "prefill", 4, partial(_prefill, subject, plan)
    if "first-token" in plan.parts:
        yield "first-token", "first token", 2, partial(_first_token, subject, plan)
    room = subject.config.max_position_embeddings - subject.span
    runs = sorted({min(tokens, room) for tokens in plan.decode})
    decoding = [
        ("decode", f"decode {tokens}", 4 + tokens / EXPECTED_RATE, partial(_decode, subject, plan, tokens))
        for tokens in runs
        if "decode" in plan.parts
    ]
    yield from decoding[:-1]
    for rows in plan.rows if "batch" in plan.parts else ():
        yield "batch", f"batch of {rows}", 3, partial(_batch, subject, plan, rows)
    yield from decoding[-1:]


def guarded(part: str, subject: Subject, measurement: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    """The measurement's events; one more where it fails, and no error."""
    try:
        yield from measurement()
    except Exception as error:  # the other parts are worth their time, whatever it is
        yield Missing(part, subject.name, _reason(error, subject), failed=True)


def _reason(error: Exception, subject: Subject) -> str:
    """One line; a bug's traceback goes to stderr."""
    if out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # they hold what the measurement had allocated by then
        subject.device.release()
        free = subject.device.free()
        tokens = free // kv_bytes(subject.config, subject.dtype.itemsize)
        return (
            f"out of memory: beside the weights {free / 1e9:.2f} GB are free, which is a cache of at most {tokens} "
            "tokens, all rows together"
        )
    if isinstance(error, QwenVLError):
        return str(error)
    traceback.print_exc(file=sys.stderr)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno})"


@torch.no_grad()
def _encode(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """One picture to its visual tokens, from pixels that are on the device."""
    pixels = subject.pixels(subject.device.torch)
    timing = timed(lambda: subject.model.encode_images(pixels), subject.device, runs=plan.repeats, seconds=seconds)
    yield subject.milliseconds("encode", "encode 1 image", timing, encoding(subject.config, subject.dtype.itemsize))


@torch.no_grad()
def _prefill(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """A prompt with a picture to the logits behind it: with the encoding, and from features."""
    tokens = min(max(plan.prefill, subject.span + 1), subject.config.max_position_embeddings - 1)
    width, device = subject.dtype.itemsize, subject.device
    ids, pixels = subject.prompt(tokens), subject.pixels(device.torch)
    device.release()
    device.forget_peak()
    generate_batch(subject.model, ids, SamplingOptions(max_new_tokens=1), pixels=pixels)
    yield subject.peak("prefill", f"prefill {tokens}")

    cache, features = subject.cache(1, tokens), subject.model.encode_images(pixels)

    def run(**image: Tensor) -> None:
        cache.rewind([0])
        prefill(subject.model, cache, ids, **image)

    decoder = prefilling(subject.config, width, tokens)
    for name, image, steps in (
        (f"prefill {tokens} with an image", {"pixels": pixels}, (encoding(subject.config, width), decoder)),
        (f"prefill {tokens}, image encoded before", {"image_features": features}, (decoder,)),
    ):
        timing = timed(partial(run, **image), device, runs=plan.repeats, seconds=seconds / 2)
        yield subject.milliseconds("prefill", name, timing, *steps)


def _first_token(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """From a picture's pixels on the host to the first id there, a cache for it included."""
    ids, pixels = subject.prompt(subject.span), subject.pixels("cpu")
    options, width = SamplingOptions(max_new_tokens=1), subject.dtype.itemsize

    def run() -> None:
        generate_batch(subject.model, ids, options, pixels=pixels)

    steps = encoding(subject.config, width), prefilling(subject.config, width, subject.span)
    timing = timed(run, subject.device, runs=plan.repeats, seconds=seconds)
    yield subject.milliseconds("first-token", "first token behind an image", timing, *steps)


@torch.no_grad()
def _decode(subject: Subject, plan: Plan, tokens: int, seconds: float) -> Iterator[Event]:
    """New tokens behind one picture, one row; after the longest run, the memory that it took."""
    device = subject.device
    device.release()
    device.forget_peak()
    ids = subject.prompt(subject.span)
    cache = subject.cache(1, subject.span + tokens)
    stepper = TimedStepper(subject.model, cache, device)
    logits = prefill(subject.model, cache, ids, pixels=subject.pixels(device.torch))
    first, run = longest_run(
        stepper, logits, ids, tokens - 1, seconds=seconds, most=plan.most_steps, name=f"decode {tokens}"
    )
    yield _rate(subject, "decode", f"decode {tokens}", 1, first, run)
    if subject.span + tokens == subject.config.max_position_embeddings or tokens == max(plan.decode):
        yield subject.peak("decode", f"decode {tokens}")


@torch.no_grad()
def _batch(subject: Subject, plan: Plan, rows: int, seconds: float) -> Iterator[Event]:
    """New tokens in several rows at once, behind as much text in each."""
    context = min(plan.batch_context, subject.config.max_position_embeddings - plan.batch_new)
    ids = subject.text(rows, context)
    cache = subject.cache(rows, context + plan.batch_new)
    stepper = TimedStepper(subject.model, cache, subject.device)
    logits = prefill(subject.model, cache, ids)
    name = f"batch of {rows}, {context} tokens and {plan.batch_new} more"
    first, run = longest_run(stepper, logits, ids, plan.batch_new - 1, seconds=seconds, most=0, name=name)
    yield _rate(subject, "batch", name, rows, first, run)


def _rate(subject: Subject, part: str, name: str, rows: int, first: Stretch, run: Stretch) -> Figure:
    """Tokens a second of all rows, captures and first steps apart."""
    work = stepping(subject.config, subject.dtype.itemsize, rows, run.context)
    least = subject.limits.seconds(work)
    captures = first.capture_seconds + run.capture_seconds
    shortened = f"shortened to {run.steps} steps from {run.begin} tokens on"
    return Figure(
        part,
        subject.name,
        name,
        round(rows / run.step_seconds, 2),
        "tok/s",
        limit=round(rows / least, 2) if least else 0.0,
        limited_by=subject.limits.binding(work),
        warm_up=round(first.seconds + captures, 3),
        note="" if run.steps == run.wanted else shortened,
        details={
            "steps": run.steps,
            "steps_wanted": run.wanted,
            "context_from": run.begin,
            "bytes_per_step": round(work.bytes),
            "step_ms": round(1e3 * run.step_seconds, 4),
            "graphs": first.graphs + run.graphs,
            "capture_s": round(captures, 3),
        },
        whole=run.steps == run.wanted,
    )
