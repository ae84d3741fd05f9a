"""Which files of a checkpoint folder hold the weights, and which travel beside them.

weight_files   the shards of a folder, complete or refused
SIDE_FILES     configuration, vocabulary and font
side_files     those that a folder has
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CONFIG_FILE, GENERATION_CONFIG_FILE
from ..errors import CheckpointError

SIDE_FILES = (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    "tokenizer_config.json",
    "quantize_config.json",
    "qwen.tiktoken",
    "SimSun.ttf",
)
INDEX_FILE = "model.safetensors.index.json"
# One file or an index of shards, in the order in which they are looked for: safetensors before pickles.
WEIGHT_FILES = ("model.safetensors", INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's tensors, sorted by name; `placed` is the index: tensor name -> file."""

    files: tuple[Path, ...]
    placed: dict[str, Path] | None


def few(names: list[str], shown: int = 3) -> str:
    """The first names and how many more there are, for one line of an error."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def side_files(folder: Path) -> dict[str, bytes]:
    """Configuration, vocabulary and font, byte for byte, by name. Raises CheckpointError if one cannot be read."""
    try:
        return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None


def weight_files(folder: Path) -> WeightFiles:
    """Find the weights in `folder` and check that every file the index names is there.

    Raises CheckpointError for a folder that does not exist or holds no weights, a corrupt index, a shard that is
    missing, and a shard name that points out of the folder.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _indexed(path) if name.endswith(".json") else WeightFiles((path,), None)
    raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _indexed(index: Path) -> WeightFiles:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is not valid JSON ({error}); fetch it again") from None
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f'{index} has no "weight_map" of tensor names to file names; fetch it again')
    shards = sorted(set(placed.values()))
    # A shard lives beside its index: anything else could read files that the checkpoint has no business with.
    outside = [shard for shard in shards if shard in ("", "..") or Path(shard).name != shard or "\\" in shard]
    if outside:
        raise CheckpointError(f"{index} names shards outside its own folder, which is refused: {few(outside)}")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards in {index.name}: {few(missing)}"
        )
    return WeightFiles(
        tuple(index.parent / shard for shard in shards), {name: index.parent / shard for name, shard in placed.items()}
    )
