"""Write checkpoint folders that are whole or not there: shard by shard, resumable, renamed at the end.

    write_folder        tensors that are read as they are written (conversion)
    save                tensors in memory, in our layout (a model that was made or trained here)
    check_destination   refuse early what would be refused at the end

A folder grows as `<destination>.partial`. Each file in it is written under a temporary name, flushed to the disk and
renamed, so that a file with its final name is complete; the folder gets its own final name last. To continue a run that
was killed, run it again: finished shards are compared byte for byte with what would be written and kept if equal. No
record of the earlier run is needed, and a source that changed in between does no harm.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import CONFIG_FILE, QwenVLConfig
from ..errors import CheckpointError
from ..files import TEMPORARY, flush_folder, whole_file
from .checkpoint import DTYPES, FORMAT, VERSION, dtype_name, progress_bar
from .folder import INDEX_FILE, SIDE_FILES, few
from .keymap import Layout, Shape

MAX_SHARD_BYTES = 2_000_000_000
METADATA: dict[Layout, dict[str, str]] = {
    "qwenvl": {"format": FORMAT, "version": VERSION},
    "reference": {"format": "pt"},
}
_ALIGNMENT = 64  # a shard's data begins on a cache line
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
Piece = bytes | memoryview
Reader = Callable[[Sequence[str]], Iterable[Tensor]]  # the named tensors, in the order of the names


@dataclass(frozen=True)
class Spec:
    """A tensor that is to be written: its shape, and its dtype as safetensors spells it."""

    shape: Shape
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class _Shard:
    """A file that is to be written: every byte of its header, and what follows in which order."""

    file: str
    names: list[str]
    header: bytes
    bytes: int


def write_folder(
    destination: Path,
    specs: Mapping[str, Spec],
    read: Reader,
    layout: Layout,
    side_files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> bool:
    """Write a checkpoint folder; False if `destination` is exactly that already, so that nothing was written.

    `specs` names the tensors in the order in which they should lie on disk. Raises CheckpointError if the destination
    holds something else, if the disk has or gets too little room, or if it cannot be written; what was finished by then
    is kept for the next run.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    destination = Path(os.path.abspath(destination))
    shards = _plan(specs, METADATA[layout], max_shard_bytes)
    small = {**side_files, INDEX_FILE: _index(specs, shards)}
    partial = _partial(destination)
    try:
        if _is_in_use(destination):
            if _is_finished(destination, shards, small, read):
                return False
            raise CheckpointError(f"{destination} exists and holds something else; remove it or name another folder")
        partial.mkdir(parents=True, exist_ok=True)
        _sweep(partial, {shard.file for shard in shards})
        _check_room(partial, sum(shard.bytes for shard in shards) + sum(map(len, small.values())))
        with progress_bar("writing", sum(shard.bytes for shard in shards), quiet) as bar:
            for shard in shards:
                path = partial / shard.file
                if path.exists() and _is_written(path, shard, read):
                    bar.update(shard.bytes)
                else:
                    _write(path, _pieces(shard, read, bar))
        for name, content in small.items():
            _write(partial / name, [content])
        if destination.is_dir():  # an empty one
            destination.rmdir()
        os.rename(partial, destination)
        flush_folder(destination.parent)
    except OSError as error:
        raise _explained(error, destination, partial) from None
    return True


