"""The machine that is measured: its clock, its memory, its name, and the most that it can do.

Device          waits for the device before it looks at the clock
timed           the median of repeats, and the first call apart
repeated        the same of what looks at the clock itself
measure_limits  how fast its memory copies and is read, how fast it multiplies matrices
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..loading import free_memory
from .figures import Figure
from .plan import Plan

SHORTEST = 0.01  # seconds that are timed at once, so that looking at the clock is none of it
REPEATS, SECONDS = 9, 1.0  # of each limit
CPU_SIDE = 2048  # of the matrices there, where larger ones are multiplied no faster
CPU_BYTES = 512 * 2**20  # of a copy there: more than any cache holds, and not long in the making


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
        """Give back all memory that nothing refers to, and let `peak` begin anew."""
        gc.collect()
        if self.torch.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak(self) -> tuple[int, int] | None:
        """Most bytes allocated, and reserved for that, since `release`, weights included; None where torch does not
        count them (not CUDA).
        """
        if self.torch.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.torch), torch.cuda.max_memory_reserved(self.torch)

    def free(self) -> int:
        """Bytes that can still be allocated, as far as the system says; 0 where it does not."""
        if self.torch.type == "cuda":
            return torch.cuda.mem_get_info(self.torch)[0]
        return free_memory() or 0

    def describe(self) -> dict[str, str | int]:
        """Name, memory, software, and `dtype`: the 16 bits that are fastest here."""
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

    def once() -> float:
        begin = device.now()
        run()
        return device.now() - begin

    return repeated(once, runs=runs, seconds=seconds)


def repeated(once: Callable[[], float], *, runs: int, seconds: float) -> Timing:
    """As `timed`, of a function that returns how many seconds it took."""
    first = once()
    taken: list[float] = []
    while len(taken) < runs and (not taken or sum(taken) + taken[-1] < seconds - first):
        taken.append(once())
    return Timing(first, statistics.median(taken), len(taken))


@torch.no_grad()
def measure_limits(device: Device, plan: Plan, dtype: torch.dtype) -> Iterator[Figure]:
    """Bytes and operations in a second. Takes a quarter of the free memory at most.

    A decoding step reads all weights and writes next to nothing, so reading is what limits it. A sum over a large
    tensor reads and does little else, but no such kernel is sure to be the fastest; a copy, whose bytes count twice,
    read and written, is the usual measure. Figures are held against the greater of the two.
    """
    on_cpu = device.torch.type == "cpu"
    size = min(plan.copied_bytes, device.free() // 8 or plan.copied_bytes, CPU_BYTES if on_cpu else plan.copied_bytes)
    source = torch.randn(size // 4, device=device.torch)
    target = torch.empty_like(source)
    for name, moved, run in (
        ("memory copy, read and written", 2 * source.nbytes, partial(target.copy_, source)),
        ("memory read, a sum", source.nbytes, partial(torch.sum, source)),
    ):
        yield Figure("device", "device", name, round(moved / _seconds(run, device) / 1e9, 2), "GB/s")
    del source, target, run
    device.release()
    side = min(plan.matmul_side, CPU_SIDE) if on_cpu else plan.matmul_side
    for kind in dict.fromkeys([dtype, *([torch.float32] if on_cpu else [])]):  # few CPUs are faster in 16 bits
        left, right = (torch.randn(side, side, device=device.torch).to(kind) for _ in range(2))
        rate = 2 * side**3 / _seconds(partial(torch.mm, left, right), device) / 1e12
        name = f"{name_of(kind)} matrix product, {side} x {side}"
        yield Figure("device", "device", name, round(rate, 4), "TFLOP/s")


def name_of(dtype: torch.dtype) -> str:
    """A dtype as people write it."""
    return str(dtype).removeprefix("torch.")


def _seconds(run: Callable[[], object], device: Device) -> float:
    """Of one call: the median over blocks of calls, each of some hundredths of a second."""
    once = timed(run, device, runs=3, seconds=SECONDS).median
    calls = max(1, round(SHORTEST / max(once, 1e-6)))

    def block() -> None:
        for _ in range(calls):
            run()

    return timed(block, device, runs=REPEATS, seconds=SECONDS).median / calls
