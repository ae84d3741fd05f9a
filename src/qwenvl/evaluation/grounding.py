"""RefCOCO and its like: the one box that an answer has to name, and whether it is the right one.

box_of    the box of an answer, in pixels
iou       how far two boxes are one
correct   whether that is at least a half

As the reference's `evaluate_grounding.py`, quirks included. `qwenvl.text.boxes` reads answers more carefully; here a
score is to be what others' scores are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BOX = re.compile(r"\((.*?)\),\((.*?)\)")
REFERENCE_SCALE, MODEL_SCALE = 999, 1000  # what the reference's scorer divides by, and what the model was trained with
RIGHT = 0.5

Corners = tuple[float, float, float, float]


def box_of(answer: str, width: float, height: float, scale: int = REFERENCE_SCALE) -> Corners:
    """Corners x1, y1, x2, y2 in pixels, as float32; all 0 where the answer has no box of four numbers.

    Quirks: only the first `(..),(..)` of the answer's first lines counts, with nothing between the two: what stands in
    brackets before it, or a first box that is none, spoils it. Corners are neither clipped nor put into order.
    """
    found = BOX.findall(answer)
    if not found:
        return (0.0, 0.0, 0.0, 0.0)
    try:
        x1, y1, x2, y2 = (float(number) for number in ",".join(found[0]).split(","))
    except ValueError:
        return (0.0, 0.0, 0.0, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # a number of fifty digits is infinite
        corners = np.array([x1, y1, x2, y2], np.float32) / np.float32(scale)
        corners = corners * np.array([width, height, width, height], np.float32)
    return (float(corners[0]), float(corners[1]), float(corners[2]), float(corners[3]))


def iou(box: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union, in float32; nan where neither has an area."""
    a, b = np.array(box, np.float32), np.array(other, np.float32)
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    inside = sides[0] * sides[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(inside / (_area(a) + _area(b) - inside))


def correct(box: Sequence[float], annotation: Sequence[float]) -> bool:
    """Whether a box is the annotated one: an intersection over union of at least a half. nan is not."""
    return iou(box, annotation) >= RIGHT


def _area(box: npt.NDArray[np.float32]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
