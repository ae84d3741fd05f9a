"""Which jobs a benchmark has, in which order, and with how much time.

Subject     one kind of weights
Request     what to measure
conduct     do it, and let the report know
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import QwenVLConfig
from ..errors import ConfigError
from ..training.memory import weight_bytes
from .figures import Event, Facts, Figure, Missing
from .jobs import Job, Kind
from .plan import GRACE, Budget, Plan
from .processes import run_apart, run_here
from .report import Report
from .roofline import limits_from

# By which jobs share the time: the device, each model, each start-up, the comparison. Of two kinds of weights the first
# is the wider one, which takes longer.
DEVICE, MODELS, START_UPS, COMPARISON = 10, (48, 36), (32, 22), 25
WRITING, STARTING = 3, 1  # the parts of a start-up
IN_MEMORY = Path("/dev/shm")  # a folder that is page cache and nothing else, on Linux
SPARE = 1.1  # room that a folder must have for a checkpoint
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Subject:
    """Weights to measure: a checkpoint's `folder`, or random ones of this configuration if that is empty."""

    config: QwenVLConfig
    folder: str = ""

    def name(self, dtype: str) -> str:
        """What figures call it: the bits of packed weights, else the dtype."""
        packed = self.config.quantization_config
        return dtype if packed is None else f"int{packed.bits}"


@dataclass(frozen=True)
class Request:
    """What to measure. dtype may be "auto". Small models need no processes of their own (`apart`)."""

    plan: Plan
    subjects: tuple[Subject, ...]
    device: str
    dtype: str
    apart: bool
    quiet: bool


def conduct(request: Request, report: Report) -> None:
    """Measure it all; the report has what came of it. Raises ConfigError for a device that is not there."""
    plan, session = request.plan, _Session(request, report)
    steps: list[tuple[float, Callable[[float], None]]] = [(DEVICE, session.measure_device)]
    for share, subject in zip(MODELS, request.subjects, strict=False):
        steps.append((share, partial(session.measure_model, subject)))
    for share, subject in zip(START_UPS, request.subjects, strict=False):
        if "start-up" in plan.parts:
            steps.append((share, partial(session.start_up, subject)))
    there = importlib.util.find_spec("transformers") is not None
    if "transformers" in plan.parts and there:
        steps.append((COMPARISON, session.compare))
    budget = Budget(plan.seconds, [share for share, _ in steps])
    session.left = lambda: budget.left + GRACE
    for _, step in steps:
        step(budget.share())
    if "transformers" in plan.parts and not there:
        report.add(Missing("transformers", "transformers", "it is not installed here", failed=False))


@dataclass
class _Session:
    request: Request
    report: Report
    dtype: str = ""
    device_figures: list[Figure] = field(default_factory=list)
    left: Callable[[], float] = lambda: GRACE  # seconds after which no process may run

    def measure_device(self, seconds: float) -> None:
        """Its facts and limits; without these there are no fractions, without the device there is nothing."""
        for event in self._run("device", seconds, subject="device", dtype=self.request.dtype):
            if isinstance(event, Missing) and not self.report.about:
                raise ConfigError(event.reason)
            if isinstance(event, Facts):
                self.dtype = self._dtype(event)
                event = Facts({**event.about, "dtype": self.dtype})
            if isinstance(event, Figure):
                self.device_figures.append(event)
            self.report.add(event)

    def measure_model(self, subject: Subject, seconds: float) -> None:
        """All parts that need no more than a loaded model."""
        for event in self._run("model", seconds, **self._about(subject)):
            self.report.add(event)

    def start_up(self, subject: Subject, seconds: float) -> None:
        """From a new process to its first token, from a checkpoint in the page cache: random weights are written."""
        about, budget = self._about(subject), Budget(seconds, [WRITING, STARTING])
        if subject.folder:
            self._start(about, seconds, {})
            return
        needed = SPARE * weight_bytes(subject.config, WIDTHS[self.dtype])
        roomy = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > needed
        with tempfile.TemporaryDirectory(prefix="qwenvl-bench-", dir=IN_MEMORY if roomy else None) as temporary:
            about["folder"] = os.path.join(temporary, "checkpoint")
            for event in self._run("write", budget.share(), **about):
                if isinstance(event, Missing):
                    self.report.add(event)
                    return
                if isinstance(event, Facts):
                    self._start(about, budget.share(), event.about)

    def compare(self, seconds: float) -> None:
        """`transformers` at the same shape."""
        subject = self.request.subjects[0]
        about = {**self._about(subject), "subject": "transformers", "folder": ""}
        for event in self._run("transformers", seconds, **about):
            self.report.add(event)

    def _start(self, about: dict[str, Any], seconds: float, written: dict[str, str | int]) -> None:
        layers, wanted = written.get("layers", 0), written.get("layers_wanted", 0)
        note = (
            "" if layers == wanted else f"with {layers} of {wanted} decoder layers: there was no room or time for more"
        )
        for event in self._run("start", seconds, **about):
            if isinstance(event, Figure):
                event = replace(event, note=note, whole=not note, details={**event.details, **written})
            self.report.add(event)

    def _run(self, kind: Kind, seconds: float, **about: Any) -> Iterator[Event]:  # noqa: ANN401 - fields of a Job
        request = self.request
        job = Job(kind, request.plan, request.device, seconds=seconds, quiet=request.quiet, **about)
        run = run_apart if request.apart or kind == "start" else run_here
        yield from run(job, min(seconds + GRACE, self.left()))

    def _dtype(self, facts: Facts) -> str:
        """What is computed in; on a CPU float32 if that fits into the memory, as `load` has it."""
        if self.request.dtype != "auto":
            return self.request.dtype
        widest = max(weight_bytes(subject.config, WIDTHS["float32"]) for subject in self.request.subjects)
        if facts.about["kind"] == "cpu" and widest < int(facts.about["memory_bytes"]):
            return "float32"
        return str(facts.about["dtype"])

    def _about(self, subject: Subject) -> dict[str, Any]:
        """What a job is told of its weights, and of the device's limits."""
        limits = limits_from(self.device_figures, self.dtype)
        return {
            "subject": subject.name(self.dtype),
            "config": subject.config.to_dict(),
            "folder": subject.folder,
            "dtype": self.dtype,
            "bytes_per_second": limits.bytes_per_second,
            "flops_per_second": limits.flops_per_second,
        }
