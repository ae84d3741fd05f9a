"""Which jobs a benchmark has, in which order, and with how much time.

Request     what to measure
conduct     do it, and let the report know
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..loading import DTYPES
from .figures import Event, Facts, Figure, Missing
from .jobs import Job, Kind, Weights, run_apart, run_here
from .plan import GRACE, IN_A_MODEL, Budget, Plan
from .report import Report
from .roofline import Limits, weight_bytes

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


def conduct(request: Request, report: Report) -> None:
    """Measure it all; the report has what came of it. Raises ConfigError for a device that is not there."""
    plan, conductor = request.plan, _Conductor(request, report)
    steps: list[tuple[float, Callable[[float], None]]] = [(DEVICE, conductor.measure_device)]
    for part, shares, do in (
        (set(IN_A_MODEL), MODELS, partial(conductor.run, "model")),
        ({"start-up"}, START_UPS, conductor.start_up),
    ):
        if part & set(plan.parts):
            steps += [(share, partial(do, weights)) for share, weights in zip(shares, request.weights, strict=False)]
    if "transformers" in plan.parts:
        steps.append((TRANSFORMERS, conductor.compare))
    if "compile" in plan.parts:
        steps += [
            (share, partial(conductor.run, "compile", weights))
            for share, weights in zip(COMPILE, request.weights, strict=False)
        ]
    budget = Budget(plan.seconds, [share for share, _ in steps])
    conductor.left = lambda: budget.left
    for _, step in steps:
        step(budget.share())


@dataclass
class _Conductor:
    request: Request
    report: Report
    dtype: str = ""
    rates: dict[str, float] = field(default_factory=dict)  # the device's, by unit
    left: Callable[[], float] = lambda: 0.0  # seconds

    def measure_device(self, seconds: float) -> None:
        """Its facts and limits; without these there are no fractions, without the device there is nothing."""
        for event in self._events("device", self.request.weights[0], seconds):
            if isinstance(event, Missing) and not self.report.about:
                raise ConfigError(event.reason)
            if isinstance(event, Facts):
                self.dtype = str(event.about["dtype"])
            if isinstance(event, Figure):
                self.rates[event.unit] = max(event.value, self.rates.get(event.unit, 0.0))
            self.report.add(event)

    def run(self, kind: Kind, weights: Weights, seconds: float) -> None:
        """One job, all of whose events are for the report."""
        for event in self._events(kind, weights, seconds):
            self.report.add(event)

    def start_up(self, weights: Weights, seconds: float) -> None:
        """From a new process to its first token, from a checkpoint in the page cache: random weights are written."""
        if weights.folder:
            self._start(weights, seconds)
            return
        budget = Budget(seconds, [WRITING, STARTING])
        needed = SPARE * weight_bytes(weights.config, DTYPES[self.dtype].itemsize)
        roomy = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > needed
        with tempfile.TemporaryDirectory(prefix="qwenvl-bench-", dir=IN_MEMORY if roomy else None) as temporary:
            written = replace(weights, folder=os.path.join(temporary, "checkpoint"))
            for event in self._events("write", written, budget.share()):
                if isinstance(event, Facts):
                    layers, wanted = event.about["layers"], event.about["layers_wanted"]
                    note = "" if layers == wanted else f"{layers} of {wanted} decoder layers: no room or time for more"
                    self._start(written, budget.share(), note)
                else:
                    self.report.add(event)

    def compare(self, seconds: float) -> None:
        """`transformers` at the same shape."""
        if importlib.util.find_spec("transformers") is None:
            self.report.add(Missing("transformers", "transformers", "it is not installed here", failed=False))
        else:
            self.run("transformers", replace(self.request.weights[0], folder=""), seconds)

    def _start(self, weights: Weights, seconds: float, note: str = "") -> None:
        begin = time.perf_counter()
        for event in self._events("start", weights, seconds):
            if isinstance(event, Figure):
                value = round(time.perf_counter() - begin, 3)
                event = replace(event, value=value, note=note, whole=not note)
            self.report.add(event)

    def _events(self, kind: Kind, weights: Weights, seconds: float) -> Iterator[Event]:
        request, rates = self.request, self.rates
        job = Job(
            kind,
            request.plan,
            weights,
            request.device,
            self.dtype or request.dtype,
            limits=Limits(1e9 * rates.get("GB/s", 0.0), 1e12 * rates.get("TFLOP/s", 0.0)),
            seconds=seconds,
        )
        if self.left() < LEAST:
            yield job.missing("there was no time left")
            return
        apart = request.apart or kind == "start"
        yield from (run_apart if apart else run_here)(job, min(seconds, self.left()) + GRACE)
