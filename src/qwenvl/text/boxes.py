"""Places in a picture, as the model writes them: `<ref>the dog</ref><box>(219,424),(576,896)</box>`.

    Box               a rectangle in pixels of its picture
    Region            a box or quadrilateral on the model's scale, 0..1000 of the picture's own width and height
    parse_spans       every region in a model's reply
    boxes_in          the same as pixel boxes
    to_thousandths    a pixel box on the model's scale
    strip_tags        a reply as a person would read it

What a model writes is never trusted: the readers below take what is there, and neither raise nor slow down on garbage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import PromptError
from .tokenizer import REGION_TAGS

SCALE = 1000  # coordinates are thousandths of the picture's width and height

_TAG = re.compile(f"({'|'.join(REGION_TAGS)})")
_NUMBER = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
_POINT = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_HALF_WIDTH = {ord(c) + 0xFEE0: c for c in "(),.+-0123456789"}  # as Chinese texts may write them
_COORDINATES = re.compile(r"(?:\s*[0-9(),.+-])*")


@dataclass(frozen=True)
class Box:
    """A rectangle in float pixels of the picture it was found in, from (x1, y1), top left, to (x2, y2)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None


@dataclass(frozen=True)
class Region:
    """What a reply marks: a box by two corners, top left first, or a quadrilateral by four, in the model's order.

    `points` are (x, y) on 0..1000; `label` is the stripped phrase just before it, if there is one.
    """

    label: str | None
    points: tuple[tuple[float, float], ...]
    kind: Literal["box", "quad"]

    def pixels(self, width: float, height: float) -> tuple[tuple[float, float], ...]:
        """The corners (x, y) in pixels of a picture of this size."""
        return tuple((x / SCALE * width, y / SCALE * height) for x, y in self.points)

    def box(self, width: float, height: float) -> Box:
        """The smallest pixel box around it, in a picture of this size."""
        xs, ys = zip(*self.pixels(width, height), strict=True)
        return Box(min(xs), min(ys), max(xs), max(ys), self.label)


def _points(text: str) -> list[tuple[float, float]]:
    """Every whole `(x,y)` in a text, moved onto the scale where it is off it; full-width forms count as their own."""
    return [
        (min(max(0.0, float(x)), SCALE), min(max(0.0, float(y)), SCALE))  # in this order -0.0 becomes 0.0
        for x, y in _POINT.findall(text.translate(_HALF_WIDTH))
    ]


def _regions(kind: Literal["box", "quad"], body: str, label: str | None) -> list[Region]:
    """The regions that a tag's body spells: one for every two points of a box tag, or four of a quad tag."""
    points = _points(body)
    size = 2 if kind == "box" else 4
    groups = [tuple(points[i : i + size]) for i in range(0, len(points) - size + 1, size)]
    if kind == "box":
        groups = [((min(a[0], b[0]), min(a[1], b[1])), (max(a[0], b[0]), max(a[1], b[1]))) for a, b in groups]
    return [Region(label, group, kind) for group in groups]


def parse_spans(reply: str) -> list[Region]:
    """Every region in a reply, in reading order; whatever cannot be read is passed over. Never raises; linear time.

    A `<ref>` labels the boxes and quads that follow it with nothing but white space between. A tag may hold several
    boxes, decimals, spaces, swapped corners, or numbers off the scale (they are clamped); one that the end of the text
    or another tag cuts off counts as far as its points are whole.
    """
    regions: list[Region] = []
    label: str | None = None
    _, *pieces = _TAG.split(reply)
    for tag, text in zip(pieces[::2], pieces[1::2], strict=True):
        if tag == "<ref>":
            label = text.strip() or None
        elif tag == "<box>":
            regions += _regions("box", text, label)
        elif tag == "<quad>":
            regions += _regions("quad", text, label)
        elif text.strip():  # words after a closing tag: the label no longer stands just before what follows
            label = None
    return regions


def boxes_in(reply: str, width: float, height: float) -> list[Box]:
    """The boxes in a reply, in pixels of a picture of this size; a quad gives the box around it. Never raises."""
    return [region.box(width, height) for region in parse_spans(reply)]


def to_thousandths(box: Box, width: float, height: float) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of a pixel box as whole numbers 0..1000, clamped, for a box part or a training text.

    Raises PromptError if the box is not finite or the picture has no size.
    """
    corners = (box.x1, box.y1, box.x2, box.y2)
    if not all(map(math.isfinite, (*corners, width, height))) or width <= 0 or height <= 0:
        raise PromptError(f"a picture of {width} x {height} pixels cannot hold the box {corners}")
    sizes = (width, height, width, height)
    x1, y1, x2, y2 = (round(min(max(v / size, 0), 1) * SCALE) for v, size in zip(corners, sizes, strict=True))
    return x1, y1, x2, y2


def points_text(coordinates: Sequence[int]) -> str:
    """The inside of a box or quad tag: x1, y1, x2, y2, ... as `(x1,y1),(x2,y2),...`."""
    return ",".join(f"({x},{y})" for x, y in zip(coordinates[::2], coordinates[1::2], strict=True))


def strip_tags(reply: str) -> str:
    """A reply as a person would read it: phrases without their tags, and no coordinates."""
    first, *pieces = _TAG.split(reply)
    kept = [first]
    for i in range(0, len(pieces), 2):
        tag, text = pieces[i], pieces[i + 1]
        if tag in ("<box>", "<quad>"):
            closed = pieces[i + 2 : i + 3] == [tag.replace("<", "</")]
            text = "" if closed else _COORDINATES.sub("", text, count=1)
        kept.append(text)
    return "".join(kept).strip()
