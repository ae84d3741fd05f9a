"""Dense targets say what lies in each cell, and the dense loss is small for those who see it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwenvl.text.boxes import Box
from qwenvl.training.recipes import tiny_scenes
from qwenvl.training.recipes.tiny_dense import (
    BINS,
    BLUR,
    INKS,
    KINDS,
    LETTERS,
    NOTHING,
    NUMBER,
    DenseHeads,
    Predictions,
    dense_loss,
    dense_targets,
)
from qwenvl.training.recipes.tiny_scenes import COLOURS, WORDS, Scene, Split, Thing, letter_boxes, scene

GRID = 8
GREY = ((128, 128, 128),) * 2


def holding(*things: Thing, width: int = 200, height: int = 120) -> Scene:
    """A scene of these things."""
    return Scene(0, width, height, things, "plain", GREY)


def thing(shape: str, colour: str, *corners: float, **more: Any) -> Thing:
    """A shape by its corners."""
    return Thing(shape, colour, Box(*corners), COLOURS[colour], **more)


def within(one: Thing, x: float, y: float) -> bool:
    """Whether a point lies in a shape, by its geometry."""
    u = (x - one.box.x1) / (one.box.x2 - one.box.x1)
    v = (y - one.box.y1) / (one.box.y2 - one.box.y1)
    if not (0 <= u <= 1 and 0 <= v <= 1):
        return False
    return {
        "square": True,
        "circle": math.hypot(u - 0.5, v - 0.5) <= 0.5,
        "diamond": abs(u - 0.5) + abs(v - 0.5) <= 0.5,
        "triangle": abs(u - 0.5) <= v / 2,
        "cross": abs(u - 0.5) <= 1 / 6 or abs(v - 0.5) <= 1 / 6,
    }[one.shape]


def covers(shown: Scene, row: int, column: int, points: int = 24) -> list[float]:
    """How much of a cell each thing covers, counted over a fine grid of points in the picture."""
    found = [0] * len(shown.things)
    for i in range(points):
        for j in range(points):
            x = (column + (i + 0.5) / points) / GRID * shown.width
            y = (row + (j + 0.5) / points) / GRID * shown.height
            for number, one in enumerate(shown.things):
                found[number] += within(one, x, y)
    return [count / points**2 for count in found]


@pytest.mark.parametrize(
    "shown",
    [
        holding(thing("square", "red", 30, 20, 110, 100)),
        holding(thing("circle", "blue", 10.5, 11.2, 95.1, 95.8), thing("triangle", "white", 110, 30, 170, 82)),
        holding(thing("diamond", "black", 100, 5, 190, 95), thing("cross", "green", 5, 40, 75, 110)),
        holding(thing("circle", "orange", 40, 120, 110, 190), width=130, height=230),
    ],
)
def test_cells_hold_what_covers_them(shown: Scene) -> None:
    """A cell well covered by a thing is that thing, an uncovered one nothing, whichever way they are rasterised."""
    targets = dense_targets(shown, GRID)
    assert targets.shape == (GRID * GRID, 8)
    assert targets.dtype == torch.int64
    clear = 0
    for row in range(GRID):
        for column in range(GRID):
            cover = covers(shown, row, column)
            kind, ink, letter, *edges, number = targets[row * GRID + column].tolist()
            best = max(range(len(cover)), key=cover.__getitem__)
            if 0.08 < cover[best] < 0.34:  # near the threshold, rounding decides
                continue
            clear += 1
            assert letter == NOTHING
            if cover[best] <= 0.08:
                assert (kind, ink, edges, number) == (NOTHING, NOTHING, [-100] * 4, 0), (row, column)
                continue
            assert number == 1 + best
            one = shown.things[best]
            assert (KINDS[kind - 1], INKS[ink - 1]) == (one.shape, one.colour), (row, column)
            expected = [1000 * one.box.x1 / shown.width, 1000 * one.box.y1 / shown.height]
            expected += [1000 * one.box.x2 / shown.width, 1000 * one.box.y2 / shown.height]
            assert edges == pytest.approx(expected, abs=0.51)
    assert clear > 45


def test_a_word_and_its_letters() -> None:
    """The cells of a word are a word in its ink; the letters stand in reading order at their places."""
    font = (0, 50)
    left, top, right, bottom = tiny_scenes.letters(*font).getbbox("TAXI")
    word = thing("word", "black", 40, 20, 40 + right - left, 20 + bottom - top, word="TAXI", font=font)
    dot = thing("circle", "red", 160, 75, 180, 95)
    targets = dense_targets(holding(dot, word, height=100), GRID).reshape(GRID, GRID, 8)
    full = targets[..., 0] == 1 + KINDS.index("word")
    assert full.any()
    assert torch.equal(full, targets[..., NUMBER] == 2)
    assert torch.equal(targets[..., 0] == 1 + KINDS.index("circle"), targets[..., NUMBER] == 1)
    assert set(targets[..., 1][full].tolist()) == {1 + INKS.index("black")}
    middle = targets[round((word.box.y1 + word.box.y2) / 2 / 100 * GRID - 0.5)]
    read = [LETTERS[letter - 1] for letter in middle[:, 2].tolist() if letter != NOTHING]
    assert "".join(sorted(set(read), key=read.index)) == "TAXI"
    for letter, box in letter_boxes(word):
        column = int((box.x1 + box.x2) / 2 / 200 * GRID)
        assert LETTERS[middle[column, 2] - 1] == letter or box.x2 - box.x1 < 200 / GRID


def test_every_scene_has_targets() -> None:
    """Each thing of random scenes is the content of a cell, each letter of a word has a class, numbers are in range."""
    assert {letter for word in WORDS for letter in word} <= set(LETTERS)
    for k in range(150):
        shown = scene(Split.TRAIN.seed(k), words=0.6)
        targets = dense_targets(shown, GRID)
        kinds = {1 + KINDS.index(one.shape) for one in shown.things}
        assert set(targets[:, 0].tolist()) - {NOTHING} == kinds, k
        assert ((targets[:, 0] == NOTHING) == (targets[:, 1] == NOTHING)).all()
        there = targets[:, 0] != NOTHING
        assert (targets[~there, 3:NUMBER] == -100).all()
        assert targets[there, 3:NUMBER].min() >= 0
        assert targets[there, 3:NUMBER].max() <= 999
        assert set(targets[:, NUMBER].tolist()) - {0} == set(range(1, 1 + len(shown.things))), k
        assert torch.equal(targets[:, NUMBER] > 0, there)
        for number, one in enumerate(shown.things, 1):
            assert set(targets[targets[:, NUMBER] == number, 0].tolist()) == {1 + KINDS.index(one.shape)}
        assert targets[:, 2].max() <= len(LETTERS)
        assert (targets[:, 2] > NOTHING).any() == (shown.text is not None)
        assert there[targets[:, 2] > NOTHING].float().mean() > 0.7 or shown.text is None


# The loss


def perfect(targets: Tensor) -> Predictions:
    """Logits of someone who sees everything."""
    classes = [
        20.0 * nn.functional.one_hot(targets[..., k], count).float()
        for k, count in enumerate((1 + len(KINDS), 1 + len(INKS), 1 + len(LETTERS)))
    ]
    bins = torch.arange(BINS) + 0.5
    edges = -((bins - targets[..., 3:7, None].clamp(min=0) / (1000 / BINS)) ** 2)  # the blur, roughly
    return classes[0], classes[1], classes[2], edges, digits_of(edges)


def digits_of(edges: Tensor) -> Tensor:
    """Logits [...,2,10] of the two digits of bins, from the bins' own [...,BINS]."""
    likely = edges.double().softmax(dim=-1)
    tens = [likely[..., 10 * digit : 10 * digit + 10].sum(dim=-1) for digit in range(10)]
    ones = [likely[..., digit::10].sum(dim=-1) for digit in range(10)]
    return torch.stack([torch.stack(one, dim=-1) for one in (tens, ones)], dim=-2).clamp(min=1e-9).log().float()


