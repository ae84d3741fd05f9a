"""The small model's pictures: what is drawn is what is said, seed by seed, and no split shows another's pictures."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib  # the fonts of training and test come with it: without it, this file must fail
import numpy as np
import pytest
from PIL import Image

from qwenvl.text.boxes import Box
from qwenvl.training.recipes import tiny, tiny_scenes
from qwenvl.training.recipes.tiny_scenes import (
    COLOURS,
    SHAPES,
    WORDS,
    Scene,
    Split,
    Thing,
    draw,
    enlarged,
    fonts,
    letter_boxes,
    scene,
)

SEEDS = range(400)
KNOWN = (
    225,
    163,
    "gradient",
    [
        ("diamond", "blue", 22, 116, 66, 160),
        ("triangle", "red", 69, 126, 101, 155),
        ("triangle", "black", 94, 75, 138, 114),
        ("diamond", "red", 164, 72, 206, 115),
    ],
)  # of the test split's fourth seed, without a word


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Many, as the default has them."""
    return [scene(Split.TRAIN.seed(k)) for k in SEEDS]


def marks(shown: Scene) -> np.ndarray:
    """[height, width] bool: where drawing the things changed the background."""
    with_things, without = (
        np.asarray(draw(one)).astype(int) for one in (shown, Scene(**{**vars(shown), "things": ()}))
    )
    assert with_things.shape == (shown.height, shown.width, 3)
    return np.abs(with_things - without).max(axis=2) > 0


