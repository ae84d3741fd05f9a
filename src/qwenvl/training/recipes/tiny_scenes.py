"""Pictures for the small model: coloured shapes and printed words, drawn from a seed.

    scene(seed)     what is in a picture, and where
    draw(scene)     the picture
    Split           which seeds belong to training, validation and test: ranges that do not meet

A scene is a pure function of its seed, the limits it is given and the fonts at hand (see `fonts`), whose letters take
up room; a picture is one of its scene and the fonts.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...text.boxes import Box

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (215, 40, 40),
    "green": (40, 160, 65),
    "blue": (40, 85, 220),
    "yellow": (245, 222, 50),
    "purple": (140, 60, 180),
    "orange": (240, 125, 25),
    "black": (25, 25, 25),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
WORDS = tuple(
    """STOP OPEN SALE EXIT TAXI CAFE BANK HOTEL PARK BUS ZOO SHOP FOOD MILK TEA BREAD FISH CAKE BOOK POST HELLO LOVE
    HOME STAR MOON SUN RAIN SNOW TREE BIRD CAT DOG LION FROG KING QUEEN JAZZ ROCK YES WOW""".split()  # noqa: SIM905
)

LEAST_CONTRAST = 110  # between a background and what lies on it, as a distance in RGB
GAP = 3  # pixels between two things


class Split(Enum):
    """The seeds of each split, as ranges; `seed(index)` is the index-th of them."""

    TRAIN = range(1 << 40)
    VALIDATION = range(1 << 40, (1 << 40) + (1 << 30))
    TEST = range(1 << 41, (1 << 41) + (1 << 30))

    def seed(self, index: int) -> int:
        """The seed of the split's index-th picture. Raises IndexError beyond the last."""
        return self.value[index]


@dataclass(frozen=True)
class Thing:
    """A shape, or a printed word (then `word` is what it reads and `colour` its ink)."""

    shape: str
    colour: str
    box: Box
    paint: Colour
    outlined: bool = False
    word: str | None = None
    font: tuple[int, int] = (0, 0)  # of a word: its face and its size in pixels

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box.x1 + self.box.x2) / 2, (self.box.y1 + self.box.y2) / 2


@dataclass(frozen=True)
class Scene:
    """What is in a picture of width x height pixels; `things` do not overlap."""

    seed: int
    width: int
    height: int
    things: tuple[Thing, ...]
    background: str
    ground: tuple[Colour, Colour]
    times: int = 1  # how much larger than the seed says: lines and stripes are as many times wider

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """The things that are not words, in reading order: left to right by their centres."""
        return tuple(sorted((t for t in self.things if t.word is None), key=lambda t: t.centre))

    @property
    def text(self) -> Thing | None:
        """The printed word, if there is one."""
        return next((t for t in self.things if t.word is not None), None)


def scene(seed: int, *, most: int = 5, least: int = 1, words: float = 0.35) -> Scene:
    """The scene of a seed: `least` to `most` shapes, and a printed word with probability `words`.

    Where the room does not suffice there are fewer shapes, or no word.
    """
    rng = random.Random(seed)
    width, height = rng.randint(128, 240), rng.randint(128, 240)
    background = rng.choice(("plain", "gradient", "noise", "stripes"))
    count = rng.randint(least, most)
    ground, names = _palette(rng, count)
    side = min(width, height)
    things: list[Thing] = []
    if rng.random() < words and (thing := _word(rng, ground, width, height)) is not None:
        things.append(thing)
    for name in names:
        shape = rng.choice(SHAPES)
        for _ in range(60):
            size = side * rng.uniform(0.19, 0.46 if count < 4 else 0.34)
            x, y = rng.uniform(GAP, width - size - GAP), rng.uniform(GAP, height - size - GAP)
            box = _extent(shape, x, y, size)
            if all(_apart(box, other.box) for other in things):
                things.append(Thing(shape, name, box, _jitter(rng, COLOURS[name], 14), rng.random() < 0.25))
                break
    rng.shuffle(things)
    return Scene(seed, width, height, tuple(things), background, ground)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    picture = _ground(scene)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        if thing.word is not None:
            _write(pen, thing)
        else:
            edge = tuple(c // 3 for c in thing.paint) if thing.outlined else None
            paint_shape(pen, thing.shape, thing.box, thing.paint, edge, 2 * scene.times)
    return picture


def enlarged(scene: Scene, times: int) -> Scene:
    """The same scene in a picture `times` as wide and high."""

    def grown(thing: Thing) -> Thing:
        box = thing.box
        larger = Box(box.x1 * times, box.y1 * times, box.x2 * times, box.y2 * times, box.label)
        return replace(thing, box=larger, font=(thing.font[0], thing.font[1] * times))

    things = tuple(map(grown, scene.things))
    wide, high = scene.width * times, scene.height * times
    return replace(scene, width=wide, height=high, things=things, times=scene.times * times)


def _palette(rng: random.Random, count: int) -> tuple[tuple[Colour, Colour], list[str]]:
    """Two muted background colours, and the names of `count` colours that stand out from both."""
    while True:
        ground = tuple(_muted(rng) for _ in range(2))
        far = [n for n, c in COLOURS.items() if min(math.dist(c, g) for g in ground) > LEAST_CONTRAST]
        if len(far) >= 4:
            return (ground[0], ground[1]), [rng.choice(far) for _ in range(count)]


def _muted(rng: random.Random) -> Colour:
    """A colour near grey, from dark to white."""
    light = rng.uniform(60, 250)
    red, green, blue = (round(min(max(light + rng.uniform(-22, 22), 0), 255)) for _ in range(3))
    return red, green, blue


def _jitter(rng: random.Random, colour: Colour, amount: int) -> Colour:
    red, green, blue = (min(max(c + rng.randint(-amount, amount), 0), 255) for c in colour)
    return red, green, blue


def _apart(a: Box, b: Box) -> bool:
    return a.x2 + GAP < b.x1 or b.x2 + GAP < a.x1 or a.y2 + GAP < b.y1 or b.y2 + GAP < a.y1


# Shapes: polygons in a unit square, stretched to their box; a circle is drawn as an ellipse.


def _star() -> tuple[tuple[float, float], ...]:
    reach = [1 if k % 2 == 0 else 0.42 for k in range(10)]
    points = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate(reach)]
    left, top = min(x for x, _ in points), min(y for _, y in points)
    wide, high = max(x for x, _ in points) - left, max(y for _, y in points) - top
    return tuple(((x - left) / wide, (y - top) / high) for x, y in points)


