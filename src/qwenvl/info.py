"""What a checkpoint is, read from its configuration and its files' headers; no weight is loaded.

summarize   the facts, as a JSON object
describe    the same for people
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .config import GenerationConfig
from .weights.checkpoint import Checkpoint
from .weights.keymap import Entry

# Parts in reading order: what people call them, and how the names of their tensors begin.
PARTS: dict[str, tuple[str, ...]] = {
    "vision tower": ("visual.",),
    "resampler": ("resampler.",),
    "token embeddings": ("decoder.wte.",),
    "decoder blocks": ("decoder.blocks.", "decoder.ln_f."),
    "head": ("decoder.lm_head.",),
}


def _parameters(entry: Entry, per_word: int) -> int:
    """How many of the model's parameters a tensor holds: packed words hold several, their scales and zeros none."""
    leaf = entry.ours.rpartition(".")[2]
    if leaf in ("qzeros", "scales", "g_idx"):
        return 0
    return math.prod(entry.our_shape) * (per_word if leaf == "qweight" else 1)


def summarize(folder: Path) -> dict[str, Any]:
    """Configuration, parameters and bytes of each part, dtypes, and bytes of KV cache a token takes.

    Raises ConfigError and CheckpointError for a folder that is not a whole checkpoint.
    """
    checkpoint = Checkpoint(folder)
    config, generation = checkpoint.config, GenerationConfig.load(folder)
    per_word = 1 if config.quantization_config is None else config.quantization_config.per_word
    parts = {
        part: {
            "parameters": sum(_parameters(e, per_word) for e in checkpoint.entries if e.ours.startswith(beginning)),
            "bytes": sum(checkpoint.at(e).bytes for e in checkpoint.entries if e.ours.startswith(beginning)),
        }
        for part, beginning in PARTS.items()
    }
    return {
        "folder": str(folder),
        "layout": checkpoint.layout,
        "note": config.note,
        "tensors": len(checkpoint.entries),
        "dtypes": sorted({checkpoint.at(entry).dtype for entry in checkpoint.entries}),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": checkpoint.bytes,
        "kv_cache_bytes_per_token_16_bit": 2 * 2 * config.num_hidden_layers * config.hidden_size,
        "chat_format": generation.chat_format,
        "config": config.to_dict(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a terminal."""
    config, visual = facts["config"], facts["config"]["visual"]
    quantized = config.get("quantization_config")
    stored = ", ".join(facts["dtypes"])
    if quantized:
        size = quantized["group_size"]
        stored = f"int{quantized['bits']} ({'one scale an output' if size == -1 else f'groups of {size}'}"
        stored += ", the head too)" if quantized["lm_head"] else ")"
    grid = visual["image_size"] // visual["patch_size"]
    lines = [
        f"{facts['folder']}: {facts['layout']} layout, {facts['chat_format']}, {stored}",
        *([f"note: {facts['note']}"] if facts["note"] else []),
        "",
        f"vision    {visual['image_size']} px in {grid} x {grid} patches, {visual['layers']} layers of "
        f"{visual['width']}, {visual['heads']} heads -> {visual['n_queries']} visual tokens",
        f"decoder   {config['num_hidden_layers']} layers of {config['hidden_size']}, {config['num_attention_heads']} "
        f"heads, SwiGLU {config['intermediate_size'] // 2}, vocabulary {config['vocab_size']}",
        f"positions trained at {config['seq_length']}, up to {config['max_position_embeddings']} "
        f"(dynamic NTK {_on(config['use_dynamic_ntk'])}, log-n {_on(config['use_logn_attn'])})",
        "",
        f"{'part':18}{'parameters':>16}{'bytes':>18}",
    ]
    total = {"parameters": facts["parameters"], "bytes": facts["bytes"]}
    for part, size in [*facts["parts"].items(), ("all", total)]:
        lines.append(f"{part:18}{size['parameters']:>16,}{size['bytes']:>18,}")
    cache = facts["kv_cache_bytes_per_token_16_bit"]
    longest = config["max_position_embeddings"]
    lines += ["", f"KV cache  {cache:,} bytes a token in 16 bits, {cache * longest / 1e9:.2f} GB for {longest} tokens"]
    return "\n".join(lines)


def _on(flag: bool) -> str:
    return "on" if flag else "off"
