"""The boxes and quadrilaterals of a reply, drawn on the picture that it is about.

    draw_reply      a reply's regions on a picture; None if the reply has none
    draw_regions    the same for regions or pixel boxes that are already there
    colours         which colour each phrase has
    save_image      a picture to a file, whole or not at all

Each phrase has its colour. Labels are set in the first font that has all of their characters: the one given (a
checkpoint brings FONT_FILE for Chinese), Pillow's own, then the Chinese fonts that operating systems come with.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from .errors import ImageError
from .files import whole_file
from .image import FORMATS, LIBRARY_POLICY, ImagePolicy, ImageSource, open_image
from .text.boxes import Box, Region, parse_spans

FONT_FILE = "SimSun.ttf"  # as checkpoint folders name it

# Told apart from their neighbours in this list at a glance; the thirteenth phrase begins again.
COLOURS = (
    (229, 57, 53), (30, 136, 229), (67, 160, 71), (251, 140, 0), (142, 36, 170), (0, 172, 193),
    (253, 216, 53), (216, 27, 96), (109, 76, 65), (57, 73, 171), (124, 179, 66), (240, 98, 146),
)  # fmt: skip
LABEL_LENGTH = 60  # characters; longer labels are cut
LABELS_TO_AVOID = 200  # labels that later ones keep clear of; more would cost time and find no room anyway

FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    *("C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
)
# How the files of fonts with Chinese begin, spaces and dashes left out, best first.
FONT_NAMES = (
    *("notosanscjk", "notosanssc", "sourcehansans", "pingfang", "msyh", "wqy", "hiraginosansgb", "stheiti"),
    *("notoserifcjk", "sourcehanserif", "simhei", "simsun", "droidsansfallback", "uming", "ukai", "arialunicode"),
)
UNASSIGNED = "\U0010ffff"  # no font has a character here, so it shows how a font draws what it lacks

Point = tuple[int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def draw_reply(
    image: ImageSource, reply: str, font: str | Path | None = None, policy: ImagePolicy = LIBRARY_POLICY
) -> Image.Image | None:
    """The picture with everything drawn that `reply` marks, or None if it marks nothing.

    `image` is whatever `open_image` takes and is not changed; of several pictures, the caller says which one the reply
    is about (the reference takes the last). `font` is a font file to try first. Raises ImageError, from `open_image`.
    """
    regions = parse_spans(reply)
    return draw_regions(image, regions, font, policy) if regions else None


def draw_regions(
    image: ImageSource,
    regions: Sequence[Region | Box],
    font: str | Path | None = None,
    policy: ImagePolicy = LIBRARY_POLICY,
) -> Image.Image:
    """A copy of the picture, in RGB, with the regions outlined and labelled; equal labels get equal colours.

    A `Region` is on the model's scale of 0..1000, a `Box` in pixels. What lies outside is moved to the edge. Raises
    ImageError, from `open_image`.
    """
    picture = open_image(image, policy)
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    line = round(1 + (width + height) / 900)

    shapes = [(region, points) for region in regions if (points := _corners(region, width, height))]
    chosen = colours(region.label for region, _ in shapes)
    for region, points in shapes:
        _outline(draw, points, chosen[region.label], line)

    labels = {region.label: _one_line(region.label) for region, _ in shapes if region.label}
    typeface = _font(font, max(10, round(6 + (width + height) / 110)), {c for text in labels.values() for c in text})
    texts = {label: _shortened(text, typeface, width) for label, text in labels.items()}
    placed: list[Rectangle] = []
    for region, points in shapes:
        if region.label and texts[region.label]:
            _label(draw, texts[region.label], typeface, chosen[region.label], _bounds(points), placed)
    return picture


def colours(labels: Iterable[str | None]) -> dict[str | None, tuple[int, int, int]]:
    """Red, green and blue for each phrase, in the order in which they first occur."""
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(dict.fromkeys(labels))}


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture in the format that the name's ending says; an interrupted write leaves no file, or the old one.

    Raises ImageError if the ending is unknown or the file cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in FORMATS:
        raise ImageError(f"cannot save a picture as {path.name!r}: end the name in .png, .jpg or .webp")
    try:
        with whole_file(path) as file:
            image.save(file, format=kind)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot save {path.name!r}: {getattr(error, 'strerror', None) or error}") from None


# ---- shapes


def _corners(region: Region | Box, width: int, height: int) -> list[Point]:
    """The corners in whole pixels of the picture; none if a coordinate is not a number."""
    if isinstance(region, Box):
        points: Sequence[tuple[float, float]] = ((region.x1, region.y1), (region.x2, region.y2))
    else:
        points = region.pixels(width, height)
    if not all(map(math.isfinite, (value for point in points for value in point))):
        return []
    return [(min(max(0, round(x)), width - 1), min(max(0, round(y)), height - 1)) for x, y in points]


def _bounds(points: Sequence[Point]) -> Rectangle:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _outline(draw: ImageDraw.ImageDraw, points: Sequence[Point], colour: tuple[int, int, int], line: int) -> None:
    left, top, right, bottom = _bounds(points)
    # What is thinner than its own outline is drawn as a bar or a dot around where it is.
    across, down = (max(0, 2 * line - 1 - (b - a)) // 2 for a, b in ((left, right), (top, bottom)))
    if len(points) == 2 or (across and down):
        draw.rectangle((left - across, top - down, right + across, bottom + down), outline=colour, width=line)
    else:
        draw.line([*points, *points[:2]], fill=colour, width=line, joint="curve")  # the first side twice: no notch


# ---- labels


def _one_line(label: str) -> str:
    """A label that can be set: no line breaks or characters without a shape, and not endless."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 3] + "..."


