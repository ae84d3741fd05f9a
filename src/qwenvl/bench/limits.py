"""What the device itself can do: how fast its memory copies and is read, how fast it multiplies matrices.

A decoding step reads all weights and writes next to nothing, so reading is what limits it. A sum over a large tensor
reads and does little else, but no such kernel is sure to be the fastest; a copy, whose bytes are counted twice, read
and written, is the usual measure. The limit that figures are held against is the greater of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from .device import Device, timed
from .figures import Figure
from .plan import Plan
from .roofline import COPY, MATMUL, READ

SHORTEST = 0.01  # seconds that are timed at once, so that looking at the clock is none of it
REPEATS = 9
SECONDS = 1.5  # for each of the measurements
CPU_SIDE = 2048  # of the matrices there, where larger ones are multiplied no faster


@torch.no_grad()
def measure(device: Device, plan: Plan, dtypes: Sequence[torch.dtype]) -> Iterator[Figure]:
    """Rates of copying, of reading and, for each dtype, of multiplying. Takes a quarter of the memory at most."""
    yield from _memory(device, min(plan.copied_bytes, device.free() // 8 or plan.copied_bytes))
    device.release()
    side = plan.matmul_side if device.torch.type == "cuda" else min(plan.matmul_side, CPU_SIDE)
    for dtype in dict.fromkeys(dtypes):
        left, right = (torch.randn(side, side, device=device.torch).to(dtype) for _ in range(2))
        seconds = _seconds(partial(torch.mm, left, right, out=torch.empty_like(left)), device)
        rate = round(2 * side**3 / seconds / 1e12, 4)
        yield Figure("device", "device", f"{MATMUL}{name_of(dtype)}", rate, "TFLOP/s", note=f"{side} x {side}")


def _memory(device: Device, size: int) -> Iterator[Figure]:
    """Of tensors of `size` bytes."""
    source = torch.randn(size // 4, device=device.torch)
    target = torch.empty_like(source)
    for name, moved, run in (
        (COPY, 2 * source.nbytes, partial(target.copy_, source)),
        (READ, source.nbytes, partial(torch.sum, source)),
    ):
        yield Figure("device", "device", name, round(moved / _seconds(run, device) / 1e9, 2), "GB/s")


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
