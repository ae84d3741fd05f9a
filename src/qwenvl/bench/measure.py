"""What is measured on one model, part by part: encoding, prefill, the first token, decoding, batches, compiled steps.

measure_model   the parts that need no more than the model, within a number of seconds; an engine's are in `engine.py`
compiled        the part that compiles steps, which is done by itself
guarded         a part whose failure takes no other with it
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..adapt.capture import BUCKET
from ..errors import QwenVLError
from ..generation.batch import generate_batch
from ..generation.decode import prefill
from ..generation.room import allocate
from ..generation.sampling import SamplingOptions
from .decoding import Stretch, TimedStepper, first_id, longest_run, prefilled
from .device import repeated, timed
from .engine import engine_parts
from .figures import Event, Missing
from .plan import COMPARISONS, Budget, Plan
from .roofline import encoding, prefilling
from .subject import Part, Subject

EXPECTED_RATE = 130.0  # tokens a second, by which decoding runs share the time with the other parts
LONGEST = 200  # characters of an error: some compilers tell stories


def measure_model(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """Figures of all parts of the plan that need no more than the model, and before each what it is."""
    parts = list(_parts(subject, plan))
    budget = Budget(seconds, [weight for *_, weight, _ in parts], subject.device.clock)
    for part, name, _, measurement in parts:
        yield f"{subject.name}: {name}"
        subject.device.release()
        yield from guarded(part, subject.name, partial(measurement, budget.share()))


def _parts(subject: Subject, plan: Plan) -> Iterator[Part]:
    """The longest last: what is short is measured whatever the time."""
    if "encode" in plan.parts:
        yield "encode", "encode", 2, partial(_encode, subject, plan)
    if "prefill" in plan.parts:
        yield "prefill", "prefill", 4, partial(_prefill, subject, plan)
    if "first-token" in plan.parts:
        yield "first-token", "first token", 2, partial(_first_token, subject, plan)
    for rows in plan.rows if "batch" in plan.parts else ():
        yield "batch", f"batch of {rows}", 3, partial(_batch, subject, plan, rows)
    room = subject.config.max_position_embeddings - subject.span
    for tokens in sorted({min(tokens, room) for tokens in plan.decode}) if "decode" in plan.parts else ():
        yield "decode", f"decode {tokens}", 4 + tokens / EXPECTED_RATE, partial(_decode, subject, plan, tokens)
    yield from engine_parts(subject, plan)


def guarded(part: str, subject: str, measurement: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    """The measurement's events; one more where it fails, and no error. A bug's traceback goes to stderr."""
    try:
        yield from measurement()
    except Exception as error:  # the other parts are worth their time, whatever it is
        if isinstance(error, QwenVLError):
            reason = str(error)
        else:
            if part not in COMPARISONS:
                traceback.print_exc(file=sys.stderr)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            told = " ".join(str(error).split())[:LONGEST] or "no reason given"
            reason = f"{type(error).__name__}: {told} ({Path(frame.filename).name}, line {frame.lineno})"
        yield Missing(part, subject, reason, failed=part not in COMPARISONS)


@torch.no_grad()
def _encode(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """One picture to its visual tokens, from pixels that are on the device."""
    pixels = subject.pixels(subject.device.torch)
    timing = timed(lambda: subject.model.encode_images(pixels), subject.device, runs=plan.repeats, seconds=seconds)
    yield subject.milliseconds("encode", "encode one image", timing, encoding(subject.config, subject.width))


@torch.no_grad()
def _prefill(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """A prompt with a picture to the logits behind it: with the encoding, and from features."""
    tokens = min(max(plan.prefill, subject.span + 1), subject.config.max_position_embeddings - 1)
    model, device, config, width = subject.model, subject.device, subject.config, subject.width
    ids, pixels = subject.prompt(tokens), subject.pixels(device.torch)
    generate_batch(model, ids, SamplingOptions(max_new_tokens=1), pixels=pixels)
    yield from subject.peak("prefill", f"prefill {tokens}")

    cache, features = allocate(model, 1, tokens), model.encode_images(pixels)

    def run(**image: Tensor) -> None:
        cache.rewind([0])
        prefill(model, cache, ids, **image)

    decoder = prefilling(config, width, tokens)
    for name, image, steps in (
        (f"prefill {tokens} with an image", {"pixels": pixels}, (encoding(config, width), decoder)),
        (f"prefill {tokens}, image encoded before", {"image_features": features}, (decoder,)),
    ):
        timing = timed(partial(run, **image), device, runs=plan.repeats, seconds=seconds / 2)
        yield subject.milliseconds("prefill", name, timing, *steps)


def _first_token(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """From a picture's pixels on the host to the first id there, of several, a cache for them included."""
    once = partial(first_id, subject.model, subject.prompt(subject.span), subject.pixels("cpu"), subject.device)
    timing = repeated(once, runs=plan.repeats, seconds=seconds)
    steps = encoding(subject.config, subject.width), prefilling(subject.config, subject.width, subject.span)
    yield subject.milliseconds("first-token", "first token behind an image", timing, *steps)


