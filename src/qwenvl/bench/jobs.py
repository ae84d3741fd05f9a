"""What one process does for a benchmark. Each kind of weights is measured in a process of its own.

    Weights      a checkpoint, or random ones
    Job          what to do
    perform      do it here
    run_apart    do it in a fresh process, which ends when its time is up
    run_here     do it in this one, for small models

A process that ends gives all of its memory back, so that a peak is what it says; and one that fails, hangs or crashes
takes nothing with it but its own figures.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ..config import QwenVLConfig
from ..loading import DTYPES, choose_device, load
from ..training.memory import weight_bytes
from .decoding import first_id
from .device import Device, measure_limits
from .figures import Event, Facts, Figure, Missing
from .measure import compiled, guarded, measure_model
from .peers import measure_llama
from .plan import COMPARISONS, Plan
from .random_weights import random_model, write_checkpoint
from .roofline import Limits
from .subject import Subject, picture_ids

NO_LIMITS = Limits()
LAST_WORDS = 10.0  # seconds in which a process that has said all is to end
Kind = Literal["device", "model", "write", "start", "transformers", "compile"]


@dataclass(frozen=True)
class Weights:
    """Weights to measure: a checkpoint's `folder`, or random ones of this configuration if that is empty."""

    config: QwenVLConfig
    folder: str = ""


@dataclass(frozen=True)
class Job:
    """One process's part.

    device        the device's facts and limits; the others are given those as `limits`
    model         everything that one loaded model is measured on
    write         a checkpoint of random weights, to the folder that `weights` names
    start         load what is in that folder and say the first token
    transformers  the comparison with it
    compile       decoding with steps as they are and compiled

    dtype: by name; "auto" is for the first kind alone. seconds: that it may take, from `begun` on, which is when it was
    made by the wall clock: starting a process and importing torch count.
    """

    kind: Kind
    plan: Plan
    weights: Weights
    device: str
    dtype: str = "auto"
    limits: Limits = NO_LIMITS
    seconds: float = 60.0
    begun: float = field(default_factory=time.time)

    @property
    def part(self) -> str:
        """The part that is missing when the job fails."""
        return {"model": "weights", "write": "start-up", "start": "start-up"}.get(self.kind, self.kind)

    @property
    def subject(self) -> str:
        """How its figures call it: the bits of packed weights, else the dtype."""
        if self.kind in ("device", "transformers"):
            return self.kind
        packed = self.weights.config.quantization_config
        return self.dtype if packed is None else f"int{packed.bits}"

    def missing(self, reason: str) -> Missing:
        """Why it has no figures."""
        return Missing(self.part, self.subject, reason, failed=self.part not in COMPARISONS)


Perform = Callable[[Job], Iterator[Event]]


def perform(job: Job) -> Iterator[Event]:
    """Do a job: its figures, as they come. What fails is told as missing."""
    end = time.perf_counter() + job.seconds - (time.time() - job.begun)
    yield from guarded(job.part, job.subject, lambda: _KINDS[job.kind](job, Device(choose_device(job.device)), end))


def _device(job: Job, device: Device, _: float) -> Iterator[Event]:
    about = device.describe()
    if job.dtype != "auto":
        about["dtype"] = job.dtype
    elif about["kind"] == "cpu" and weight_bytes(job.weights.config, 4) < device.free():  # as `load` has it
        about["dtype"] = "float32"
    yield Facts(about)
    yield from measure_limits(device, job.plan, DTYPES[str(about["dtype"])])
    if device.peak() is None:
        yield Missing("device", "device", f"peak memory: torch does not count it on {about['kind']}", failed=False)


def _subject(job: Job, device: Device) -> Subject:
    """Its model, loaded or drawn."""
    if job.weights.folder:
        model = load(job.weights.folder, device.torch, job.dtype, quiet=True).model
    else:
        model = random_model(job.weights.config, DTYPES[job.dtype], device)
    return Subject(model, device, job.limits, job.subject)


def _model(job: Job, device: Device, end: float) -> Iterator[Event]:
    yield f"{job.subject}: weights"
    begin = device.now()
    subject = _subject(job, device)
    yield Figure("weights", job.subject, "weights in place", round(device.now() - begin, 3), "s")
    yield from measure_model(subject, job.plan, end - device.clock())


def _compile(job: Job, device: Device, end: float) -> Iterator[Event]:
    yield f"{job.subject}: decoding, compiled"
    subject = _subject(job, device)
    yield from compiled(subject, job.plan, end - device.clock())


def _write(job: Job, device: Device, _: float) -> Iterator[Event]:
    yield f"{job.subject}: a checkpoint to start from"
    write_checkpoint(Path(job.weights.folder), job.weights.config, DTYPES[job.dtype], device)


def _start(job: Job, device: Device, _: float) -> Iterator[Event]:
    """Everything that a fresh process does up to its first token; who began it knows how long it took in all."""
    begin = device.clock()
    pipeline = load(job.weights.folder, device.torch, job.dtype, quiet=True)
    loaded = device.now()
    size = pipeline.config.visual.image_size
    ids = torch.tensor([picture_ids(pipeline.config)], device=device.torch)
    first = first_id(pipeline.model, ids, torch.randn(1, 3, size, size), device)
    spent: dict[str, float | str] = {"load_s": round(loaded - begin, 3), "first_token_s": round(first, 3)}
    yield Figure("start-up", job.subject, "start to first token", loaded - begin + first, "s", details=spent)


def _transformers(job: Job, device: Device, end: float) -> Iterator[Event]:
    yield "transformers: Llama of the same shape"
    left = end - device.clock()
    yield from measure_llama(job.weights.config, DTYPES[job.dtype], device, job.limits, job.plan, left)


_KINDS: dict[Kind, Callable[[Job, Device, float], Iterator[Event]]] = {
    "device": _device,
    "model": _model,
    "write": _write,
    "start": _start,
    "transformers": _transformers,
    "compile": _compile,
}


def run_here(job: Job) -> Iterator[Event]:
    """Do a job in this process, which no limit of time stops."""
    yield from perform(job)


def run_apart(job: Job, limit: float, work: Perform = perform) -> Iterator[Event]:
    """Do a job in a fresh process: its figures, as they come, and why there are no more if it did not end well.

    It is stopped after `limit` seconds, or where the reader stops. What it prints goes to stderr.
    """
    end = time.perf_counter() + limit
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, job, sender))
    process.start()
    sender.close()  # the process has the only other end: where it is closed, the process has ended
    try:
        while True:
            if not receiver.poll(max(end - time.perf_counter(), 0)):
                yield job.missing(f"it was stopped after {limit:.0f} s, its time was up")
                return
            event: Event | None = receiver.recv()
            if event is None:
                process.join(LAST_WORDS)
                return
            yield event
    except EOFError:
        process.join(LAST_WORDS)
        code = process.exitcode
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        yield job.missing(f"its process {how}")
    finally:
        _stop(process)
        receiver.close()


def _work(work: Perform, job: Job, sender: Connection) -> None:
    """What the process does. In a session of its own, so that whatever it starts can be stopped with it."""
    if hasattr(os, "setsid"):
        os.setsid()
    sys.stdout.flush()
    os.dup2(2, 1)  # the benchmark's own stdout is a table, or one line of JSON
    tqdm.set_lock(threading.RLock())  # its own lock would be left behind by a process that is stopped
    for event in work(job):
        sender.send(event)
    sender.send(None)


def _stop(process: SpawnProcess) -> None:
    if process.pid is not None and hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has ended, or not yet begun
            process.kill()
    else:
        process.kill()
    process.join()
