"""The machine that is measured: its clock, its memory, its name.

Device    waits for the device before it looks at the clock
timed     the median of repeats, and the first call apart
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..loading import free_memory


class Device:
    """A torch device. `clock` counts seconds."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.torch, self.clock = device, clock

    def now(self) -> float:
        """Seconds, when all that the device was told has been done."""
        if self.torch.type == "cuda":
            torch.cuda.synchronize(self.torch)
        elif self.torch.type == "mps":
            torch.mps.synchronize()
        return self.clock()

    def release(self) -> None:
        """Give back all memory that nothing refers to, so that what is done next finds it as a fresh process does."""
        gc.collect()
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()

    def forget_peak(self) -> None:
        """Let `peak` begin anew."""
        if self.torch.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak(self) -> int:
        """Most bytes allocated since `forget_peak`, weights included; 0 where torch does not count them (not CUDA)."""
        return torch.cuda.max_memory_allocated(self.torch) if self.torch.type == "cuda" else 0

    def free(self) -> int:
        """Bytes that can still be allocated, as far as the system says."""
        if self.torch.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.torch)
            return free + torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return free_memory() or 0

    def describe(self) -> dict[str, str | int]:
        """Name, memory, software, and `dtype`: what "auto" means here."""
        about: dict[str, str | int] = {"torch": torch.__version__, "python": platform.python_version()}
        if self.torch.type == "cuda":
            properties = torch.cuda.get_device_properties(self.torch)
            about |= {"device": properties.name, "memory_bytes": properties.total_memory}
            about |= {"cuda": str(torch.version.cuda), "multiprocessors": properties.multi_processor_count}
            return {**about, "kind": "cuda", "dtype": "bfloat16" if properties.major >= 8 else "float16"}
        name = processor() if self.torch.type == "cpu" else platform.processor() or platform.machine()
        about |= {"device": f"{name}, {torch.get_num_threads()} threads", "memory_bytes": self.free()}
        return {**about, "kind": self.torch.type, "dtype": "bfloat16" if self.torch.type == "cpu" else "float16"}


def processor() -> str:
    """The processor's name, and the cores that we may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call, and the median of those after it, of which there were `runs`."""

    first: float
    median: float
    runs: int


def timed(run: Callable[[], object], device: Device, *, runs: int, seconds: float) -> Timing:
    """Call `run` once, and then up to `runs` times while that takes no more than `seconds`, but once at least."""
    begin = device.now()
    run()
    first = device.now() - begin
    taken: list[float] = []
    while len(taken) < runs and (not taken or sum(taken) + taken[-1] < seconds - first):
        begin = device.now()
        run()
        taken.append(device.now() - begin)
    return Timing(first, statistics.median(taken), len(taken))


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises where there is no memory left; on a CPU, and in CUDA's own calls, a
    RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, RuntimeError) and any(sign in told for sign in signs)
