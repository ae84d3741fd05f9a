"""What is left when training is over: whole checkpoints, in the folder layout that `qwenvl.load` opens.

write_model     trained weights as a checkpoint, with everything else as its base had it
merge_adapter   a base checkpoint and an adapter as one checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..adapt.adapters import load_adapter
from ..config import CONFIG_FILE, read_json
from ..loading import load
from ..weights.checkpoint import DTYPES, Checkpoint
from ..weights.folder import side_files
from ..weights.keymap import Layout
from ..weights.write import MAX_SHARD_BYTES, Spec, write_folder


def write_model(
    tensors: Mapping[str, Tensor],
    base: Checkpoint,
    destination: str | Path,
    *,
    to: Layout = "qwenvl",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> bool:
    """Write tensors under our names (a `state_dict()`) as what became of the checkpoint `base`.

    Each has the dtype in which its base stores it. Vocabulary, configuration and font are the base's, without the
    configuration's `note`, which was about other weights. False if `destination` is exactly that already. Raises
    CheckpointError as `write_folder` does.
    """
    entries = {entry.name(to): entry for entry in base.entries}

    def read(names: Sequence[str]) -> Iterator[Tensor]:
        for name in names:
            entry = entries[name]
            tensor = tensors[entry.ours].detach().to("cpu", DTYPES[base.at(entry).dtype])
            yield entry.translate(tensor, "qwenvl", to, base.config)

    return write_folder(
        Path(destination),
        {name: Spec(entry.shape(to), base.at(entry).dtype) for name, entry in entries.items()},
        read,
        to,
        _side_files(base.folder),
        max_shard_bytes=max_shard_bytes,
        quiet=quiet,
    )


def _side_files(folder: Path) -> dict[str, bytes]:
    files = side_files(folder)
    config = read_json(folder / CONFIG_FILE)
    if config.pop("note", None) is not None:
        files[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def merge_adapter(
    source: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    to: Layout = "qwenvl",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quiet: bool = False,
) -> bool:
    """Write the checkpoint folder `source` with an adapter folded in as `destination`, in the layout `to`.

    False if it is exactly that already. Takes the whole model into the CPU's memory. Raises ConfigError and
    CheckpointError as `load_adapter` and `write_folder` do; packed weights cannot take an adapter in.
    """
    base = Checkpoint(source)
    (norm,) = [entry for entry in base.entries if entry.ours == "decoder.ln_f.weight"]
    model = load(source, "cpu", DTYPES[base.at(norm).dtype], quiet=quiet).model
    load_adapter(model, adapter, merge=True)
    return write_model(model.state_dict(), base, destination, to=to, max_shard_bytes=max_shard_bytes, quiet=quiet)
