"""Turn a checkpoint of the reference's layout into ours, and back: the same names, dtypes, shapes and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint
from .folder import side_files
from .keymap import Layout
from .write import MAX_SHARD_BYTES, Spec, write_folder


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Layout | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> bool:
    """Write the checkpoint folder `source` as `destination`, in the layout `to` (default: the other one).

    Both are written as safetensors shards of at most `max_shard_bytes` with an index; configuration, vocabulary and
    font are copied byte for byte. Values keep their dtype. Run it again to continue a run that was stopped. Returns
    False if `destination` already was this conversion, whole, so that nothing was written. Memory: one tensor of the
    source, or one shard where a `.bin` file predates torch 1.6 and cannot be mapped.

    Raises ConfigError and CheckpointError, before anything is written, for a source that is not whole and sound, and
    CheckpointError for a destination that is in use or that has no room.
    """
    checkpoint = Checkpoint(source)
    wanted: Layout = to or ("reference" if checkpoint.layout == "qwenvl" else "qwenvl")
    entries = {entry.name(wanted): entry for entry in checkpoint.entries}

    def read(names: Sequence[str]) -> Iterator[Tensor]:
        return (tensor for _, tensor in checkpoint.stream(wanted, [entries[name] for name in names]))

    return write_folder(
        Path(destination),
        {name: Spec(entry.shape(wanted), checkpoint.at(entry).dtype) for name, entry in entries.items()},
        read,
        wanted,
        side_files(checkpoint.folder),
        max_shard_bytes=max_shard_bytes,
        quiet=quiet,
    )
