"""From a checkpoint's name to a pipeline.

load            resolve the name, build the model, and put the checkpoint's tensors in one by one
build           a model as it is run on a device, from whoever has its tensors
choose_device   where it is put
free_memory     how much there is for it
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .adapt.adapters import load_adapter
from .adapt.attend import attend_faster
from .adapt.fuse import fuse
from .adapt.int4 import arrange, quantize_structure
from .adapt.layers import LayerSplit, layer_counts
from .adapt.layout import columns_first, read_for_few_rows
from .adapt.packed_cpu import table_bytes
from .adapt.ranks import Ranks, join, of_first, shared_errors
from .config import GenerationConfig, QuantizationConfig, QwenVLConfig
from .draw import FONT_FILE
from .errors import ConfigError
from .model.qwenvl import QwenVL
from .pipeline import Pipeline
from .text.tokenizer import VOCABULARY_FILE, Tokenizer
from .weights.checkpoint import Checkpoint, load_into
from .weights.hub import resolve
from .weights.keymap import Entry, entries

Part = Callable[[str, Tensor], Tensor]  # what is loaded of the tensor of a name
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name: str | Path = "tiny",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    parallel: str | None = None,
    quiet: bool = False,
) -> Pipeline:
    """Load a checkpoint, ready to be asked.

    Args:
        name: a hub id ("Qwen/Qwen-VL-Chat", "modelscope:qwen/Qwen-VL-Chat"), a folder in the reference's layout or
            ours, or "tiny", the small checkpoint that comes with the library.
        device: "auto" (CUDA, else MPS, else the CPU) or a torch device; with parallel "layers" also several, as in
            "cuda:0,cuda:2".
        dtype: "auto" or a torch dtype, by name or as an object. "auto" is bfloat16 on CUDA (float16 where the GPU has
            no bfloat16), float16 on MPS, and on the CPU float32 if that fits in memory, else bfloat16.
        revision, cache_dir: of the hub download.
        adapter: a LoRA adapter, as the folder that training or PEFT wrote. It is folded into the weights, so that the
            model is as fast as without; beside packed weights, which cannot take it in, it stays by itself.
        parallel: None, one device. "tensor": each of the processes that torchrun started has a part of every layer, on
            a device of its own. "layers": consecutive layers on consecutive devices, in one process; "auto" and "cuda"
            are then all GPUs there are. See docs/parallel.md.
        quiet: no progress bars and no remarks.

    The model is built on the meta device and its tensors are put in one by one, so memory never holds them twice.
    Raises CheckpointError or ConfigError.
    """
    if parallel not in (None, "tensor", "layers"):
        raise ConfigError(f"parallel {parallel!r} is not a way to use several devices; use 'tensor', 'layers' or None")
    ranks = Ranks.of_torchrun() if parallel == "tensor" else None
    quiet = quiet or (ranks is not None and not ranks.first)
    if adapter is not None and not Path(adapter).is_dir():
        raise ConfigError(f"there is no folder {adapter} with an adapter")
    if adapter is not None and ranks is not None:
        raise ConfigError(
            "parallel 'tensor' takes no adapter: fold it into a 16-bit checkpoint first, by qwenvl convert "
            f"{name} FOLDER --adapter {adapter}, and load FOLDER; or use parallel 'layers'"
        )
    folder = resolve(name, revision=revision, cache_dir=cache_dir, quiet=quiet)
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    # The small files before the large ones: what is wrong with them should not take minutes to be said.
    generation_config = GenerationConfig.load(folder)
    tokenizer = Tokenizer(folder) if (folder / VOCABULARY_FILE).is_file() else None
    if tokenizer is not None and tokenizer.image_start_id != config.visual.image_start_id:
        raise ConfigError(
            f"{folder}: visual.image_start_id is {config.visual.image_start_id} in config.json, but <img> is "
            f"{tokenizer.image_start_id} in {VOCABULARY_FILE}"
        )
    if ranks is not None:
        place = _over_ranks(ranks, device, dtype, checkpoint, quiet)
    elif parallel == "layers":
        place = _over_layers(device, dtype, checkpoint, quiet)
    else:
        place = _on_one(choose_device(device), dtype, checkpoint, quiet)

    def fill(model: QwenVL, laid_out: frozenset[str]) -> None:
        where = place.device_of or place.device
        load_into(
            model, checkpoint, dtype=place.dtype, device=where, columns_first=laid_out, part=place.part, quiet=quiet
        )
        if adapter is not None:
            load_adapter(model, adapter, merge=config.quantization_config is None)

    with shared_errors(ranks is not None):
        try:
            model = build(config, place.dtype, place.device, fill, spread=place.spread, quiet=quiet)
        except torch.OutOfMemoryError as error:  # there was room at first: it lies in pieces, or was taken meanwhile
            traceback.clear_frames(error.__traceback__)  # which hold what was loaded
            torch.cuda.empty_cache()
            raise place.no_room() from None
    font = folder / FONT_FILE
    return Pipeline(model, tokenizer, generation_config, name=str(name), font=font if font.is_file() else None)


def build(
    config: QwenVLConfig,
    dtype: torch.dtype,
    device: torch.device,
    fill: Callable[[QwenVL, frozenset[str]], None],
    *,
    spread: Callable[[QwenVL], None] | None = None,
    quiet: bool = False,
) -> QwenVL:
    """A model in eval mode, made on the meta device, adapted to its weights and to the device that it is to run on.

    `fill(model, names)` puts the tensors in, those of these names laid out by columns (see `adapt/layout.py`). Before,
    `spread(model)` makes it the model of several devices.
    """
    with torch.device("meta"):
        model = QwenVL(config)
        if config.quantization_config is not None:
            quantize_structure(model, config)
        if device.type == "cpu" and dtype == torch.float32:
            read_for_few_rows(model.decoder)
        if spread is not None:
            spread(model)
    fill(model, columns_first(model, dtype, device))
    if device.type == "cuda":  # elsewhere, it would take the weights out of the mapped file
        fuse(model)
        torch.cuda.empty_cache()  # of the halves, which are too small for what is allocated next
        attend_faster(model)
    arrange(model, quiet=quiet)
    return model.eval()


@dataclass(frozen=True)
class _Place:
    """Where a model goes: to `device`, or each tensor to `device_of(name)`; all of it, or a part of each tensor.

    `spread` changes the structure to that, and `no_room` is the error should the memory not suffice after all.
    """

    device: torch.device
    dtype: torch.dtype
    no_room: Callable[[], ConfigError]
    device_of: Callable[[str], torch.device] | None = None
    part: Part | None = None
    spread: Callable[[QwenVL], None] | None = None


def _on_one(device: torch.device, dtype: str | torch.dtype, checkpoint: Checkpoint, quiet: bool) -> _Place:
    chosen = _choose_dtype(dtype, device, checkpoint, quiet)
    _check_room(chosen, [device], checkpoint)
    return _Place(device, chosen, lambda: _no_room(chosen, [device], checkpoint))


def _over_ranks(
    ranks: Ranks, device: str | torch.device, dtype: str | torch.dtype, checkpoint: Checkpoint, quiet: bool
) -> _Place:
    """This rank's part of every layer, on its own device."""
    from .adapt.parallel import TensorParallel, check_ranks

    check_ranks(checkpoint.config, ranks.count)
    own = ranks.device(device)
    mesh = join(own)
    with shared_errors():  # memory may differ from rank to rank
        chosen = _choose_dtype(dtype, own, checkpoint, quiet)
    chosen = of_first(chosen)
    tensor = TensorParallel(checkpoint.config, mesh)
    with shared_errors():
        _check_room(chosen, [own], checkpoint, tensor.part)
    no_room = partial(_no_room, chosen, [own], checkpoint, tensor.part)
    return _Place(own, chosen, no_room, part=tensor.part, spread=tensor.apply)