def save(
    tensors: Mapping[str, Tensor],
    destination: str | Path,
    config: QwenVLConfig,
    side_files: Mapping[str, bytes] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> None:
    """Write tensors under our names (a `state_dict()`) as a checkpoint folder in our layout.

    `side_files` (vocabulary, generation config, ...) are written as given; a `config.json` among them replaces the one
    that `config` would make. Raises CheckpointError as `write_folder` does; `Checkpoint(destination)` checks it.
    """
    specs = {name: Spec(tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
    config_file = {CONFIG_FILE: (json.dumps(config.to_dict(), indent=2) + "\n").encode()}
    write_folder(
        Path(destination),
        specs,
        lambda names: (tensors[name].detach().cpu() for name in names),
        "qwenvl",
        {**config_file, **(side_files or {})},
        max_shard_bytes=max_shard_bytes,
        quiet=quiet,
    )


def check_destination(destination: str | Path, size: int) -> None:
    """Before long work, refuse what `write_folder` would refuse after it; `size` is what is to be written, in bytes.

    Nothing is made on the disk. Raises CheckpointError for a destination that is in use, whatever it holds, that cannot
    be written, or whose disk has no room.
    """
    destination = Path(os.path.abspath(destination))
    partial = _partial(destination)
    try:
        if _is_in_use(destination):
            raise CheckpointError(f"{destination} exists already; remove it or name another folder")
        above = _above(partial)
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise CheckpointError(f"cannot write {destination}: {above} is not a folder that you may write into")
        if partial.is_dir():
            _refuse_foreign(partial)
        _check_room(partial, size)
    except OSError as error:
        raise _explained(error, destination, partial) from None


def _partial(destination: Path) -> Path:
    """Where a folder grows until it is whole."""
    return destination.parent / f"{destination.name}.partial"


def _plan(specs: Mapping[str, Spec], metadata: dict[str, str], max_shard_bytes: int) -> list[_Shard]:
    """Cut the tensors into shards of at most `max_shard_bytes`; a larger tensor has a shard of its own."""
    cut: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, spec in specs.items():
        if spec.bytes > room and cut[-1]:
            cut.append([])
            room = max_shard_bytes
        cut[-1].append(name)
        room -= spec.bytes
    return [
        _shard(f"model-{number:05}-of-{len(cut):05}.safetensors", {name: specs[name] for name in names}, metadata)
        for number, names in enumerate(cut, 1)
    ]


def _shard(file: str, specs: dict[str, Spec], metadata: dict[str, str]) -> _Shard:
    """Lay out one safetensors file: the length of the header in 8 bytes, the header, the tensors without gaps."""
    # Widest elements first, so that every tensor lies on a multiple of its element's size.
    names = sorted(specs, key=lambda name: -DTYPES[specs[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + specs[name].bytes
        header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    prefix = len(text).to_bytes(8, "little") + text
    return _Shard(file, names, prefix, len(prefix) + end)


def _index(specs: Mapping[str, Spec], shards: list[_Shard]) -> bytes:
    placed = {name: shard.file for shard in shards for name in shard.names}
    metadata = {"total_size": sum(spec.bytes for spec in specs.values())}
    return (json.dumps({"metadata": metadata, "weight_map": dict(sorted(placed.items()))}, indent=2) + "\n").encode()


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes in row-major order, [bytes] uint8; a view unless its layout forbids one."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _pieces(shard: _Shard, read: Reader, bar: tqdm) -> Iterator[Piece]:
    yield shard.header
    bar.update(len(shard.header))
    for tensor in read(shard.names):
        yield _bytes(tensor).numpy().data
        bar.update(tensor.nbytes)


def _write(path: Path, pieces: Iterable[Piece]) -> None:
    with whole_file(path) as file:
        for piece in pieces:
            file.write(piece)


def _is_written(path: Path, shard: _Shard, read: Reader) -> bool:
    """Whether a file is, byte for byte, what would be written; read through mappings, a tensor at a time."""
    if path.stat().st_size != shard.bytes:
        return False
    written = torch.from_file(str(path), shared=False, size=shard.bytes, dtype=torch.uint8)
    position = len(shard.header)
    if bytes(written[:position].numpy()) != shard.header:
        return False
    for tensor in read(shard.names):
        if not torch.equal(written[position : position + tensor.nbytes], _bytes(tensor)):
            return False
        position += tensor.nbytes
    return True


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _is_in_use(destination: Path) -> bool:
    return destination.exists() and not _is_empty_folder(destination)


def _is_finished(folder: Path, shards: list[_Shard], small: Mapping[str, bytes], read: Reader) -> bool:
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {*small, *(shard.file for shard in shards)}:
        return False
    return all((folder / name).read_bytes() == content for name, content in small.items()) and all(
        _is_written(folder / shard.file, shard, read) for shard in shards
    )


def _sweep(partial: Path, planned: set[str]) -> None:
    """Remove what an earlier, different or killed run left; refuse a folder that is not such a run's."""
    _refuse_foreign(partial)
    for path in [path for path in partial.iterdir() if path.name not in planned]:
        path.unlink()


def _refuse_foreign(partial: Path) -> None:
    names = {path.name: path.name.removesuffix(TEMPORARY) for path in sorted(partial.iterdir())}
    foreign = [
        n for n, name in names.items() if name not in (*SIDE_FILES, INDEX_FILE) and not _SHARD_NAME.fullmatch(name)
    ]
    if foreign:
        raise CheckpointError(f"{partial} holds files that are not a conversion's ({few(foreign)}); move them away")


def _above(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in path.parents if folder.exists())


def _check_room(partial: Path, wanted: int) -> None:
    """Before the first byte: is there room for what is not there yet?"""
    wanted -= sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0
    above = _above(partial)
    free = shutil.disk_usage(above).free
    if free < wanted:
        if _is_empty_folder(partial):
            partial.rmdir()
        raise CheckpointError(
            f"{above} has {free / 1e9:.3f} GB free and {wanted / 1e9:.3f} GB are needed; free some room or name a "
            "folder on another disk"
        )


def _explained(error: OSError, destination: Path, partial: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full, {destination} is not finished: free some room and run the same command again, it goes "
            f"on from what {partial} holds"
        )
    return CheckpointError(f"cannot write {destination}: {error.filename or partial}: {error.strerror or error}")
