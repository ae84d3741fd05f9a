"""Dense pretraining of the small model's vision tower and resampler: what lies at each place of the picture.

The paper starts from an OpenCLIP tower that has seen two billion pictures. Ours starts from nothing, so it first learns
to say, for every cell of the query grid, the shape, the colour and the letter that lie there, where the edges of the
thing are, and the digits that these begin with: what is spelt on the visual tokens, the decoder need only copy. One
set of heads reads the patches, another the visual tokens (and, in `tiny_guidance`, hidden states); both are thrown away
afterwards.

    dense_targets     the numbers to be learned, drawn from a scene
    DenseHeads        features [N,Q,C] to predictions
    dense_loss        the objective
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from ...text.boxes import Box
from .tiny_scenes import COLOURS, SHAPES, Scene, letter_boxes, paint_shape

FINE = 6  # cells of the map that is drawn, along each side of a cell of the grid
LEAST_COVER = 0.2  # of a cell, for a thing to be its content
BINS = 100  # of the width or height, for an edge's place: the first two digits of the thousandths
BLUR = 0.7  # bins: a neighbour of the right bin is nearly right

KINDS = (*SHAPES, "word")
INKS = tuple(COLOURS)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
Predictions = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # kind, ink, letter, edges, digits

LETTERING, NUMBER = 2, 7  # columns of the targets
NOTHING = 0  # class of an empty cell; -100 is "not asked here"


def dense_targets(scene: Scene, grid: int) -> Tensor:
    """[Q,8] int64 for a grid of `grid` x `grid` cells, row by row: kind, ink, letter (0 is none), then the edges'
    thousandths x1, y1, x2, y2 (-100 in empty cells), and the thing's number, from 1.
    """
    side = grid * FINE
    things = Image.new("L", (side, side))
    marks = Image.new("L", (side, side))
    on_things, on_marks = ImageDraw.Draw(things), ImageDraw.Draw(marks)
    for number, thing in enumerate(scene.things, 1):
        if thing.word is None:
            paint_shape(on_things, thing.shape, _scaled(thing.box, scene, side), number)
            continue
        _fill(on_things, _scaled(thing.box, scene, side), number)
        for letter, box in letter_boxes(thing):
            _fill(on_marks, _scaled(box, scene, side), 1 + LETTERS.index(letter))
    numbers, letters = _per_cell(things, grid), _per_cell(marks, grid)
    table = np.full((len(scene.things) + 1, 6), -100)
    table[0, :2] = NOTHING
    for number, thing in enumerate(scene.things, 1):
        table[number, 0] = 1 + KINDS.index(thing.shape)
        table[number, 1] = 1 + INKS.index(thing.colour)
        box, sizes = thing.box, (scene.width, scene.height) * 2
        table[number, 2:] = [
            min(max(round(v / s * 1000), 0), 999) for v, s in zip((box.x1, box.y1, box.x2, box.y2), sizes, strict=True)
        ]
    rows = table[numbers]  # [Q,6]
    columns = rows[:, :2], letters[:, None], rows[:, 2:], numbers[:, None]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _scaled(box: Box, scene: Scene, side: int) -> Box:
    across, down = side / scene.width, side / scene.height
    return Box(box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down)


def _fill(pen: ImageDraw.ImageDraw, box: Box, number: int) -> None:
    pen.rectangle((box.x1, box.y1, max(box.x2 - 1, box.x1), max(box.y2 - 1, box.y1)), fill=number)


def _per_cell(drawn: Image.Image, grid: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number that covers most of each cell, apart from 0, if it covers enough of it: [Q]."""
    cells = np.asarray(drawn).reshape(grid, FINE, grid, FINE).transpose(0, 2, 1, 3).reshape(grid * grid, FINE * FINE)
    found = np.zeros(grid * grid, dtype=np.int64)
    most = np.full(grid * grid, LEAST_COVER * FINE * FINE)
    for number in np.unique(cells[cells > 0]):
        cover = (cells == number).sum(axis=1)
        better = cover > most
        found[better], most[better] = number, cover[better]
    return found


class DenseHeads(nn.Module):
    """Linear predictions from features, so that what they say lies open for the decoder to read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, 1 + len(KINDS))
        self.ink = nn.Linear(width, 1 + len(INKS))
        self.letter = nn.Linear(width, 1 + len(LETTERS))
        self.edges = nn.Linear(width, 4 * BINS)
        self.digits = nn.Linear(width, 4 * 2 * 10)

    def forward(self, features: Tensor) -> Predictions:
        """Features [N,Q,C] to logits: kind [N,Q,8], ink [N,Q,9], letter [N,Q,37], edges [N,Q,4,BINS] and their first
        two digits [N,Q,4,2,10].
        """
        edges = self.edges(features).unflatten(-1, (4, BINS))
        digits = self.digits(features).unflatten(-1, (4, 2, 10))
        return self.kind(features), self.ink(features), self.letter(features), edges, digits


def dense_loss(predictions: Predictions, targets: Tensor) -> Tensor:
    """The loss of targets [N,Q,8]: cross entropies of kind, ink, letter, edges and digits, added up.

    Full cells are few and letters fewer, so full and empty cells are averaged apart: else most of the loss would be
    about nothing. Edges count where there is a thing, with blurred bins, and their digits as blurred as they are.
    """
    kind, ink, letter, edges, digits = predictions
    losses = [_balanced(logits, targets[..., k]) for k, logits in enumerate((kind, ink, letter))]
    there = targets[..., 3] >= 0
    places = targets[..., 3:7][there].float() / (1000 / BINS)  # [K,4], in bins
    bins = torch.arange(BINS, device=places.device) + 0.5
    blurred = (-((bins - places[..., None]) ** 2) / (2 * BLUR**2)).softmax(dim=-1)  # [K,4,BINS]
    by_digit = blurred.reshape(-1, 4, 10, 10)
    spelt = torch.stack((by_digit.sum(dim=-1), by_digit.sum(dim=-2)), dim=-2)  # [K,4,2,10]
    for logits, wanted in ((edges, blurred), (digits, spelt)):
        losses.append(_mean(-(wanted * logits[there].log_softmax(dim=-1)).flatten(2).sum(dim=-1)))
    return torch.stack(losses).sum()


def _balanced(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of logits [N,Q,K]: over full cells, and half as much over empty ones."""
    losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
    full = classes.flatten() > NOTHING
    return _mean(losses[full]) + 0.5 * _mean(losses[~full])


def _mean(losses: Tensor) -> Tensor:
    """The mean, 0 if there are none."""
    return losses.sum() / max(losses.numel(), 1)
