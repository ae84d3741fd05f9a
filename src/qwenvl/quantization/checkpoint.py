"""A 16-bit checkpoint folder to one whose decoder linears are packed, in the layout that is published.

quantize   load, calibrate, quantise, write
Report     what came of it
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..adapt.calibrate import Example, Method, quantize_decoder
from ..adapt.quantize import DAMPING, Packed
from ..checks import is_whole
from ..config import CONFIG_FILE, QuantizationConfig, read_json
from ..errors import ConfigError
from ..loading import choose_device, load
from ..weights.checkpoint import DTYPES, Checkpoint
from ..weights.folder import side_files
from ..weights.hub import embedded
from ..weights.keymap import Entry, Layout, entries
from ..weights.write import Spec, check_destination, write_folder
from . import SAMPLES
from .examples import examples_for_tiny, examples_from_file

QUANTIZE_CONFIG_FILE = "quantize_config.json"


@dataclass(frozen=True)
class Kind:
    """The linears of one name, over all layers: mean and largest relative error, bytes before and after."""

    error: float
    worst: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """What `quantize` made.

    linears are by name ("mlp.w1"), layers by path ("decoder.blocks.0.mlp.w1"): the relative errors of outputs on the
    calibration inputs, or of weights if there were no examples. tokens counts those inputs, seconds leaves out loading
    and writing; bytes are the tensors' of the whole checkpoint.
    """

    source: str
    destination: str
    method: Method
    quantization: QuantizationConfig
    examples: int
    tokens: int
    seconds: float
    bytes_before: int
    bytes_after: int
    linears: dict[str, Kind]
    layers: dict[str, float]


def quantize(
    source: str | Path,
    destination: str | Path,
    quantization: QuantizationConfig | None = None,
    *,
    method: Method = "gptq",
    data: str | Path | None = None,
    image_root: str | Path | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    device: str | torch.device = "auto",
    to: Layout = "reference",
    quiet: bool = False,
) -> Report:
    """Quantise the checkpoint folder `source` and write it as `destination`, in the reference's layout or ours.

    Args:
        quantization: how; the default is how the published Int4 checkpoint is packed.
        method: "gptq", or "rtn", round to nearest.
        data, image_root: conversations to calibrate with, as `qwenvl train` takes them. The embedded model has its own;
            others need a file for GPTQ.
        samples, seed: how many of them, and which.
        device: where it is computed, as in `load`.

    What is not packed keeps its bytes; linears that have no bias get one of zeros, as published. The same call gives
    the same bytes on the same machine. Raises ConfigError, CheckpointError and DataError, before anything is computed
    for all that can be known by then; what is packed already is refused, and so is a destination that is in use.
    """
    quantization = quantization or QuantizationConfig()
    if method not in get_args(Method):
        raise ConfigError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if method == "rtn" and quantization.desc_act:
        raise ConfigError("act-order (desc_act) is GPTQ's alone: round to nearest takes no input before another")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if not (is_whole(value) and value >= least):
            raise ConfigError(f"{name} must be a whole number from {least} up, not {value!r}")
    if image_root is not None and data is None:
        raise ConfigError("image_root is where the pictures of data begin: name a file of conversations, too")
    work = _Repacking(Checkpoint(source), quantization, to)
    check_destination(destination, work.size)
    device = choose_device(device)
    examples = list(_examples(work.checkpoint, method, data, image_root, samples, seed, quiet))
    try:
        model = load(source, device, "auto", quiet=quiet).model
        started = time.monotonic()
        decoder = quantize_decoder(model, quantization, examples, method=method, quiet=quiet)
    except torch.OutOfMemoryError:
        raise ConfigError(_out_of_memory(work.checkpoint)) from None
    seconds = time.monotonic() - started
    work.write(destination, decoder.packed, quiet=quiet)
    return Report(
        source=str(source),
        destination=str(destination),
        method=method,
        quantization=quantization,
        examples=len(examples),
        tokens=decoder.tokens,
        seconds=seconds,
        bytes_before=work.checkpoint.bytes,
        bytes_after=work.size,
        linears=work.kinds(decoder.errors),
        layers=decoder.errors,
    )


class _Repacking:
    """What is written for a checkpoint with the same weights packed: tensor by tensor, and from where."""

    def __init__(self, checkpoint: Checkpoint, quantization: QuantizationConfig, to: Layout) -> None:
        if (packed := checkpoint.config.quantization_config) is not None:
            raise ConfigError(
                f"{checkpoint.folder} is packed to {packed.bits} bits already: quantise the 16-bit checkpoint that it "
                "was made from"
            )
        self.checkpoint, self.quantization, self.to = checkpoint, quantization, to
        self.plain = {entry.ours: entry for entry in checkpoint.entries}
        self.written = entries(replace(checkpoint.config, quantization_config=quantization))
        self.specs = {entry.name(to): Spec(entry.shape(to), self._dtype(entry)) for entry in self.written}

    @property
    def size(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(spec.bytes for spec in self.specs.values())

    def _dtype(self, entry: Entry) -> str:
        """As safetensors spells it; a bias that is new has the dtype of its linear's weight."""
        if entry.kind != "float":
            return "I32" if entry.kind == "packed" else "F16"
        path = entry.ours.rpartition(".")[0]
        return self.checkpoint.at(self.plain.get(entry.ours) or self.plain[f"{path}.weight"]).dtype

    def write(self, destination: str | Path, packed: Mapping[str, Packed], *, quiet: bool) -> None:
        """Write the folder. Raises CheckpointError as `write_folder` does."""
        by_name = {entry.name(self.to): entry for entry in self.written}

        def read(names: Sequence[str]) -> Iterator[Tensor]:
            wanted = [self.plain[by_name[name].ours] for name in names if by_name[name].ours in self.plain]
            kept = {entry.ours: tensor for entry, tensor in self.checkpoint.stream(self.to, wanted)}
            for name in names:
                entry = by_name[name]
                path, _, leaf = entry.ours.rpartition(".")
                if entry.ours in kept:
                    yield kept.pop(entry.ours)
                elif leaf == "bias":
                    yield torch.zeros(entry.our_shape, dtype=DTYPES[self.specs[name].dtype])
                else:
                    yield getattr(packed[path], leaf)

        write_folder(Path(destination), self.specs, read, self.to, self._side_files(), quiet=quiet)

    def _side_files(self) -> dict[str, bytes]:
        """Those of the source, and how the weights are packed, in the words of the published checkpoint."""
        how = {
            "bits": self.quantization.bits,
            "group_size": self.quantization.group_size,
            "damp_percent": DAMPING,
            "desc_act": self.quantization.desc_act,
            "static_groups": False,
            "sym": self.quantization.sym,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            **({"lm_head": True} if self.quantization.lm_head else {}),
        }
        config = read_json(self.checkpoint.folder / CONFIG_FILE)
        config["quantization_config"] = {**how, "quant_method": self.quantization.quant_method}
        changed = {CONFIG_FILE: config, QUANTIZE_CONFIG_FILE: how}
        files = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in changed.items()}
        return side_files(self.checkpoint.folder) | files

    def kinds(self, errors: Mapping[str, float]) -> dict[str, Kind]:
        """The linears by their names in a block."""
        found: dict[str, list[str]] = {}
        for path in errors:
            found.setdefault(path.split(".", 3)[-1], []).append(path)
        before, after = Counter[str](), Counter[str]()
        for entry in self.checkpoint.entries:
            before[entry.ours.rpartition(".")[0]] += self.checkpoint.at(entry).bytes
        for entry in self.written:
            after[entry.ours.rpartition(".")[0]] += self.specs[entry.name(self.to)].bytes
        return {
            kind: Kind(
                error=sum(errors[path] for path in paths) / len(paths),
                worst=max(errors[path] for path in paths),
                bytes_before=sum(before[path] for path in paths),
                bytes_after=sum(after[path] for path in paths),
            )
            for kind, paths in found.items()
        }