_POLYGONS = {
    "square": ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "triangle": ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "star": _star(),
    "diamond": ((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in ((1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1))
    ),
}


def _extent(shape: str, x: float, y: float, size: float) -> Box:
    """The box of a shape whose greater side is `size` pixels."""
    return Box(x, y, x + size, y + (size * 0.87 if shape == "triangle" else size))


def paint_shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    box: Box,
    paint: Colour | int,
    edge: Colour | tuple[int, ...] | None = None,
    width: int = 1,
) -> None:
    """Draw a shape that fills its box, in a colour or in a number (for maps of what lies where)."""
    x1, y1, x2, y2 = box.x1, box.y1, box.x2 - 1, box.y2 - 1  # Pillow draws the last pixel too
    if shape == "circle":
        pen.ellipse((x1, y1, x2, y2), fill=paint, outline=edge, width=width)
    else:
        points = [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in _POLYGONS[shape]]
        pen.polygon(points, fill=paint, outline=edge, width=width)


# Words


@lru_cache(maxsize=1)
def fonts() -> tuple[Path | None, ...]:
    """The fonts at hand: Pillow's own (None) and, where matplotlib is installed, the faces that come with it."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        return (None,)
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    families = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
    faces = [f + style for f in families for style in ("", "-Bold")] + ["DejaVuSans-Oblique", "DejaVuSerif-Italic"]
    faces += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmtt10"]
    return (None, *(path for face in faces if (path := folder / f"{face}.ttf").is_file()))


@lru_cache(maxsize=512)
def letters(face: int, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The face-th of the fonts (counted around) at a size in pixels."""
    path = fonts()[face % len(fonts())]
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _word(rng: random.Random, ground: tuple[Colour, Colour], width: int, height: int) -> Thing | None:
    """A word or number in ink that stands out, somewhere in the picture."""
    word = rng.choice(WORDS) if rng.random() < 0.6 else str(rng.randint(10, 999))
    ink = max(("black", "white"), key=lambda name: min(math.dist(COLOURS[name], g) for g in ground))
    face, size = rng.randrange(1 << 16), round(height * rng.uniform(0.2, 0.32))
    left, top, right, bottom = letters(face, size).getbbox(word)
    wide, high = right - left, bottom - top
    if wide + 2 * GAP > width:
        return None
    x, y = rng.uniform(GAP, width - wide - GAP), rng.uniform(GAP, height - high - GAP)
    return Thing("word", ink, Box(x, y, x + wide, y + high), _jitter(rng, COLOURS[ink], 12), False, word, (face, size))


def _write(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    font = letters(*thing.font)
    left, top, _, _ = font.getbbox(thing.word or "")
    pen.text((thing.box.x1 - left, thing.box.y1 - top), thing.word or "", fill=thing.paint, font=font)


def letter_boxes(thing: Thing) -> list[tuple[str, Box]]:
    """Every letter of a word and the pixels that it takes."""
    word, font = thing.word or "", letters(*thing.font)
    ends = [font.getlength(word[:k]) for k in range(len(word) + 1)]
    stretch = (thing.box.x2 - thing.box.x1) / max(ends[-1], 1)
    edges = [thing.box.x1 + end * stretch for end in ends]
    return [(c, Box(edges[k], thing.box.y1, edges[k + 1], thing.box.y2)) for k, c in enumerate(word)]


# Backgrounds


def _ground(scene: Scene) -> Image.Image:
    """The background: plain, a gradient, noise or stripes, from its two colours."""
    rng = np.random.default_rng(scene.seed)
    one, two = (np.array(c, dtype=np.float32) for c in scene.ground)
    turn = rng.uniform(0, 2 * math.pi)
    x, y = np.arange(scene.width, dtype=np.float32), np.arange(scene.height, dtype=np.float32)
    along = x * np.float32(math.cos(turn)) + y[:, None] * np.float32(math.sin(turn))
    if scene.background == "gradient":
        share = (along - along.min()) / (along.max() - along.min())
    elif scene.background == "stripes":
        stripe = rng.uniform(6, 30) * scene.times
        share = np.floor(along * np.float32(1 / stripe)) % 2 * np.float32(rng.uniform(0.3, 1))
    else:
        share = np.zeros_like(along)
    pixels = one + (two - one) * share[..., None]
    if scene.background == "noise":
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(4, 18))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
