"""Whether a benchmark's data are all there, before an evaluation begins. Nothing is downloaded.

prepare     looks at the files and pictures of a benchmark
described   what it found, in lines
Prepared    what it found
Files       one form of the data, and which of its files are there
Pictures    how many pictures are there, and which cannot be opened
"""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from tqdm import tqdm

from ..errors import ImageError
from ..image import FORMATS, LIBRARY_POLICY
from .benchmark import Benchmark, Source
from .catalogue import checked, source_of
from .items import DataError, Item, Picture, Places, Problem

LISTED = 20  # problems and pictures that are named
# Of archives of pictures whose owners tell how large they are.
ARCHIVES = {
    "http://images.cocodataset.org/zips/train2014.zip": "13 GB",
    "http://images.cocodataset.org/zips/val2014.zip": "6 GB",
    "http://images.cocodataset.org/zips/test2015.zip": "12 GB",
    "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip": "20.3 GB",
    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip": "6.6 GB",
}


@dataclass(frozen=True)
class Files:
    """One form of the data: the bytes of each file or pattern, None where there is none; where it is published."""

    files: dict[str, int | None]
    url: str
    chosen: bool  # the form that an evaluation reads


@dataclass(frozen=True)
class Pictures:
    """Those that items name, each once.

    Attributes:
        count: all of them, also those that are missing.
        broken: how many of those that are there cannot be opened; the first are in `listed`.
        size: in bytes, of those that are there.
    """

    count: int = 0
    missing: int = 0
    broken: int = 0
    size: int = 0
    listed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What there is of a benchmark in a folder.

    Attributes:
        error: why nothing could be read; None if something was.
        items: that can be asked; `expected` is how many the whole benchmark has, None if that is not known.
        problems: what is wrong, counted by kind; the first are in `listed`.
        pictures_url: where pictures are published.
    """

    benchmark: str
    root: str
    forms: tuple[Files, ...]
    error: str | None
    items: int
    expected: int | None
    problems: dict[str, int]
    listed: tuple[str, ...]
    pictures: Pictures
    pictures_url: str

    @property
    def ready(self) -> bool:
        """Whether every item of the whole benchmark can be asked."""
        whole = self.expected is None or self.items == self.expected
        return self.error is None and self.items > 0 and whole and not self.problems and not self.pictures.broken

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {**dataclasses.asdict(self), "ready": self.ready}


def prepare(benchmark: Benchmark, root: str | Path, *, quiet: bool = False) -> Prepared:
    """Read a benchmark's files and open each of its pictures. What is missing is told, not raised."""
    places = Places(root, benchmark.folder)
    error: str | None = None
    source: Source | None = None
    found: list[Item | Problem] = []
    try:
        source = source_of(benchmark, root)
        files = [path for name in source.files for path in places.files(name)]
        found = list(source.read(files, places))
        if not found:
            raise DataError(f"{benchmark.name}: {files[0]} has no entry")
    except DataError as reason:
        error = str(reason)
    items, problems = checked(found)
    return Prepared(
        benchmark=benchmark.name,
        root=str(root),
        forms=tuple(_files(one, places, chosen=one is source) for one in benchmark.sources),
        error=error,
        items=len(items),
        expected=benchmark.size,
        problems=dict(Counter(problem.kind for problem in problems)),
        listed=tuple(str(problem) for problem in problems[:LISTED]),
        pictures=_pictures(_named(found), benchmark.name, quiet),
        pictures_url=benchmark.pictures,
    )


def described(found: Prepared) -> str:
    """What there is, what is missing and where it is published, for people."""
    lines = [f"{found.benchmark} in {found.root}: {'ready' if found.ready else 'not ready'}"]
    for number, form in enumerate(found.forms, 1):
        read = " (these are read)" if form.chosen else ""
        lines.append(f"  {'annotations' if number == 1 else 'or'}{read}, published at {form.url or 'no known place'}")
        if found.error or form.chosen:
            lines += [f"    {name}: {'missing' if size is None else _bytes(size)}" for name, size in form.files.items()]
        else:
            there = sum(size is not None for size in form.files.values())
            lines.append(f"    {there} of {len(form.files)} files are there")
    archive = f"published at {found.pictures_url or 'no known place'}"
    archive += f" ({ARCHIVES[found.pictures_url]})" if found.pictures_url in ARCHIVES else ""
    if found.error:
        return "\n".join([*lines, f"  {found.error}", f"  pictures: {archive}"])
    expected = "" if found.expected is None else f" of {found.expected:,}"
    lines.append(f"  items: {found.items:,}{expected} can be asked")
    lines += [f"    {count:,} x {kind}" for kind, count in found.problems.items()]
    lines += [f"      {problem}" for problem in found.listed]
    pictures = found.pictures
    there = pictures.count - pictures.missing
    lines.append(f"  pictures: {there:,} of {pictures.count:,} are there, {_bytes(pictures.size)}; {archive}")
    if pictures.broken:
        lines += [f"    {pictures.broken:,} cannot be opened", *(f"      {one}" for one in pictures.listed)]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count:,} bytes"


def _files(source: Source, places: Places, *, chosen: bool) -> Files:
    paths = {name: places.files(name) for name in source.files}
    sizes = {name: sum(path.stat().st_size for path in there) if there else None for name, there in paths.items()}
    return Files(sizes, source.url, chosen)


def _named(found: Iterable[Item | Problem]) -> Iterator[Picture]:
    """The pictures of items: each file once; what is not in a file of its own, as often as it is there."""
    seen: set[Path] = set()
    for item in found:
        for picture in item.pictures if isinstance(item, Item) else ():
            if not isinstance(picture, Path):
                yield picture
            elif picture not in seen:
                seen.add(picture)
                yield picture


def _pictures(named: Iterator[Picture], name: str, quiet: bool) -> Pictures:
    pictures = list(named)
    missing = size = 0
    broken: list[str] = []
    for picture in tqdm(pictures, desc=f"{name}: pictures", unit="picture", disable=quiet or None):
        if isinstance(picture, Path) and not os.path.isfile(picture):
            missing += 1
            continue
        try:
            size += _opened(picture)
        except ImageError as error:
            broken.append(str(error))
    return Pictures(len(pictures), missing, len(broken), size, tuple(broken[:LISTED]))


def _opened(picture: Picture) -> int:
    """The picture's bytes, if its header says that it can be shown. Raises ImageError.

    Pixels are not decoded: that would take hours. What is drawn when it is needed is not looked at, and has no bytes.
    """
    name = str(picture) if isinstance(picture, Path) else "a picture within the annotations"
    file: IO[bytes]
    try:
        if isinstance(picture, Path):
            size, file = picture.stat().st_size, picture.open("rb")
        elif isinstance(picture, bytes):
            size, file = len(picture), io.BytesIO(picture)
        else:
            return 0
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if size > LIBRARY_POLICY.max_bytes:
                raise ImageError(f"{name} has {size} bytes, over the limit of {LIBRARY_POLICY.max_bytes}")
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                image.verify()
    except ImageError:
        raise
    except Exception as error:  # on damaged files, decoders raise whatever they stumbled over
        raise ImageError(f"{name} cannot be opened: {' '.join(str(error).split())}") from None
    if width * height > LIBRARY_POLICY.max_pixels:
        raise ImageError(f"{name} is {width} x {height}, over the limit of {LIBRARY_POLICY.max_pixels} pixels")
    return size
