"""Open a checkpoint folder, the reference's or ours, check it from its headers, and read it tensor by tensor.

    Checkpoint   what a folder holds: configuration, names, shapes, dtypes; `stream` yields the tensors
    load_into    fill a module that was built on the meta device

Nothing is read into memory that is not used: tensors are views of the mapped files until they are cast, rearranged or
moved. The two layouts are told apart by the safetensors header, never by a path. Of pickles only plain tensors are
read; whatever could run code is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import QwenVLConfig
from ..errors import CheckpointError
from .folder import few, weight_files
from .keymap import Entry, Layout, Shape, dropped_names, entries

FORMAT, VERSION = "qwenvl", "1"  # what our safetensors headers say
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, its shape, and its dtype (as safetensors spells it)."""

    file: Path
    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint:
    """A checkpoint folder whose names, shapes, dtypes and files have been checked against its `config.json`.

    `entries` are its tensors in the order in which they lie on disk, `stored` where each is, by its name in `layout`.
    Raises ConfigError for a configuration, CheckpointError for weights that cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        found = weight_files(self.folder)
        self.config = QwenVLConfig.load(self.folder)
        self.stored: dict[str, Stored] = {}
        layouts: set[Layout] = set()
        for file in found.files:
            layout, tensors = _read_header(file)
            layouts.add(layout)
            for name, tensor in tensors.items():
                if name in self.stored:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name} is in both {self.stored[name].file.name} and {file.name}; "
                        "fetch or convert the checkpoint again"
                    )
                self.stored[name] = tensor
        if len(layouts) > 1:
            raise CheckpointError(f"{self.folder} mixes shards of two layouts; convert the checkpoint again")
        self.layout = layouts.pop()
        if found.placed is not None:
            self._check_index(found.placed)
        self._check_tensors()
        order = {file: number for number, file in enumerate(found.files)}
        self.entries = sorted(entries(self.config), key=lambda entry: order[self.stored[entry.name(self.layout)].file])

    @property
    def bytes(self) -> int:
        """The tensors' size on disk, without those that are dropped."""
        return sum(self.at(entry).bytes for entry in self.entries)

    def at(self, entry: Entry) -> Stored:
        """Where an entry is stored, and how."""
        return self.stored[entry.name(self.layout)]

    def stream(
        self, layout: Layout = "qwenvl", wanted: Sequence[Entry] | None = None
    ) -> Iterator[tuple[Entry, Tensor]]:
        """Yield the tensors as `layout` has them, in the order of `wanted` (all, in disk order), as stored dtypes.

        Tensors that need no operation are views of the mapped file; a file is let go of when the next one begins.
        """
        for file, group in groupby(self.entries if wanted is None else wanted, key=lambda entry: self.at(entry).file):
            take = _open(file)
            for entry in group:
                yield entry, entry.translate(take(entry.name(self.layout)), self.layout, layout, self.config)
            del take  # before the next file is opened: one that could not be mapped is held whole

    def _check_index(self, placed: dict[str, Path]) -> None:
        """The index and the shards' own headers must agree on every tensor."""
        lost = [name for name in placed if name not in self.stored]
        unlisted = [name for name in self.stored if name not in placed]
        moved = [name for name, file in placed.items() if name in self.stored and self.stored[name].file != file]
        problems = [
            *_listed(lost, "that the index names and no shard holds"),
            *_listed(unlisted, "that a shard holds and the index does not name"),
            *_listed(moved, "in another shard than the index says"),
        ]
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}; fetch or convert the checkpoint again")

    def _check_tensors(self) -> None:
        """Missing, unknown, wrongly shaped or typed tensors, all in one line."""
        wanted = {entry.name(self.layout): entry for entry in entries(self.config)}
        allowed = dropped_names(self.config) if self.layout == "reference" else frozenset()
        misfits = [
            name
            for name, entry in wanted.items()
            if name in self.stored and self.stored[name].shape != entry.shape(self.layout)
        ]
        misshaped = [
            f"{name} is {list(self.stored[name].shape)} where config.json makes it "
            f"{list(wanted[name].shape(self.layout))}"
            for name in misfits
        ]
        packing = self.config.quantization_config
        hint = (
            f", which says bits {packing.bits} and group_size {packing.group_size},"
            if packing is not None and any(wanted[name].kind in ("packed", "scale") for name in misfits)
            else ""
        )
        mistyped = [
            f"{name} is {self.stored[name].dtype}"
            for name, entry in wanted.items()
            if name in self.stored
            and (
                self.stored[name].dtype not in DTYPES
                or DTYPES[self.stored[name].dtype].is_floating_point == (entry.kind == "packed")
            )
        ]
        problems = [
            *_listed([name for name in wanted if name not in self.stored], "missing"),
            *_listed([name for name in self.stored if name not in wanted and name not in allowed], "unknown"),
            *_listed(misshaped, "wrongly shaped"),
            *_listed(mistyped, "of a dtype that it cannot have"),
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder}: {'; '.join(problems)}; the weights are incomplete or config.json{hint} is not theirs"
            )


