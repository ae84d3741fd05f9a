"""The least time that work takes on a device (the roofline model, Williams 2009), by arithmetic on the configuration.

    Work, Limits                      operations and bytes; how many of each a device does in a second
    encoding, prefilling, stepping    the work of each
    step_bytes, kv_bytes              bytes of the weights that a step reads, of one token's cache

A multiplication and its addition are two operations. Counted are matrix products alone; of causal attention the half
that is not masked. Bytes are each weight once and, for a step, the keys and values that are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..config import QwenVLConfig
from ..training.memory import block_linears
from ..weights.keymap import Entry, entries
from .figures import RATES, Figure

SCALE_BYTES, WORD_BYTES = 2, 4  # of packed weights: float16 and int32


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

    def hold(self, figure: Figure, *steps: Work, rows: int = 1) -> Figure:
        """The figure beside what these works allow: the least milliseconds, or the most steps of `rows` a second."""
        if not (least := self.seconds(*steps)):
            return figure
        limit = rows / least if figure.unit in RATES else 1e3 * least
        return replace(figure, limit=round(limit, 3), limited_by=self.binding(*steps))

    def _memory(self, work: Work) -> float:
        return work.bytes / self.bytes_per_second

    def _matmul(self, work: Work) -> float:
        return work.flops / self.flops_per_second


def entry_bytes(entry: Entry, width: int) -> int:
    """Bytes of a tensor where floating-point weights have `width` bytes each."""
    each = {"float": width, "scale": SCALE_BYTES, "packed": WORD_BYTES}[entry.kind]
    return each * math.prod(entry.our_shape)


def step_bytes(config: QwenVLConfig, width: int) -> int:
    """Bytes of the weights that a decoding step reads: the blocks, the final norm and the head.

    The order of inputs that packed weights have (`g_idx`) is looked at when they are loaded, not in a step.
    """
    read = (e for e in entries(config) if e.ours.startswith("decoder.") and not e.ours.startswith("decoder.wte."))
    return sum(entry_bytes(entry, width) for entry in read if not entry.ours.endswith(".g_idx"))


def kv_bytes(config: QwenVLConfig, width: int) -> int:
    """Bytes of keys and values that one token takes."""
    return 2 * config.num_hidden_layers * config.hidden_size * width


def encoding(config: QwenVLConfig, width: int) -> Work:
    """One picture through the vision tower and the resampler."""
    vision, hidden = config.visual, config.hidden_size
    patches, queries, wide, inner = vision.grid**2, vision.n_queries, vision.width, vision.mlp_width
    block = 2 * patches * (4 * wide * wide + 2 * wide * inner) + 4 * patches**2 * wide
    tower = 2 * patches * wide * 3 * vision.patch_size**2 + vision.layers * block
    into = 0 if wide == hidden else 2 * patches * wide * hidden  # kv_proj
    # Keys and values of the patches; queries, the output and the final projection of the queries; attention.
    attend = 2 * patches * 2 * hidden**2 + 3 * 2 * queries * hidden**2 + 4 * queries * patches * hidden
    seen = (entry for entry in entries(config) if not entry.ours.startswith("decoder."))
    return Work(tower + into + attend, sum(entry_bytes(entry, width) for entry in seen))


def prefilling(config: QwenVLConfig, width: int, tokens: int) -> Work:
    """So many tokens through the decoder, and the head behind the last."""
    attention = 2 * tokens * (tokens + 1) * config.hidden_size * config.num_hidden_layers
    head = 2 * config.hidden_size * config.vocab_size
    return Work(_linears(config, tokens) + attention + head, step_bytes(config, width))


def stepping(config: QwenVLConfig, width: int, rows: int, context: float) -> Work:
    """One step of so many rows which then hold `context` tokens each, the new one included."""
    attention = 4 * rows * context * config.hidden_size * config.num_hidden_layers
    head = 2 * rows * config.hidden_size * config.vocab_size
    read = step_bytes(config, width) + rows * context * kv_bytes(config, width)
    return Work(_linears(config, rows) + attention + head, read)


def _linears(config: QwenVLConfig, tokens: int) -> int:
    each = sum(inputs * outputs for inputs, outputs in block_linears(config).values())
    return 2 * tokens * config.num_hidden_layers * each
