"""What a device can do in a second, and so the least time that work takes there (the roofline model, Williams 2009).

Work           operations and bytes
Limits         how many of each a device does in a second
limits_from    the limits, from the figures of `limits.measure`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .figures import Figure

COPY, READ, MATMUL = "copy, bytes read and written", "sum, bytes read", "matrix product, "


@dataclass(frozen=True)
class Work:
    """Operations, and bytes that must be moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Limits:
    """Bytes and operations in a second, as measured on the device; 0 where that is not known."""

    bytes_per_second: float = 0.0
    flops_per_second: float = 0.0

    def seconds(self, *steps: Work) -> float:
        """The least that some works take one after the other: each as long as the slower of its two. 0: not known."""
        if not (self.bytes_per_second and self.flops_per_second):
            return 0.0
        return sum(max(self._memory(work), self._matmul(work)) for work in steps)

    def binding(self, *steps: Work) -> str:
        """What that is for the longest of them: "memory" or "matmul"."""
        if not self.seconds(*steps):
            return ""
        longest = max(steps, key=lambda work: self.seconds(work))
        return "memory" if self._memory(longest) > self._matmul(longest) else "matmul"

    def _memory(self, work: Work) -> float:
        return work.bytes / self.bytes_per_second

    def _matmul(self, work: Work) -> float:
        return work.flops / self.flops_per_second


def limits_from(figures: Sequence[Figure], dtype: str) -> Limits:
    """The limits of what is computed in a dtype: the faster of copying and reading, and the dtype's matrix product."""
    rates = {figure.name: figure.value for figure in figures}
    return Limits(1e9 * max(rates.get(COPY, 0.0), rates.get(READ, 0.0)), 1e12 * rates.get(f"{MATMUL}{dtype}", 0.0))