def _padding(typeface: ImageFont.FreeTypeFont) -> int:
    return max(2, round(typeface.size / 5))


def _shortened(text: str, typeface: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of the text as fits across the picture; nothing if not even two characters and dots do."""
    room = width - 2 * _padding(typeface)
    while text and typeface.getlength(text) > room:
        text = text.removesuffix("...")[:-1] + "..." if len(text) > 4 else ""
    return text


def _label(
    draw: ImageDraw.ImageDraw,
    text: str,
    typeface: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
    around: Rectangle,
    placed: list[Rectangle],
) -> None:
    """Set a label at its shape, inside the picture and, if one of the usual places is free, clear of those `placed`."""
    width, height = draw.im.size
    padding = _padding(typeface)
    wide = math.ceil(typeface.getlength(text)) + 2 * padding
    high = sum(typeface.getmetrics()) + padding
    if 2 * high > height:  # it would hide more of a tiny picture than it says
        return
    left, top, right, bottom = around
    spots = [
        (min(max(0, x), width - wide), y)
        for x in (left, right + 1 - wide)
        for y in (top - high, top, bottom + 1, bottom + 1 - high)
        if 0 <= y <= height - high
    ]
    spots = spots or [(min(left, width - wide), 0)]
    x, y = next((s for s in spots if not any(_overlap((*s, s[0] + wide, s[1] + high), p) for p in placed)), spots[0])
    if len(placed) < LABELS_TO_AVOID:
        placed.append((x, y, x + wide, y + high))
    draw.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
    red, green, blue = colour
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"  # luma as of BT.601
    draw.text((x + padding, y + high // 2), text, fill=ink, font=typeface, anchor="lm")


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---- fonts


def _font(given: str | Path | None, size: int, characters: set[str]) -> ImageFont.FreeTypeFont:
    """The first font with every one of the characters, or else the one that lacks fewest: those it shows as boxes."""
    tried: list[tuple[int, ImageFont.FreeTypeFont]] = []
    for typeface in _typefaces(given, size):
        try:
            lacks = sum(not _has(typeface, character) for character in characters)
        except (OSError, ValueError):  # a font file that opens, and whose shapes are damaged
            continue
        if lacks == 0:
            return typeface
        tried.append((lacks, typeface))
    return min(tried, key=lambda pair: pair[0])[1]  # never empty: Pillow's own is always there


def _typefaces(given: str | Path | None, size: int) -> Iterator[ImageFont.FreeTypeFont]:
    if given is not None:
        yield from _opened(given, size)
    yield cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # which it is whenever a size is asked for
    for path in _chinese_fonts(FONT_FOLDERS):
        yield from _opened(path, size)


def _opened(path: str | Path, size: int) -> Iterator[ImageFont.FreeTypeFont]:
    try:
        yield ImageFont.truetype(str(path), size)
    except (OSError, ValueError):  # not there, or not a font: the next one will do
        return


def _has(typeface: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font has its own shape for a character."""
    if character.isspace():
        return True
    mask, lacking = typeface.getmask(character), typeface.getmask(UNASSIGNED)
    return (mask.size, bytes(mask)) != (lacking.size, bytes(lacking))


@lru_cache
def _chinese_fonts(folders: tuple[str, ...]) -> list[Path]:
    """The fonts with Chinese in the system's folders, best first. Searched once, and only when one is needed."""
    found = []
    for folder in folders:
        for parent, _, names in os.walk(os.path.expanduser(folder)):
            for name in names:
                plain = name.lower().replace(" ", "").replace("-", "")
                rank = next((i for i, start in enumerate(FONT_NAMES) if plain.startswith(start)), None)
                if rank is not None and plain.endswith((".ttf", ".ttc", ".otf")):
                    found.append((rank, "regular" not in plain, plain, Path(parent, name)))
    return [path for *_, path in sorted(found)]
