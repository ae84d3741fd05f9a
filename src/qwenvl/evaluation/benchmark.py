"""A benchmark: where its data come from, how it asks, and what the paper reports of it.

Benchmark   one of them; `catalogue` lists all
Source      one form in which its data come, and who reads it
Dataset     what was read of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .forms import Form
from .items import Item, Places, Problem

# Where the reference publishes its converted files.
CONVERTED = "https://ofasys-wlcb.oss-cn-wulanchabu.aliyuncs.com/Qwen-VL/evaluation"

Reader: TypeAlias = "Callable[[Sequence[Path], Places], Iterator[Item | Problem]]"


@dataclass(frozen=True)
class Source:
    """Files of a benchmark, in the order in which `read` takes them, and where their owner publishes them, if it does.

    A name may be a pattern, such as `existence/**/*.txt`, for all files that fit it, of which there must be one.
    """

    files: tuple[str, ...]
    read: Reader
    url: str
    shots: tuple[str, ...] = ()  # files with a training split, from which examples are drawn
    read_shots: Reader | None = None  # who reads those, if it is not `read`


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: for the command line, as the reference names it.
        title: for people.
        folder: in which its files lie, below the folder of all data.
        form: how it asks.
        sources: the forms in which its data come; the first whose files are there is read.
        pictures: where the pictures are published.
        published: the paper's figures, by model and figure.
        size: how many items the whole benchmark has.
        table: of the paper, in which it stands.
        submit_as: what the server of hidden annotations calls an item's id.
    """

    name: str
    title: str
    folder: str
    form: Form
    sources: tuple[Source, ...]
    pictures: str
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    size: int | None = None
    table: int | None = None
    submit_as: str = "question_id"


@dataclass(frozen=True)
class Dataset:
    """What was read: items that can be asked, what is wrong with others, the files, and few-shot examples."""

    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    files: tuple[Path, ...]
    shots: tuple[Item, ...] = ()
