"""The small data of benchmarks that tests read: five or so invented questions in each form in which owners publish.

DATA      the folder, laid out as a user's
form      one form of a benchmark's data, read
copied    the folder of a benchmark as a test's own, to be spoiled
changed   a JSON line with other fields
prompt    what is asked of an item, in the reference's notation
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenvl.evaluation.benchmark import Benchmark, Dataset
from qwenvl.evaluation.catalogue import BENCHMARKS, read
from qwenvl.evaluation.forms import parts
from qwenvl.evaluation.items import Item

DATA = Path(__file__).resolve().parent / "evaluation" / "data"


def form(name: str, file: str, root: Path = DATA) -> Dataset:
    """A benchmark as it is read from the form of data to which a file belongs."""
    benchmark = BENCHMARKS[name]
    (source,) = (source for source in benchmark.sources if file in source.files)
    return read(replace(benchmark, sources=(source,)), root)


def copied(root: Path, *folders: str) -> Path:
    """Folders of the data, copied into `root`."""
    for folder in folders:
        shutil.copytree(DATA / folder, root / folder)
    return root


def changed(line: str, **fields: Any) -> str:
    """A line of JSON with these fields; those that are `...` are taken out."""
    entry = json.loads(line) | fields
    return json.dumps({key: value for key, value in entry.items() if value is not ...})


def prompt(benchmark: Benchmark, item: Item) -> str:
    """The text of a query, pictures by the names of their files."""
    text = ""
    for part in parts(benchmark.form, item):
        assert part.get("numbered", False) is False
        if "image" in part:
            text += f"<img>{part['image'].name if isinstance(part['image'], Path) else 'bytes'}</img>"
        elif "ref" in part:
            assert part["box"] is None
            text += f"<ref>{part['ref']}</ref><box>"
        else:
            text += part["text"]
    return text
