"""What one process does for a benchmark. Each kind of weights is measured in a process of its own.

    Job        what to do, as one line of JSON
    perform    do it here
    main       do what the command line says, and print what came of it line by line

A process that ends gives all of its memory back, so that a peak is what it says; and one that fails, hangs or crashes
takes nothing with it but its own figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import QwenVLConfig
from ..errors import QwenVLError
from .figures import Event, Facts, Figure, Missing, to_line
from .plan import Plan
from .roofline import Limits

STARTED = time.perf_counter()  # before torch is imported
Kind = Literal["device", "model", "write", "start", "transformers"]


@dataclass(frozen=True)
class Job:
    """One process's part.

    device        the device's facts and limits; the others take those from `bytes_per_second`, `flops_per_second`
    model         everything that one model is measured on
    write         a checkpoint of random weights, to `folder`
    start         load what is in `folder` and say the first token
    transformers  the comparison

    folder: of a checkpoint; empty for random weights of this `config` (as in config.json). dtype: by name; "auto" is
    for the first kind alone. subject: how the figures call it. seconds: that it may take.
    """

    kind: Kind
    plan: Plan
    device: str
    dtype: str = "auto"
    subject: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0
    seconds: float = 60.0
    quiet: bool = False

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Job:
        """The job in a line."""
        data = json.loads(line)
        data["plan"] = Plan.from_dict(data["plan"])
        return cls(**data)

    @property
    def part(self) -> str:
        """The part that is missing when the job fails."""
        parts = {"device": "device", "model": "weights", "transformers": "transformers"}
        return parts.get(self.kind, "start-up")


def perform(job: Job, clock: Callable[[], float] = time.perf_counter) -> Iterator[Event]:
    """Do a job: its figures, as they come. A user's mistake is told as missing; a bug raises."""
    try:
        yield from _KINDS[job.kind](job, clock)
    except QwenVLError as error:
        yield Missing(job.part, job.subject, str(error), failed=True)


def _device(job: Job, clock: Callable[[], float]) -> Iterator[Event]:
    import torch

    from ..loading import DTYPES, choose_device
    from .device import Device
    from .limits import measure

    device = Device(choose_device(job.device), clock)
    about = device.describe()
    yield Facts(about)
    dtypes = [DTYPES[str(about["dtype"]) if job.dtype == "auto" else job.dtype]]
    yield from measure(device, job.plan, [*dtypes, torch.float32] if device.torch.type == "cpu" else dtypes)


def _model(job: Job, clock: Callable[[], float]) -> Iterator[Event]:
    from ..loading import DTYPES, choose_device, load
    from .device import Device
    from .measure import Subject, measure_model
    from .random_weights import random_model

    end = clock() + job.seconds
    device = Device(choose_device(job.device), clock)
    tell = _quiet if job.quiet else _tell
    tell(f"{job.subject}: weights")
    begin, dtype = device.now(), DTYPES[job.dtype]
    if job.folder:
        model = load(job.folder, device.torch, dtype, quiet=job.quiet).model
    else:
        model = random_model(QwenVLConfig.from_dict(job.config), dtype, device)
    yield Figure("weights", job.subject, "weights in place", round(device.now() - begin, 3), "s")
    limits = Limits(job.bytes_per_second, job.flops_per_second)
    yield from measure_model(Subject(model, device, limits, job.subject), job.plan, end - clock(), tell)


def _write(job: Job, clock: Callable[[], float]) -> Iterator[Event]:
    from ..loading import DTYPES, choose_device
    from .device import Device
    from .random_weights import write_checkpoint

    config = QwenVLConfig.from_dict(job.config)
    device = Device(choose_device(job.device), clock)
    (_quiet if job.quiet else _tell)(f"{job.subject}: a checkpoint to start from")
    begin = clock()
    written = write_checkpoint(Path(job.folder), config, DTYPES[job.dtype], device, job.seconds)
    layers = {"layers": written.num_hidden_layers, "layers_wanted": config.num_hidden_layers}
    yield Facts({**layers, "seconds": round(clock() - begin)})


def _start(job: Job, clock: Callable[[], float]) -> Iterator[Event]:
    """Everything that a fresh process does up to its first token; the caller knows when the process was begun."""
    import torch

    from ..loading import DTYPES, choose_device, load

    imported = clock()
    pipeline = load(job.folder, choose_device(job.device), DTYPES[job.dtype], quiet=True)
    loaded = clock()
    vision = pipeline.config.visual
    ids = [vision.image_start_id, *[vision.image_pad_id] * vision.n_queries, vision.image_end_id]
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    pipeline.generate_ids(torch.tensor([ids]), pixels, max_new_tokens=1)
    seconds = {"import_s": imported - STARTED, "load_s": loaded - imported, "first_token_s": clock() - loaded}
    details: dict[str, float | str] = {name: round(value, 3) for name, value in seconds.items()}
    yield Figure("start-up", job.subject, "start to first token", clock() - STARTED, "s", details=details)


def _transformers(job: Job, clock: Callable[[], float]) -> Iterator[Event]:
    from ..loading import DTYPES, choose_device
    from .device import Device
    from .peers import measure_llama

    (_quiet if job.quiet else _tell)("transformers: Llama of the same shape")
    device = Device(choose_device(job.device), clock)
    limits = Limits(job.bytes_per_second, job.flops_per_second)
    config = QwenVLConfig.from_dict(job.config)
    yield from measure_llama(config, DTYPES[job.dtype], device, limits, job.plan, job.seconds)


_KINDS: dict[Kind, Callable[[Job, Callable[[], float]], Iterator[Event]]] = {
    "device": _device,
    "model": _model,
    "write": _write,
    "start": _start,
    "transformers": _transformers,
}


def _tell(what: str) -> None:
    print(f"  {what} ...", file=sys.stderr, flush=True)


def _quiet(_: str) -> None:
    pass


def main() -> None:
    """Do the job that the first argument describes."""
    for event in perform(Job.from_line(sys.argv[1])):
        print(to_line(event), flush=True)


if __name__ == "__main__":
    main()