def _over_layers(device: str | torch.device, dtype: str | torch.dtype, checkpoint: Checkpoint, quiet: bool) -> _Place:
    """Consecutive layers on consecutive devices, filled to equal shares, with a cache of the longest text."""
    devices = split_devices(device)
    first = devices[0]
    if len(devices) == 1:
        if not quiet:
            tqdm.write(f"parallel 'layers' found one device, {first}: loading as without", file=sys.stderr)
        return _on_one(first, dtype, checkpoint, quiet)
    chosen = _choose_dtype(dtype, first, checkpoint, quiet)
    _check_room(chosen, devices, checkpoint)
    sizes = {entry.ours: _entry_bytes(entry, chosen, checkpoint) for entry in checkpoint.entries}
    block = sum(count for name, count in sizes.items() if name.startswith("decoder.blocks.0."))
    head = sum(count for name, count in sizes.items() if name.startswith(("decoder.ln_f.", "decoder.lm_head.")))
    config = checkpoint.config
    others = [sum(sizes.values()) - config.num_hidden_layers * block - head, *[0] * (len(devices) - 2), head]
    free = _free(devices) if first.type == "cuda" else [1] * len(devices)
    cache = 2 * config.hidden_size * config.max_position_embeddings * chosen.itemsize
    split = LayerSplit(devices, layer_counts(config.num_hidden_layers, block + cache, others, free))
    no_room = partial(_no_room, chosen, devices, checkpoint)
    return _Place(first, chosen, no_room, device_of=split.device_of, spread=split.apply)


def split_devices(device: str | torch.device) -> list[torch.device]:
    """The devices that layers are to be split over: those named, or all GPUs. Raises ConfigError."""
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [choose_device(name.strip()) for name in str(device).split(",")]
    if len({one.type for one in devices}) > 1:
        raise ConfigError(f"device {device}: layers are split over devices of one kind")
    return [torch.device("cuda", one.index or 0) if one.type == "cuda" else one for one in devices]