def _examples(
    checkpoint: Checkpoint,
    method: Method,
    data: str | Path | None,
    image_root: str | Path | None,
    samples: int,
    seed: int,
    quiet: bool,
) -> Iterable[Example]:
    """The examples that are asked for, or those that come with the embedded model; none may do for round to nearest."""
    if data is not None:
        return examples_from_file(checkpoint, data, image_root=image_root, samples=samples, seed=seed, quiet=quiet)
    if checkpoint.folder.resolve() == embedded("tiny").resolve():
        return examples_for_tiny(checkpoint, samples=samples, seed=seed)
    if method == "gptq":
        raise ConfigError(
            "GPTQ is calibrated on conversations about pictures: name a file of them (--data), or take round to "
            "nearest (--method rtn), which needs none"
        )
    return ()


def _out_of_memory(checkpoint: Checkpoint) -> str:
    """What to do when the device is full. A Hessian is there once in float32 and, for its factor, thrice in float64."""
    config = checkpoint.config
    beside = (4 + 3 * 8) * max(config.hidden_size, config.mlp_width) ** 2
    return (
        f"the device has too little memory: beside the weights of {checkpoint.bytes / 1e9:.1f} GB, GPTQ takes about "
        f"{beside / 1e9:.1f} GB for its largest linear; use a larger device, or the CPU (--device cpu)"
    )
