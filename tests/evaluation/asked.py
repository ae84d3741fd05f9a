"""A benchmark of a few drawn pictures for tests of the runner, and models that answer it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl.evaluation.benchmark import Benchmark, Source
from qwenvl.evaluation.forms import Form
from qwenvl.evaluation.items import Item, Places, Problem
from qwenvl.evaluation.run import Plan
from qwenvl.training.recipes.tiny_scenes import Split, draw, scene


def picture(number: int) -> Image.Image:
    """A drawn picture, another for each number."""
    return draw(scene(Split.TEST.seed(number)))


def items(count: int, *, options: bool = False) -> list[Item]:
    """Questions about pictures, two about each."""
    colours = ("red", "blue", "green", "yellow")
    return [
        Item(
            f"q{number}",
            (Drawn(number // 2),),
            ("How many shapes are there?", "What is in the picture?")[number % 2],
            number % 4 if options else ["3"],
            options=colours if options else (),
            group=("count", "caption")[number % 2],
            shot="3",
        )
        for number in range(count)
    ]


class Drawn:
    """A picture that is drawn when it is needed; equal to another of the same number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> Image.Image:
        """The picture."""
        return picture(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Drawn) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)


def benchmark(form: Form, found: Sequence[Item | Problem], name: str = "invented", **more: Any) -> Benchmark:
    """A benchmark of these items; examples are those that are given as `shots`."""
    shots: Sequence[Item] = more.pop("shots", ())

    def read(files: Sequence[Path], _places: Places) -> Iterator[Item | Problem]:
        yield from shots if files else found

    source = Source((), read, "https://example.com", shots=("shots.jsonl",) if shots else ())
    return Benchmark(name, "Invented", "invented", form, (source,), "https://example.com", **more)


def plan(out: Path, **changes: Any) -> Plan:
    """How to run it: quietly."""
    return replace(Plan(None, out, quiet=True), **changes)