def _check_room(
    dtype: torch.dtype, devices: Sequence[torch.device], checkpoint: Checkpoint, part: Part | None = None
) -> None:
    """Refuse what GPUs cannot hold before the first byte is read. Raises ConfigError."""
    if devices[0].type != "cuda":
        return
    torch.cuda.empty_cache()  # of a model that was dropped, which would be counted as taken
    if _bytes_as(dtype, checkpoint, part=part) > sum(_free(devices)):
        raise _no_room(dtype, devices, checkpoint, part)


def _no_room(
    dtype: torch.dtype, devices: Sequence[torch.device], checkpoint: Checkpoint, part: Part | None = None
) -> ConfigError:
    """The error for weights that GPUs cannot hold, with what would fit."""
    needed, free = _bytes_as(dtype, checkpoint, part=part), sum(_free(devices))
    share = needed / _bytes_as(dtype, checkpoint)
    host = free_memory() or sys.maxsize
    four = entries(replace(checkpoint.config, quantization_config=QuantizationConfig()))
    packed = sum(math.prod(entry.our_shape) * (4 if entry.kind == "packed" else 2) for entry in four)
    ways = [
        ("dtype bfloat16", share * _bytes_as(torch.bfloat16, checkpoint), free),
        ("a checkpoint in 4 bits (qwenvl quantize makes one)", share * packed, free),
        ("bfloat16 on device cpu", _bytes_as(torch.bfloat16, checkpoint, arranged=True), host),
    ]
    fitting = [f"{way} takes {_gb(count)} of {_gb(room)}" for way, count, room in ways if count < room]
    what = "the weights take" if part is None else "this process's part of the weights takes"
    return ConfigError(
        f"{what} {_gb(needed)} as {str(dtype).removeprefix('torch.')} and {_gb(free)} are free on "
        f"{', '.join(map(str, devices))}: {'; '.join(fitting) or 'use a device with more memory, or several'}"
    )


def _free(devices: Sequence[torch.device]) -> list[int]:
    """Bytes that GPUs have left."""
    return [torch.cuda.mem_get_info(device)[0] for device in devices]


def _gb(count: float) -> str:
    """Bytes as people say them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _bytes_as(dtype: torch.dtype, checkpoint: Checkpoint, *, arranged: bool = False, part: Part | None = None) -> int:
    """What the weights, or a part of each, take once they are loaded; `arranged`, as packed ones are for a CPU."""
    return sum(_entry_bytes(entry, dtype, checkpoint, arranged, part) for entry in checkpoint.entries)


def _entry_bytes(
    entry: Entry, dtype: torch.dtype, checkpoint: Checkpoint, arranged: bool = False, part: Part | None = None
) -> int:
    quantization = checkpoint.config.quantization_config
    if arranged and quantization is not None and entry.ours.endswith(".qweight"):
        inputs = entry.our_shape[0] * quantization.per_word
        return table_bytes(inputs, entry.our_shape[1], quantization.groups(inputs))
    whole = math.prod(entry.our_shape)
    held = whole if part is None else part(entry.ours, torch.empty(entry.our_shape, device="meta")).numel()
    return held * (dtype.itemsize if entry.kind == "float" else checkpoint.at(entry).bytes // whole)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that is meant, `auto` being the fastest there is. Raises ConfigError for one that is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is not one; use auto, cpu, cuda, cuda:1 or mps") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}.get(chosen.type, 0)
    if (chosen.index or 0) >= count:
        raise ConfigError(f"there is no device {chosen} to use: {count} of its kind were found; use auto or cpu")
    return chosen


def _choose_dtype(dtype: str | torch.dtype, device: torch.device, checkpoint: Checkpoint, quiet: bool) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype != "auto":
        if str(dtype) in DTYPES:
            return DTYPES[str(dtype)]
        raise ConfigError(f"dtype {dtype!r} is not one; use auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        # Asked of the hardware: newer torch also says yes where bfloat16 is only emulated.
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "mps":
        return torch.float16
    needed = _bytes_as(torch.float32, checkpoint, arranged=True)
    free = free_memory()
    if free is None or needed < free:
        return torch.float32
    if not quiet:
        tqdm.write(
            f"float32 would take {_gb(needed)} and {_gb(free)} are free: loading as bfloat16, which takes "
            f"{_gb(_bytes_as(torch.bfloat16, checkpoint, arranged=True))} and is slower on most CPUs",
            file=sys.stderr,
        )
    return torch.bfloat16


def free_memory() -> int | None:
    """Bytes that new allocations can get without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _container_memory())
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _container_memory() -> int:
    """What the control group that we run in (a container, a batch job) leaves of its limit."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max": no limit
        return sys.maxsize