def _decode(subject: Subject, plan: Plan, tokens: int, seconds: float) -> Iterator[Event]:
    """New tokens behind one picture, one row; and the memory that it took."""
    run = partial(longest_run, seconds=seconds, most=plan.most_steps)
    yield subject.rate("decode", f"decode {tokens}", 1, *_behind_a_picture(subject, tokens, run))
    yield from subject.peak("decode", f"decode {tokens}")


@torch.no_grad()
def _behind_a_picture(
    subject: Subject,
    tokens: int,
    run: Callable[[TimedStepper, Tensor, Tensor, int], tuple[Stretch, Stretch]],
    backend: str = "",
) -> tuple[Stretch, Stretch]:
    """Decode `tokens` by `run`, from a cache of its own."""
    ids, model = subject.prompt(subject.span), subject.model
    cache, logits = prefilled(model, ids, tokens, subject.pixels(subject.device.torch))
    return run(TimedStepper(model, cache, subject.device, backend=backend), logits, ids, tokens - 1)


@torch.no_grad()
def _batch(subject: Subject, plan: Plan, rows: int, seconds: float) -> Iterator[Event]:
    """New tokens in several rows at once, behind as much text in each."""
    context = min(plan.batch_context, subject.config.max_position_embeddings - plan.batch_new)
    ids = subject.text(rows, context)
    cache, logits = prefilled(subject.model, ids, plan.batch_new)
    stepper = TimedStepper(subject.model, cache, subject.device)
    first, run = longest_run(stepper, logits, ids, plan.batch_new - 1, seconds=seconds, most=0)
    yield subject.rate("batch", f"batch of {rows}, {context} + {plan.batch_new} tokens", rows, first, run)


def compiled(subject: Subject, plan: Plan, seconds: float) -> Iterator[Event]:
    """Decoding behind a picture to the end of a bucket, with steps as they are and compiled by `torch.compile`.

    Neither has an effect on other parts: this one has a process of its own.
    """
    compiler = os.environ.get("CXX", "g++" if subject.device.torch.type == "cpu" else "gcc")
    if shutil.which(compiler) is None:
        yield Missing("compile", subject.name, f"torch.compile needs a compiler, and there is no {compiler}", False)
        return
    tokens = BUCKET - subject.span % BUCKET
    longest = partial(longest_run, seconds=seconds / 3, most=plan.most_steps)
    first, run = _behind_a_picture(subject, tokens, longest)
    yield subject.rate("compile", f"decode {tokens}, not compiled", 1, first, run)
    subject.device.release()
    longest = partial(longest_run, seconds=math.inf, most=run.steps)  # compiling takes as long as it takes
    first, new = _behind_a_picture(subject, tokens, longest, "inductor")
    note = f"{run.step_seconds / new.step_seconds:.2f} times as fast as not compiled"
    yield subject.rate("compile", f"decode {tokens}, compiled", 1, first, new, note)