def extent(found: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box around what is true: x1, y1, x2, y2, the last ones exclusive."""
    rows, columns = np.nonzero(found)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def corners(box: Box) -> tuple[float, float, float, float]:
    """Of a box, in order."""
    return box.x1, box.y1, box.x2, box.y2


def assert_filled(shown: Scene, times: int = 1) -> None:
    """Each thing's pixels fill its box to within two pixels, and nothing else changes.

    A word's box holds the room beside its first and last letter too, so there its pixels may end earlier.
    """
    found = marks(shown)
    for thing in shown.things:
        x1, y1, x2, y2 = (round(v) for v in corners(thing.box))
        reach = 2 * times
        inside = np.zeros_like(found)
        inside[max(y1 - reach, 0) : y2 + reach, max(x1 - reach, 0) : x2 + reach] = True
        left, above, right, below = np.subtract(extent(found & inside), corners(thing.box))
        beside = 0 if thing.word is None else 0.12 * thing.font[1]
        assert max(abs(above), abs(below)) <= reach, (shown.seed, thing)
        assert -reach <= left <= reach + beside, (shown.seed, thing)
        assert reach >= right >= -reach - beside, (shown.seed, thing)
        found &= ~inside
    assert not found.any(), shown.seed


def test_same_seed_same_scene(scenes: list[Scene]) -> None:
    """A scene and its picture depend on the seed and on nothing that was drawn before; other seeds differ."""
    assert [scene(one.seed) for one in reversed(scenes[:50])] == scenes[49::-1]
    assert np.array_equal(np.asarray(draw(scenes[7])), np.asarray(draw(scene(7))))
    assert len({(one.width, one.height, one.things) for one in scenes}) == len(scenes)


def test_a_known_scene() -> None:
    """The draws' order is part of the recipe: a change would make another training and another test split."""
    first = scene(Split.TEST.seed(3), words=0.0)
    shapes = [(thing.shape, thing.colour, *map(round, corners(thing.box))) for thing in first.shapes]
    assert (first.width, first.height, first.background, shapes) == KNOWN


def test_things_lie_apart_inside_the_picture(scenes: list[Scene]) -> None:
    """No thing leaves the picture or touches another."""
    for shown in scenes:
        boxes = [thing.box for thing in shown.things]
        for number, a in enumerate(boxes):
            assert 0 <= a.x1 < a.x2 <= shown.width, shown.seed
            assert 0 <= a.y1 < a.y2 <= shown.height, shown.seed
            for b in boxes[:number]:
                assert a.x2 < b.x1 or b.x2 < a.x1 or a.y2 < b.y1 or b.y2 < a.y1, shown.seed


def test_variety(scenes: list[Scene]) -> None:
    """One to five shapes of every kind, colour and of many sizes, outlined or not, on all four backgrounds."""
    shapes = [thing for shown in scenes for thing in shown.shapes]
    assert {len(shown.shapes) for shown in scenes} == {1, 2, 3, 4, 5}
    assert {shown.background for shown in scenes} == {"plain", "gradient", "noise", "stripes"}
    assert {thing.shape for thing in shapes} == set(SHAPES)
    assert {thing.colour for thing in shapes} == set(COLOURS)
    assert 0.15 < sum(thing.outlined for thing in shapes) / len(shapes) < 0.35
    sizes = [(t.box.x2 - t.box.x1) / min(s.width, s.height) for s in scenes for t in s.shapes]
    assert min(sizes) < 0.2
    assert max(sizes) > 0.44
    words = [shown.text for shown in scenes if shown.text is not None]
    assert 0.25 < len(words) / len(scenes) < 0.4
    assert any(str(thing.word).isdigit() for thing in words)
    assert all(str(thing.word).isdigit() or thing.word in WORDS for thing in words)
    assert len({thing.font[0] % len(fonts()) for thing in words}) > 10
    assert all(thing is not shown.text for shown in scenes for thing in shown.shapes)


@pytest.mark.parametrize(("most", "least", "words"), [(1, 1, 0.0), (2, 2, 0.0), (5, 1, 1.0)])
def test_limits(most: int, least: int, words: float) -> None:
    """No more shapes than `most`, as good as never fewer than `least`, a word as often as is said."""
    shown = [scene(k, most=most, least=least, words=words) for k in SEEDS[:150]]
    assert max(len(one.shapes) for one in shown) <= most
    assert sum(len(one.shapes) >= least for one in shown) > 147
    assert words - 0.1 <= sum(one.text is not None for one in shown) / len(shown) <= words


@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box(shape: str, outlined: bool) -> None:
    """Its pixels reach all four sides of the box and not beyond, wherever it lies; inside, it has the shape's area."""
    full = {"circle": math.pi / 4, "square": 1, "triangle": 0.5, "diamond": 0.5, "cross": 5 / 9, "star": 0.36}
    for number, (x, y, size) in enumerate(
        [(20.0, 30.0, 60.0), (33.4, 21.8, 44.7), (7.5, 9.49, 71.3), (50.9, 60.6, 30)]
    ):
        box = tiny_scenes._extent(shape, x, y, size)
        thing = Thing(shape, "red", box, COLOURS["red"], outlined)
        found = marks(Scene(number, 130, 140, (thing,), "plain", ((200, 200, 200),) * 2))
        assert np.abs(np.subtract(extent(found), corners(box))).max() <= 1.5, (box, extent(found))
        area = (box.x2 - box.x1) * (box.y2 - box.y1)
        assert found.sum() / area == pytest.approx(full[shape], abs=0.06)


def test_everything_drawn_is_where_it_is_said_to_be(scenes: list[Scene]) -> None:
    """In random scenes, too, each thing's pixels fill its box; nothing else of the picture changes."""
    for shown in scenes[:150]:
        assert_filled(shown)


def test_things_stand_out(scenes: list[Scene]) -> None:
    """Nearly every pixel of the background under a thing is far from its paint, and a colour is what it is called."""
    for shown in scenes[:150]:
        background = np.asarray(tiny_scenes._ground(shown)).astype(float)
        for thing in shown.things:
            x1, y1, x2, y2 = (int(v) for v in corners(thing.box))
            below = np.linalg.norm(background[y1:y2, x1:x2] - thing.paint, axis=2)
            assert np.percentile(below, 5) > 35, (shown.seed, thing)
            nearest = min(COLOURS, key=lambda name: math.dist(COLOURS[name], thing.paint))
            assert nearest == thing.colour


def test_words_can_be_read_in_their_boxes(scenes: list[Scene]) -> None:
    """Letters follow each other across the whole box of the word; a printed digit is not a letter's neighbour."""
    for shown in scenes:
        if (thing := shown.text) is None:
            continue
        places = letter_boxes(thing)
        assert "".join(letter for letter, _ in places) == thing.word
        assert places[0][1].x1 == pytest.approx(thing.box.x1)
        assert places[-1][1].x2 == pytest.approx(thing.box.x2)
        for (_, a), (_, b) in pairwise(places):
            assert a.x2 == b.x1
            assert a.x1 < a.x2
            assert (a.y1, a.y2) == (thing.box.y1, thing.box.y2)


def test_letters_are_where_they_are_drawn() -> None:
    """A letter's box holds the pixels that appear when its word grows by it: what the letters are learned from."""
    for face in range(len(fonts())):
        font = tiny_scenes.letters(face, 40)
        left, top, right, bottom = font.getbbox("HELP")
        thing = Thing("word", "black", Box(20, 20, 20 + right - left, 20 + bottom - top), (0, 0, 0), False, "HELP")
        thing = replace(thing, font=(face, 40))
        begun = replace(thing, word="HE")
        whole, part = (marks(Scene(0, 240, 90, (one,), "plain", ((255,) * 3,) * 2)) for one in (thing, begun))
        added = extent(whole & ~part)  # the L and the P
        _, third = letter_boxes(thing)[2]
        assert abs(added[0] - third.x1) <= 5, fonts()[face]


# Splits


def pictures_of_training() -> Iterator[range]:
    """The indices into the training split of every phase's pictures, as `train` hands them out."""
    first = 0
    for phase in tiny.PHASES:
        yield range(first, first + 2 * phase.sequences)
        first += 2 * phase.sequences


def test_no_test_picture_is_in_training() -> None:
    """The splits' seeds do not meet, and every seed of every phase, counted out in full, lies in training's."""
    ranges = sorted((split.value for split in Split), key=lambda r: r.start)
    for one, other in pairwise(ranges):
        assert one.stop <= other.start
    seen = list(pictures_of_training())
    assert sum(map(len, seen)) > 500_000
    for one, other in pairwise(seen):
        assert one.stop == other.start  # no picture in two phases
    for phase in seen:
        assert Split.TRAIN.seed(phase[0]) in Split.TRAIN.value
        assert Split.TRAIN.seed(phase[-1]) in Split.TRAIN.value
        for held_out in (Split.TEST, Split.VALIDATION):
            assert Split.TRAIN.seed(phase[-1]) < held_out.value.start
    for split in Split:
        assert [split.seed(0), split.seed(5)] == [split.value.start, split.value.start + 5]
        with pytest.raises(IndexError):
            split.seed(len(split.value))


# Sizes and fonts


def test_enlarged(scenes: list[Scene]) -> None:
    """Three times as large: the same things at the same thousandths, filled just as well, words too."""
    for shown in scenes[:40]:
        large = enlarged(shown, 3)
        assert (large.width, large.height) == (3 * shown.width, 3 * shown.height)
        assert [replace(t, box=shown.things[0].box, font=(0, 0)) for t in large.things] == [
            replace(t, box=shown.things[0].box, font=(0, 0)) for t in shown.things
        ]
        assert_filled(large, 3)


def test_fonts_of_matplotlib() -> None:
    """Where it is installed, its faces are used, Pillow's own among them; each can be loaded."""
    assert Path(matplotlib.__file__).is_file()
    assert len(fonts()) > 12
    assert fonts()[0] is None
    drawn = set()
    for face in range(len(fonts())):
        picture = Image.new("RGB", (160, 60))
        thing = Thing("word", "white", Box(4, 4, 150, 50), (246, 246, 246), False, "RAIN", (face, 30))
        tiny_scenes._write(tiny_scenes.ImageDraw.Draw(picture), thing)
        drawn.add(picture.tobytes())
    assert len(drawn) == len(fonts())  # each looks different


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain install has Pillow's font alone, and draws every scene with it: the demo needs no extra."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(tiny_scenes, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    for cached in (tiny_scenes.fonts, tiny_scenes.letters):
        cached.cache_clear()
    try:
        assert tiny_scenes.fonts() == (None,)
        for seed in range(20):
            shown = scene(seed, words=1.0)
            assert draw(shown).size == (shown.width, shown.height)
            assert shown.text is None or marks(replace(shown, things=(shown.text,))).any()
    finally:
        for cached in (tiny_scenes.fonts, tiny_scenes.letters):
            cached.cache_clear()
