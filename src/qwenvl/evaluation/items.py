"""What a benchmark asks, whatever file it came from.

Item       one question about pictures, and what its answer is compared with
Problem    an item, or a line of a file, that cannot be asked or scored, and why
Places     where a benchmark's files and pictures may lie in a folder of data
DataError  data that cannot be used at all
Unavailable     a benchmark that cannot be run at all
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from ..errors import QwenVLError

# A file; the bytes of one, as TSV files hold them; or what draws a picture when it is needed.
Picture: TypeAlias = "Path | bytes | Callable[[], Image.Image]"
Kind = Literal[
    "malformed",
    "duplicate id",
    "missing picture",
    "broken picture",
    "no answer",
    "missing video",
    "broken video",
    "short video",
]
REFERENCE_DATA = "data"  # how paths begin in the reference's converted files: relative to the folder above the data


class DataError(QwenVLError):
    """Data of a benchmark that are missing or that cannot be used."""


class Unavailable(DataError):
    """A benchmark that cannot be run here at all: it has no files, or asks what the checkpoint was never taught."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: as the annotations have it, or the line's number where they have none; no two are equal in a benchmark.
        pictures: in the order in which they are shown.
        text: the question, or the phrase to find; empty where a benchmark asks the same of every picture.
        truth: what the metric compares the answer with, as JSON; None where the annotations are kept by their owner.
        options: of which one is to be chosen.
        hint: what is told beside the question.
        group: the subtask, which is also scored by itself.
        shot: the answer with which it stands as an example before other questions.
        more: what else the metric needs, such as a picture's width and height.
    """

    id: str
    pictures: tuple[Picture, ...]
    text: str = ""
    truth: Any = None
    options: tuple[str, ...] = ()
    hint: str = ""
    group: str = ""
    shot: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: "vqav2_val.jsonl:17 (262148000)"."""

    kind: Kind
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Places:
    """Where the files of a benchmark lie: `root/folder/name`, or `root/name` for who has one benchmark alone."""

    def __init__(self, root: str | Path, folder: str) -> None:
        self.root, self.folder = Path(root), folder

    def file(self, name: str) -> Path:
        """The file, which need not be there."""
        inside = self.root / self.folder / name
        alone = self.root / name
        return alone if not os.path.exists(inside) and os.path.exists(alone) else inside

    def files(self, pattern: str) -> list[Path]:
        """The files there are of a name in which `*` and `**` may stand, in order, all from the same one of the two."""
        for place in (self.root / self.folder, self.root):
            if found := sorted(path for path in place.glob(pattern) if os.path.isfile(path)):
                return found
        return []

    def picture(self, name: str, folders: Sequence[str] = ()) -> Path:
        """The picture `name` of an annotation file, in the first place that has it; or the first place, if none has.

        Places are: the benchmark's folder and the root, each with the `folders` in which owners' archives put pictures
        before itself; and, for the reference's `data/..`, the folder above the root.
        """
        bare = name.removeprefix(f"{REFERENCE_DATA}/")
        # Joined as texts, since there are several for each of a million pictures, and pathlib takes ten times as long.
        root, inner = str(self.root), (*folders, "")
        places = [os.path.join(root, base, folder, bare) for base in (self.folder, "") for folder in inner]
        if bare != name:
            places = [os.path.join(root, bare), os.path.join(self.root.parent, name), *places]
        return Path(next(filter(os.path.isfile, places), places[0]))
