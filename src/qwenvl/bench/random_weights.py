"""Weights that nobody trained, of any configuration: a model runs as fast on them as on a checkpoint.

    random_model        a model full of them, as `load` would build it
    random_tensor       one of its tensors
    write_checkpoint    a folder of them, in our layout

Floating-point weights are normal with the configuration's `initializer_range`, as at the start of training; packed
words are random bits whose scales give the weights that spread. So every activation stays finite, and the numbers are
as varied as real ones: multiplying zeros takes a GPU less power, and less time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import CONFIG_FILE, QuantizationConfig, QwenVLConfig
from ..errors import CheckpointError
from ..loading import build
from ..model.qwenvl import QwenVL
from ..training.memory import weight_bytes
from ..weights.checkpoint import by_columns, dtype_name
from ..weights.keymap import Entry, entries
from ..weights.write import Spec, write_folder
from .device import Device


def random_model(config: QwenVLConfig, dtype: torch.dtype, device: Device) -> QwenVL:
    """A model with random weights, drawn where they stay, so that memory never holds them twice.

    Raises CheckpointError where there is no memory for them.
    """
    torch.manual_seed(0)

    def fill(model: QwenVL, laid_out: frozenset[str]) -> None:
        for entry in entries(config):
            tensor = random_tensor(entry, config, dtype, device.torch)
            owner, _, leaf = entry.ours.rpartition(".")
            if entry.ours in laid_out:
                tensor = by_columns(tensor, dtype)
            model.get_submodule(owner).load_state_dict({leaf: tensor}, strict=False, assign=True)

    needed, free = weight_bytes(config, dtype.itemsize), device.free()
    if free and needed > free:
        raise no_room(config, needed, free)
    try:
        return build(config, dtype, device.torch, fill, quiet=True)
    except torch.OutOfMemoryError:
        raise no_room(config, needed, free) from None


def no_room(config: QwenVLConfig, needed: int, free: int) -> CheckpointError:
    """The error for weights that do not fit, with what would."""
    packed = weight_bytes(replace(config, quantization_config=QuantizationConfig()), 2)
    if config.quantization_config is None and packed < free:
        advice = f"--int4 takes {packed / 1e9:.2f} GB"
    else:
        advice = "use a device with more memory, a smaller --model, or --tiny"
    return CheckpointError(
        f"out of memory: the weights take {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; {advice}"
    )


def random_tensor(entry: Entry, config: QwenVLConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of one entry, in the dtype that a checkpoint in `dtype` stores it in."""
    shape, leaf = entry.our_shape, entry.ours.rpartition(".")[2]
    if entry.kind == "float":
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if leaf == "bias":
            return tensor.zero_()
        return tensor.fill_(1) if ".ln_" in entry.ours else tensor.normal_(std=config.initializer_range)
    quantization = config.quantization_config
    assert quantization is not None
    bits, middle = quantization.bits, 2 ** (quantization.bits - 1)
    if entry.kind == "scale":
        # Values from 0 to 2^bits - 1, all as likely, spread by 2^bits / sqrt(12) around the middle, which is the zero.
        spread = 2**bits / math.sqrt(12)
        return torch.full(shape, config.initializer_range / spread, dtype=torch.float16, device=device)
    if leaf == "g_idx":
        size = shape[0] if quantization.group_size == -1 else quantization.group_size
        return torch.arange(shape[0], dtype=torch.int32, device=device) // size
    if leaf == "qzeros":  # stored minus one
        word = sum((middle - 1) << shift for shift in range(0, 32, bits))
        return torch.full(shape, word, dtype=torch.int32, device=device)
    return torch.empty(shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31)


def write_checkpoint(folder: Path, config: QwenVLConfig, dtype: torch.dtype, device: Device) -> None:
    """Write random weights to `folder`."""
    known = {entry.ours: entry for entry in entries(config)}

    def read(names: Sequence[str]) -> Iterable[Tensor]:
        return (random_tensor(known[name], config, dtype, device.torch).cpu() for name in names)

    stored = {"float": dtype, "scale": torch.float16, "packed": torch.int32}
    specs = {name: Spec(entry.our_shape, dtype_name(stored[entry.kind])) for name, entry in known.items()}
    write_folder(folder, specs, read, "qwenvl", {CONFIG_FILE: json.dumps(config.to_dict()).encode()}, quiet=True)
