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
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import CONFIG_FILE, QuantizationConfig, QwenVLConfig
from ..errors import CheckpointError
from ..loading import build, free_memory
from ..model.qwenvl import QwenVL
from ..weights.checkpoint import by_columns, dtype_name
from ..weights.keymap import Entry, entries
from ..weights.write import Spec, write_folder
from .device import Device
from .roofline import weight_bytes

SAMPLE_BYTES = 256 * 2**20  # written to tell how fast the disk is
ROOM = 0.8  # how much of the disk, of the memory and of the time a checkpoint may take
SECONDS_PER_BYTE = 1 / 1.5e9  # that making a checkpoint takes beside the disk: drawing, copying to the host


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


def write_checkpoint(
    folder: Path, config: QwenVLConfig, dtype: torch.dtype, device: Device, seconds: float
) -> QwenVLConfig:
    """Write random weights to `folder`, and return their configuration: with fewer decoder layers than asked for where
    the disk's room or speed, or the memory that is to hold them as page cache, is not enough for all.

    Raises CheckpointError if not even one layer fits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    one, two = (weight_bytes(replace(config, num_hidden_layers=n), dtype.itemsize) for n in (1, 2))
    per_second = 1 / (1 / _bytes_per_second(folder.parent, min(one, SAMPLE_BYTES)) + SECONDS_PER_BYTE)
    room = ROOM * min(shutil.disk_usage(folder.parent).free, per_second * seconds, free_memory() or math.inf)
    if one > room:
        raise CheckpointError(
            f"no checkpoint was written to {folder.parent}: one layer makes {one / 1e9:.2f} GB, and within "
            f"{seconds:.0f} s there is room for {room / 1e9:.2f} GB; set TMPDIR to a larger or faster disk"
        )
    config = replace(config, num_hidden_layers=min(config.num_hidden_layers, 1 + int((room - one) // (two - one))))
    known = {entry.ours: entry for entry in entries(config)}

    def read(names: Sequence[str]) -> Iterable[Tensor]:
        return (random_tensor(known[name], config, dtype, device.torch).cpu() for name in names)

    stored = {"float": dtype, "scale": torch.float16, "packed": torch.int32}
    specs = {name: Spec(entry.our_shape, dtype_name(stored[entry.kind])) for name, entry in known.items()}
    write_folder(folder, specs, read, "qwenvl", {CONFIG_FILE: json.dumps(config.to_dict()).encode()}, quiet=True)
    return config


def _bytes_per_second(folder: Path, sample: int) -> float:
    """How fast the disk takes what is written to it."""
    path, content = folder / "sample", os.urandom(2**20)
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, sample, len(content)):
            file.write(content[: sample - start])
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - begin
    path.unlink()
    return sample / taken
