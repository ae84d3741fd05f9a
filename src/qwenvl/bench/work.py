"""What the work takes at least: floating-point operations and bytes of memory, by arithmetic on the configuration.

    encoding, prefilling, stepping        the work of each
    weight_bytes, step_bytes, kv_bytes    bytes of all weights, of those that a step reads, of one token's cache

A multiplication and its addition are two operations. Counted are matrix products alone; of causal attention the half
that is not masked. Bytes are each weight once and, for a step, the keys and values that are there.
Letters: P patches, W vision width, M its MLP's, Q queries, C hidden width, L layers, V vocabulary, T tokens.
"""

from __future__ import annotations

import math

from ..config import QwenVLConfig
from ..training.memory import block_linears
from ..weights.keymap import Entry, entries
from .roofline import Work

SCALE_BYTES, WORD_BYTES = 2, 4  # of packed weights: float16 and int32


def entry_bytes(entry: Entry, width: int) -> int:
    """Bytes of a tensor where floating-point weights have `width` bytes each."""
    each = {"float": width, "scale": SCALE_BYTES, "packed": WORD_BYTES}[entry.kind]
    return each * math.prod(entry.our_shape)


def weight_bytes(config: QwenVLConfig, width: int) -> int:
    """Bytes of all weights."""
    return sum(entry_bytes(entry, width) for entry in entries(config))


def step_bytes(config: QwenVLConfig, width: int) -> int:
    """Bytes of the weights that a decoding step reads: the blocks, the final norm and the head."""
    read = (e for e in entries(config) if e.ours.startswith("decoder.") and not e.ours.startswith("decoder.wte."))
    return sum(entry_bytes(entry, width) for entry in read)


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
    seen = (e for e in entries(config) if not e.ours.startswith("decoder."))
    return Work(tower + into + attend, sum(entry_bytes(entry, width) for entry in seen))


def prefilling(config: QwenVLConfig, width: int, tokens: int) -> Work:
    """T tokens through the decoder, and the head behind the last."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    linears = 2 * tokens * layers * sum(inputs * outputs for inputs, outputs in block_linears(config).values())
    attention = 2 * tokens * (tokens + 1) * hidden * layers
    return Work(linears + attention + 2 * hidden * config.vocab_size, step_bytes(config, width))


def stepping(config: QwenVLConfig, width: int, rows: int, context: float) -> Work:
    """One step of so many rows which then hold `context` tokens each, the new one included."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    linears = 2 * rows * layers * sum(inputs * outputs for inputs, outputs in block_linears(config).values())
    attention = 4 * rows * context * hidden * layers
    flops = linears + attention + 2 * rows * hidden * config.vocab_size
    return Work(flops, step_bytes(config, width) + rows * context * kv_bytes(config, width))