def _listed(names: list[str], what: str) -> list[str]:
    """`["2 tensors missing: a, b"]`, or nothing when there is no such tensor."""
    return [f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {few(names)}"] if names else []


def _read_header(file: Path) -> tuple[Layout, dict[str, Stored]]:
    """A shard's layout and its tensors, without reading their data."""
    if file.suffix != ".safetensors":
        pickled = _load_pickle(file, header_only=True)
        return "reference", {name: Stored(file, tuple(t.shape), dtype_name(t.dtype)) for name, t in pickled.items()}
    with _safetensors(file) as opened:
        metadata = opened.metadata() or {}
        if metadata.get("format") == FORMAT and metadata.get("version") != VERSION:
            raise CheckpointError(
                f"{file} has format version {metadata.get('version')!r}, this version reads {VERSION!r}; update qwenvl"
            )
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        tensors = {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        return ("qwenvl" if metadata.get("format") == FORMAT else "reference"), tensors


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors spells it; one that no checkpoint may have is spelled as torch does."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


def _open(file: Path) -> Callable[[str], Tensor]:
    """A function that takes tensors out of a shard by name, each at most once, so that they are freed as they go."""
    if file.suffix == ".safetensors":
        opened = _safetensors(file)
        return lambda name: opened.get_tensor(name)  # type: ignore[no-untyped-call]
    return _load_pickle(file, header_only=False).pop


def _safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or damaged ({error}); fetch it again") from None


def _load_pickle(file: Path, *, header_only: bool) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, mapped where the file allows it; on the meta device for its header alone."""
    try:
        with open(file, "rb") as opened:
            is_zip = opened.read(4) == _ZIP_MAGIC
        # Before torch 1.6 `.bin` files were bare pickles, which cannot be mapped: they are read whole, one at a time.
        device = "meta" if header_only and not is_zip else "cpu"
        tensors = torch.load(file, weights_only=True, mmap=is_zip, map_location=device)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} was refused: it is damaged, or holds pickled objects other than tensors, which could run code; "
            "use the checkpoint's safetensors files, or save it again with safetensors.torch.save_file"
        ) from None
    except Exception as error:  # a damaged pickle can fail anywhere in the unpickler
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise CheckpointError(f"{file} is truncated or damaged ({reason}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == device
        for name, tensor in tensors.items()
    ):
        raise CheckpointError(
            f"{file} does not hold a plain dictionary of named tensors, all of them dense; save a state_dict instead"
        )
    return dict(tensors)


def load_into(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Callable[[str], torch.device],
    columns_first: Collection[str] = (),
    part: Callable[[str, Tensor], Tensor] | None = None,
    quiet: bool = False,
) -> None:
    """Give every parameter and buffer of `module` (built on the meta device) its tensor from `checkpoint`.

    Floating tensors become `dtype` and move to `device`, or each to `device(name)`, one by one; int4 scales keep the
    dtype in which they are stored and packed words stay int32. On the CPU, tensors that need no cast stay views of the
    mapped file. The weights named in `columns_first` are laid out by columns (see `adapt/layout.py`). Of a module that
    has a part of some tensors, `part(name, tensor)` is what is loaded. Progress is shown in bytes on a terminal, unless
    `quiet`. Raises CheckpointError, before anything is read, if the module's names or shapes are not the checkpoint's.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {entry.ours: entry.our_shape for entry in checkpoint.entries}
    if part is not None:
        given = {name: tuple(part(name, torch.empty(shape, device="meta")).shape) for name, shape in given.items()}
    problems = [
        *_listed([name for name in expected if name not in given], "missing"),
        *_listed([name for name in given if name not in expected], "unknown to the model"),
        *_listed(
            [
                f"{name} is {list(given[name])} where the model has {list(shape)}"
                for name, shape in expected.items()
                if name in given and given[name] != shape
            ],
            "wrongly shaped",
        ),
    ]
    if problems:
        raise CheckpointError(f"{checkpoint.folder} does not fit this model: {'; '.join(problems)}")
    with progress_bar("loading", checkpoint.bytes, quiet) as bar:
        for entry, stored in checkpoint.stream():
            if entry.ours.endswith(".g_idx"):
                _check_groups(entry, stored, checkpoint.config)
            wanted = dtype if entry.kind == "float" else stored.dtype
            if part is not None:
                stored = part(entry.ours, stored)
            if entry.ours in columns_first:
                tensor = by_columns(stored, wanted)
            else:
                place = device if isinstance(device, (str, torch.device)) else device(entry.ours)
                # A part is copied: as a view, it would keep the whole.
                tensor = stored.to(device=place, dtype=wanted, copy=part is not None).contiguous()
            owner, _, leaf = entry.ours.rpartition(".")
            # Through the owner alone: loading through the whole module would walk all of it for each tensor.
            module.get_submodule(owner).load_state_dict({leaf: tensor}, strict=False, assign=True)
            bar.update(checkpoint.at(entry).bytes)


def by_columns(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight [out,in] whose columns are contiguous, made in one step, without a second copy on the way."""
    return torch.empty(weight.shape[::-1], dtype=dtype, device="cpu").copy_(weight.T).T


def _check_groups(entry: Entry, g_idx: Tensor, config: QwenVLConfig) -> None:
    """Refuse group numbers that have no scale, before a kernel reads beyond the scales, and an unannounced shuffle."""
    assert config.quantization_config is not None
    groups, size = config.quantization_config.groups(len(g_idx)), config.quantization_config.group_size
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(f"{entry.ours} names groups outside 0 to {groups - 1}: it is damaged; fetch it again")
    shuffled = groups > 1 and not torch.equal(
        g_idx, torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device) // size
    )
    if shuffled and not config.quantization_config.desc_act:
        raise CheckpointError(
            f"{entry.ours} does not take its inputs in groups of {size} in order, but config.json has desc_act false: "
            "the one is not the other's; fetch both again, or set desc_act to true if the groups are meant to be so"
        )


def progress_bar(what: str, total: int, quiet: bool) -> tqdm:
    """A bar in bytes with rate and time left; silent when `quiet` or when stderr is not a terminal."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=quiet or None)
