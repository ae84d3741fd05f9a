"""All benchmarks, by name and by the paper's tables.

BENCHMARKS  by name
find        the benchmarks that a word of the command line means
source_of   in which form a benchmark's data are in a folder
read        a benchmark's data from a folder
checked     items whose ids are all different and whose pictures are there
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .benchmark import Benchmark, Dataset, Source
from .items import DataError, Item, Places, Problem, Unavailable
from .readers.captions import CAPTIONS
from .readers.choices import CHOICES
from .readers.dialogue import DIALOGUE
from .readers.documents import DOCUMENTS
from .readers.questions import QUESTIONS
from .readers.regions import REGIONS
from .readers.small import SMALL_BENCHMARKS

ALL = (*CAPTIONS, *QUESTIONS, *DOCUMENTS, *REGIONS, *CHOICES, *DIALOGUE, *SMALL_BENCHMARKS)
BENCHMARKS: dict[str, Benchmark] = {one.name: one for one in ALL}
LISTED = 2  # files of a source that a message names


def find(words: Sequence[str]) -> list[Benchmark]:
    """Each benchmark that is named, once, in order; "table4" to "table7" are those of a table. Raises DataError."""
    found: dict[str, Benchmark] = {}
    for word in words:
        table = {name: one for name, one in BENCHMARKS.items() if word == f"table{one.table}"}
        chosen = table or {name: one for name, one in BENCHMARKS.items() if name == word}
        if not chosen:
            near = difflib.get_close_matches(word, BENCHMARKS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(f"there is no benchmark {word}: {hint}`qwenvl eval list` shows those that there are")
        found |= chosen
    return list(found.values())


def source_of(benchmark: Benchmark, root: str | Path) -> Source:
    """The first form of the data whose files are all in the folder. Raises DataError, saying what is missing."""
    places = Places(root, benchmark.folder)
    if not places.root.is_dir():
        raise DataError(f"there is no folder {places.root}")
    for source in benchmark.sources:
        if all(map(places.files, source.files)):
            return source
    wanted = ", or ".join(_named(source.files) for source in benchmark.sources)
    raise Unavailable(
        f"{benchmark.name}: {places.root / benchmark.folder} should have {wanted}; `qwenvl eval prepare "
        f"{benchmark.name} {places.root}` says where they are published"
    )


def read(benchmark: Benchmark, root: str | Path, *, shots: bool = False, limit: int | None = None) -> Dataset:
    """A benchmark's items, and what is wrong with those that are left out; with `shots`, also its examples.

    With `limit`, reading ends once there are so many items.

    Left out are entries that cannot be read, those with an id that an earlier one has, and those without their
    pictures. Raises DataError where there are no files, or examples were asked for and there are none.
    """
    places, source = Places(root, benchmark.folder), source_of(benchmark, root)
    files = [path for name in source.files for path in places.files(name)]
    training = [places.file(name) for name in source.shots]
    missing = [str(path) for path in training if not path.is_file()]
    if shots and (missing or not training):
        what = f"{missing[0]} is missing" if missing else "its data have none"
        raise DataError(f"{benchmark.name}: few-shot examples come from a split for training, and {what}")
    items, problems = checked(source.read(files, places), limit)
    if not items and not problems:
        raise DataError(f"{benchmark.name}: {files[0]} has no entry")
    examples: list[Item] = []
    if shots:
        examples, wrong = checked((source.read_shots or source.read)(training, places))
        problems += wrong
    return Dataset(tuple(items), tuple(problems), tuple(files), tuple(examples))


def _named(files: Sequence[str]) -> str:
    return " with ".join(files[:LISTED]) + (f" and {len(files) - LISTED} more of that kind" if files[LISTED:] else "")


def checked(found: Iterable[Item | Problem], limit: int | None = None) -> tuple[list[Item], list[Problem]]:
    """Those items that can be asked, up to `limit`, and what is wrong with the others."""
    items: dict[str, Item] = {}
    problems: list[Problem] = []
    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
        elif one.id in items:
            problems.append(Problem("duplicate id", one.id, "another item before it has this id"))
        elif gone := [path for path in one.pictures if isinstance(path, Path) and not os.path.isfile(path)]:
            problems.append(Problem("missing picture", one.id, f"there is no {gone[0]}"))
        elif not one.pictures:
            problems.append(Problem("missing picture", one.id, "it names no picture"))
        else:
            items[one.id] = one
            if len(items) == limit:
                break
    return list(items.values()), problems
