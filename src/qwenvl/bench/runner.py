"""Which jobs a benchmark has, in which order, and with how much time.

Request     what to measure
measure     do it, and let the report know
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError
from ..loading import DTYPES, free_memory
from ..training.memory import weight_bytes
from .figures import Event, Facts, Figure, Missing
from .jobs import Job, Kind, Weights, run_apart, run_here
from .plan import GRACE, IN_A_MODEL, OF_AN_ENGINE, Budget, Plan
from .report import Report
from .roofline import Limits

# Seconds of a full run, by which jobs share the time. Of two kinds of weights the first is the wider one, which takes
# longer. What the bars are about comes first, and what it does not use is left for the comparisons.
DEVICE, MODELS, START_UPS, TRANSFORMERS, COMPILE = 25, (105, 82), (52, 33), 73, (50, 40)
WRITING, STARTING = 3, 1  # the parts of a start-up
IN_MEMORY = Path("/dev/shm")  # a folder that is page cache and nothing else, on Linux
SPARE = 1.1  # room that a folder must have for a checkpoint
LEAST = 5.0  # seconds that must be left for a job to begin


@dataclass(frozen=True)
class Request:
    """What to measure. dtype may be "auto". Small models need no processes of their own (`apart`)."""

    plan: Plan
    weights: tuple[Weights, ...]
    device: str
    dtype: str
    apart: bool


def measure(request: Request, report: Report) -> None:
    """Measure it all; the report has what came of it. Raises ConfigError for a device that is not there."""
    steps = _steps(request)
    runner = _Runner(request, report, Budget(request.plan.seconds, [share for _, _, share in steps]))
    for kind, weights, _ in steps:
        seconds = runner.budget.share()
        if kind == "device":
            runner.measure_device(weights, seconds)
        elif kind == "start":
            runner.start_up(weights, seconds)
        elif kind == "transformers" and importlib.util.find_spec("transformers") is None:
            report.add(Missing("transformers", "transformers", "it is not installed here", failed=False))
        else:
            runner.run(kind, weights, seconds)


def _steps(request: Request) -> list[tuple[Kind, Weights, float]]:
    """What to do, to which weights, and its share of the time; writing what is started is a part of the start."""
    parts, both = request.plan.parts, list(enumerate(request.weights))
    steps: list[tuple[Kind, Weights, float]] = [("device", request.weights[0], DEVICE)]
    if {*IN_A_MODEL, *OF_AN_ENGINE} & set(parts):
        steps += [("model", weights, MODELS[number]) for number, weights in both]
    if "start-up" in parts:
        steps += [("start", weights, START_UPS[number]) for number, weights in both]
    if "transformers" in parts:
        steps.append(("transformers", request.weights[0], TRANSFORMERS))
    if "compile" in parts:
        steps += [("compile", weights, COMPILE[number]) for number, weights in both]
    return steps


@dataclass
class _Runner:
    request: Request
    report: Report
    budget: Budget
    dtype: str = ""
    rates: dict[str, float] = field(default_factory=dict)  # the device's, by unit

    def measure_device(self, weights: Weights, seconds: float) -> None:
        """Its facts and limits; without these there are no fractions, without the device there is nothing."""
        for event in self._events(self._job("device", weights, seconds)):
            if isinstance(event, Missing) and not self.report.about:
                raise ConfigError(event.reason)
            if isinstance(event, Facts):
                self.dtype = str(event.about["dtype"])
            if isinstance(event, Figure):
                self.rates[event.unit] = max(event.value, self.rates.get(event.unit, 0.0))
            self.report.add(event)

    def run(self, kind: Kind, weights: Weights, seconds: float) -> bool:
        """One job, all of whose events are for the report. Whether nothing was missing."""
        whole = True
        for event in self._events(self._job(kind, weights, seconds)):
            self.report.add(event)
            whole = whole and not isinstance(event, Missing)
        return whole

    def start_up(self, weights: Weights, seconds: float) -> None:
        """From a new process to its first token, from a checkpoint in the page cache: random weights are written."""
        if weights.folder:
            self._start(weights, seconds)
            return
        budget = Budget(seconds, [WRITING, STARTING])
        needed = int(SPARE * weight_bytes(weights.config, DTYPES[self.dtype].itemsize))
        if (folder := _roomy(needed)) is None:
            reason = f"there is no room for a checkpoint of {needed / 1e9:.2f} GB; set TMPDIR to a larger disk"
            self.report.add(self._job("write", weights, seconds).missing(reason))
            return
        with tempfile.TemporaryDirectory(prefix="qwenvl-bench-", dir=folder) as temporary:
            written = replace(weights, folder=os.path.join(temporary, "checkpoint"))
            if self.run("write", written, budget.share()):
                self._start(written, budget.share())

    def _start(self, weights: Weights, seconds: float) -> None:
        begin = time.perf_counter()
        for event in self._events(self._job("start", weights, seconds)):
            if isinstance(event, Figure):
                event = replace(event, value=round(time.perf_counter() - begin, 3))
            self.report.add(event)

    def _job(self, kind: Kind, weights: Weights, seconds: float) -> Job:
        request, rates = self.request, self.rates
        limits = Limits(1e9 * rates.get("GB/s", 0.0), 1e12 * rates.get("TFLOP/s", 0.0))
        return Job(kind, request.plan, weights, request.device, self.dtype or request.dtype, limits, seconds)

    def _events(self, job: Job) -> Iterator[Event]:
        if self.budget.left < LEAST:
            yield job.missing("there was no time left")
        elif self.request.apart or job.kind == "start":
            yield from run_apart(job, min(job.seconds, self.budget.left) + GRACE)
        else:
            yield from run_here(job)


def _roomy(needed: int) -> Path | None:
    """The folder for a checkpoint of so many bytes: in memory, if that has room for it and for a model loaded from it,
    else the one for temporary files; None if that has none either.
    """
    memory = free_memory()
    for folder in (IN_MEMORY, Path(tempfile.gettempdir())):
        if folder == IN_MEMORY and memory is not None and memory < 2 * needed:
            continue
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > needed:
            return folder
    return None