@pytest.fixture(scope="module")
def targets() -> Tensor:
    """Of four scenes, letters among them."""
    return torch.stack([dense_targets(scene(k, words=1.0), GRID) for k in range(4)])


def test_seeing_is_rewarded(targets: Tensor) -> None:
    """Right predictions come near the floor, which is the blur's entropy; each part, when wrong, adds to the loss."""
    right = dense_loss(perfect(targets), targets)
    floor = dense_loss((*perfect(targets)[:4], torch.zeros(4, 64, 4, 2, 10)), targets) - 2 * math.log(10)
    assert floor.item() == pytest.approx(1.4, abs=0.35)  # of a Gaussian of 0.7 bins: log(0.7 sqrt(2 pi e)) is 1.06
    assert 0.8 < right - floor < 1.6  # the second digit is as blurred as the bin, the first seldom at all
    blind = dense_loss(blank(perfect(targets)), targets)
    guesses = 1.5 * sum(math.log(1 + len(classes)) for classes in (KINDS, INKS, LETTERS)) + math.log(BINS)
    assert blind.item() == pytest.approx(guesses + 2 * math.log(10), rel=1e-4)
    for part in range(5):
        worse = list(perfect(targets))
        worse[part] = worse[part].flip(0)  # what another picture holds
        assert dense_loss(tuple(worse), targets) > right + 0.5, part  # type: ignore[arg-type]


def blank(predictions: Predictions) -> Predictions:
    """Of someone who sees nothing."""
    return tuple(torch.zeros_like(part, requires_grad=True) for part in predictions)  # type: ignore[return-value]


def test_the_floor_is_reached_by_learning(targets: Tensor) -> None:
    """Free logits, moved down the gradient, find the targets again."""
    heads = DenseHeads(16)
    logits = blank(heads(torch.zeros(4, GRID * GRID, 16)))
    optimizer = torch.optim.Adam(logits, lr=0.5)
    for _ in range(120):
        optimizer.zero_grad()
        loss = dense_loss(logits, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.01 * dense_loss(perfect(targets), targets) < 3
    for k in range(3):
        assert torch.equal(logits[k].argmax(dim=-1), targets[..., k])
    there = targets[..., 3] >= 0
    found = logits[3].argmax(dim=-1)[there] * (1000 / BINS)
    assert (found - targets[..., 3:7][there]).abs().max() <= 1000 / BINS
    assert (logits[4].softmax(dim=-1) - digits_of(logits[3]).exp())[there].abs().max() < 0.05


def test_blurred_bins_lie_around_the_edge() -> None:
    """An edge between two bins asks for both: predicting the one beside it costs little, one far away much."""
    one = dense_targets(holding(thing("square", "red", 50, 30, 150, 90)), GRID)[None]
    costs = []
    for shift in (0, 1, 5):
        predictions = perfect(one)
        edges = predictions[3].roll(shift, dims=-1)
        costs.append(dense_loss((*predictions[:3], edges, predictions[4]), one).item())
    assert costs[0] < costs[1] < costs[2]
    assert costs[1] - costs[0] < 2.5
    assert costs[2] - costs[0] > 10


def test_digits_are_those_that_an_edge_is_spelled_with() -> None:
    """The tens and ones of the edges' bins, each as likely as the blurred bins that have it: 399 is nearly 40.

    What is asked for is read off the gradient of even guesses, which is their probability less what is asked for.
    """
    one = torch.tensor([[[1, 1, 0, 123, 456, 78, 399, 1]]])
    guesses = blank(DenseHeads(4)(torch.zeros(1, 1, 4)))
    dense_loss(guesses, one).backward()
    assert guesses[4].grad is not None
    wanted = 0.1 - 4 * guesses[4].grad[0, 0]  # the loss is the mean of four edges
    assert wanted[:3].argmax(dim=-1).tolist() == [[1, 2], [4, 5], [0, 7]]
    for edge, place in enumerate((12.3, 45.6, 7.8, 39.9)):
        near = [math.exp(-((b + 0.5 - place) ** 2) / (2 * BLUR**2)) for b in range(BINS)]
        for digit in range(10):
            tens = sum(near[10 * digit : 10 * digit + 10]) / sum(near)
            ones = sum(near[digit::10]) / sum(near)
            assert wanted[edge, :, digit].tolist() == pytest.approx([tens, ones], abs=1e-5), (edge, digit)
    assert wanted[3, 0, 3] == pytest.approx(0.56, abs=0.02)
    assert wanted[3, 0, 3:5].sum() > 0.999


@pytest.mark.parametrize("content", ["nothing", "no letters", "one letter"])
def test_finite_whatever_the_batch_holds(content: str) -> None:
    """A batch of empty cells, or without letters, has a loss, and gradients for every head, that are numbers."""
    batch = torch.tensor([[[0, 0, 0, *[-100] * 4, 0]] * 4])
    if content != "nothing":
        batch[0, 1] = torch.tensor([3, 2, int(content == "one letter"), 0, 10, 990, 999, 1])
    heads = DenseHeads(8)
    loss = dense_loss(heads(torch.randn(1, 4, 8)), batch)
    loss.backward()
    assert math.isfinite(loss.item())
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_full_and_empty_cells_weigh_as_said() -> None:
    """One full cell among many counts as much as many: the mean over full ones, and half that over empty ones."""
    rare = torch.zeros(1, 64, 8, dtype=torch.long)
    rare[..., 3:7] = -100
    often = rare.clone()
    rare[0, :1, :2] = 1
    often[0, :32, :2] = 1
    logits = [torch.zeros(1, 64, 1 + len(c)) for c in (KINDS, INKS, LETTERS)]
    for classes in logits[:2]:
        classes[..., 1] = 3.0  # says that everything is full
    predictions = (*logits, torch.zeros(1, 64, 4, BINS), torch.zeros(1, 64, 4, 2, 10))
    values = [dense_loss(predictions, case).item() for case in (rare, often)]  # type: ignore[arg-type]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_heads() -> None:
    """Logits of each kind over visual tokens [N,Q,C]."""
    shapes = [tuple(p.shape) for p in DenseHeads(24)(torch.randn(2, 9, 24))]
    assert shapes == [(2, 9, 8), (2, 9, 9), (2, 9, 37), (2, 9, 4, BINS), (2, 9, 4, 2, 10)]
