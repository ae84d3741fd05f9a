"""qwenvl.draw: what a reply marks is seen on the picture, in the right place and colour, with a legible label."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from qwenvl import draw as module
from qwenvl.draw import COLOURS, draw_regions, draw_reply, save_image
from qwenvl.errors import ImageError
from qwenvl.image import SERVER_POLICY
from qwenvl.text.boxes import Box, Region

GREY = (128, 128, 128)
DOG, CAT = "狗", "猫"


@pytest.fixture(autouse=True)
def no_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same fonts on every machine: the one that a test gives, and Pillow's."""
    monkeypatch.setattr(module, "FONT_FOLDERS", ())
    yield
    module._chinese_fonts.cache_clear()


def canvas(width: int = 400, height: int = 300) -> Image.Image:
    """A plain grey picture, a colour that nothing is drawn in."""
    return Image.new("RGB", (width, height), GREY)


def drawn(reply: str, image: Image.Image | None = None, **options: Any) -> np.ndarray:
    """The picture with the reply on it, [height, width, 3]."""
    result = draw_reply(image or canvas(), reply, **options)
    assert result is not None
    return np.asarray(result)


def where(array: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The first and last column and row with a colour: left, top, right, bottom."""
    rows, columns = np.nonzero((array == colour).all(2))
    assert len(rows)
    return columns.min(), rows.min(), columns.max(), rows.max()


def light(array: np.ndarray) -> int:
    """How many pixels are nearly white, as light text is."""
    return int((array > 220).all(2).sum())


def dark(array: np.ndarray) -> int:
    """How many pixels are nearly black, as dark text is."""
    return int((array < 70).all(2).sum())


def font_with(characters: str) -> bytes:
    """A TrueType font in which each of the characters is a solid square and all others an upright bar."""

    def square(left: int, right: int) -> bytes:
        outline = struct.pack(">hhhhh", 1, left, 0, right, 800) + struct.pack(">HH", 3, 0) + b"\x01" * 4
        return outline + struct.pack(">4h4h", left, 0, right - left, 0, 0, 800, 0, -800)

    glyphs = [square(400, 500)] + [square(50, 950)] * len(characters)
    glyphs = [glyph + b"\0" * (-len(glyph) % 4) for glyph in glyphs]
    count = len(glyphs)
    groups = [(ord(c), ord(c), i) for i, c in sorted(enumerate(characters, 1), key=lambda pair: ord(pair[1]))]
    cmap = struct.pack(">HHIII", 12, 0, 16 + 12 * len(groups), 0, len(groups))
    cmap += b"".join(struct.pack(">III", *group) for group in groups)
    tables = {
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 10, 12) + cmap,
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">IIIIHHQQhhhhHHhhh", 65536, 0, 0, 0x5F0F3CF5, 0, 1000, 0, 0, 0, 0, 950, 800, 0, 8, 2, 1, 0
        ),
        b"hhea": struct.pack(">IhhhHhhhhhhhhhhhH", 65536, 900, -100, 0, 1000, 0, 0, 950, 1, 0, 0, 0, 0, 0, 0, 0, count),
        b"hmtx": struct.pack(">Hh", 1000, 0) * count,
        b"loca": struct.pack(f">{count + 1}I", *np.cumsum([0, *map(len, glyphs)])),
        b"maxp": struct.pack(">IH13H", 65536, count, 4, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
    }
    data = struct.pack(">IHHHH", 65536, len(tables), 64, 2, 48)
    offset = len(data) + 16 * len(tables)
    body = b""
    for name, table in tables.items():
        data += struct.pack(">4sIII", name, 0, offset + len(body), len(table))
        body += table + b"\0" * (-len(table) % 4)
    return data + body


# ---- shapes


def test_a_box_is_drawn_where_the_reply_says() -> None:
    """0..1000 becomes pixels of this picture's own width and height; the outline lies just inside the box."""
    image = canvas()
    array = drawn("<box>(250,500),(750,900)</box>", image)
    assert where(array, COLOURS[0]) == (100, 150, 300, 270)
    for x, y in ((100, 200), (101, 200), (300, 200), (200, 150), (200, 270)):
        assert tuple(array[y, x]) == COLOURS[0]
    inside, outside = array[153:268, 103:298], array.copy()
    outside[150:271, 100:301] = GREY
    assert (inside == GREY).all()
    assert (outside == GREY).all()
    assert image.getcolors() == [(400 * 300, GREY)]


def test_a_quad_is_a_polygon() -> None:
    """A diamond has its corners in the middle of the sides, not in the corners of its box."""
    array = drawn("<quad>(500,200),(800,500),(500,800),(200,500)</quad>")
    for x, y in ((200, 60), (319, 150), (200, 239), (80, 150), (260, 105)):
        assert (array[y - 2 : y + 3, x - 2 : x + 3] == COLOURS[0]).all(2).any()
    assert tuple(array[60, 80]) == GREY
    assert tuple(array[150, 200]) == GREY


def test_pixel_boxes_are_drawn_as_they_are() -> None:
    """The boxes that `ground` returns can be drawn, in whatever order their corners are; NaN is passed over."""
    boxes = [Box(100.2, 50, 30, 220.4), Box(float("nan"), 0, 10, 10), Box(0, 0, float("inf"), 10)]
    assert where(np.asarray(draw_regions(canvas(), boxes)), COLOURS[0]) == (30, 50, 100, 220)
    assert draw_regions(canvas(), []).getcolors() == [(400 * 300, GREY)]


def test_what_lies_outside_is_moved_to_the_edge() -> None:
    """Numbers beyond the picture, and the far edge itself, are drawn on its last pixels."""
    array = np.asarray(draw_regions(canvas(), [Box(-50, -1e9, 1e9, 5000)]))
    assert where(array, COLOURS[0]) == (0, 0, 399, 299)
    array = drawn("<box>(500,500),(1000,1000)</box>")
    assert where(array, COLOURS[0]) == (200, 150, 399, 299)


@pytest.mark.parametrize("tag", ["<box>(500,500),(500,500)</box>", "<quad>" + ",".join(["(500,500)"] * 4) + "</quad>"])
def test_a_region_without_area_is_a_dot(tag: str) -> None:
    """It is still to be seen, and no larger than a few pixels."""
    left, top, right, bottom = where(drawn(tag), COLOURS[0])
    assert left <= 200 <= right
    assert top <= 150 <= bottom
    assert right - left <= 4
    assert bottom - top <= 4


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (20, 20), (60, 40), (1000, 3), (3, 1000), (7, 300)])
def test_pictures_of_any_size_survive(size: tuple[int, int]) -> None:
    """A picture too small for a label, or for the line itself, is drawn on all the same, and keeps its size."""
    reply = "<ref>a dog</ref><box>(0,0),(1000,1000)</box><box>(999,999),(1000,1000)</box>"
    reply += "<quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad><quad>(0,500),(1000,500),(1000,500),(0,500)</quad>"
    array = drawn(reply, Image.new("RGB", size, GREY))
    assert array.shape == (size[1], size[0], 3)
    assert (array == COLOURS[0]).all(2).any()


def test_lines_grow_with_the_picture() -> None:
    """On a large photograph the outline is not a hair."""
    array = np.asarray(draw_regions(canvas(4000, 3000), [Box(1000, 1000, 3000, 2000)]))
    assert (array[1500, :2000] == COLOURS[0]).all(1).sum() >= 6


def test_no_box_no_picture() -> None:
    """A reply without regions gives None, and nothing is opened for it."""
    for reply in ("", "A dog.", "<ref>dog</ref>", "<box>", "<box>(1,2)</box>"):
        assert draw_reply("/no/such/file.png", reply) is None


def test_the_picture_is_any_source_under_the_policy(tmp_path: Path) -> None:
    """A path is opened as everywhere, and refused as everywhere."""
    canvas().save(tmp_path / "a.png")
    reply = "<box>(0,0),(500,500)</box>"
    assert draw_reply(tmp_path / "a.png", reply) is not None
    with pytest.raises(ImageError, match="local files"):
        draw_reply(tmp_path / "a.png", reply, policy=SERVER_POLICY)
    transparent = Image.new("RGBA", (40, 40), (0, 0, 255, 0))
    result = draw_reply(transparent, reply)
    assert result is not None
    assert result.mode == "RGB"
    assert transparent.getpixel((0, 0)) == (0, 0, 255, 0)


# ---- colours and labels


def test_one_colour_per_phrase() -> None:
    """The same phrase has the same colour wherever it comes, another phrase another, no phrase one of its own."""
    reply = "<ref>dog</ref><box>(100,100),(200,200)</box> <ref>cat</ref><box>(400,400),(500,500)</box>"
    reply += " <ref> dog</ref><box>(700,700),(800,800)</box> alone <box>(100,800),(200,900)</box>"
    array = drawn(reply)
    colours = [tuple(int(v) for v in array[y, x]) for x, y in ((80, 45), (200, 135), (320, 225), (80, 255))]
    assert colours == [COLOURS[0], COLOURS[1], COLOURS[0], COLOURS[2]]
    assert len(set(COLOURS)) == 12


def test_labels_have_a_background_and_contrast() -> None:
    """The label stands on its box's colour, directly at the box, in black on light and white on dark colours."""
    for index, ink in ((0, light), (6, dark)):  # on red, on yellow
        boxes = [Box(0, 290, 5, 295, str(i)) for i in range(index)] + [Box(100, 100, 300, 200, "dog")]
        patch = np.asarray(draw_regions(canvas(), boxes))[80:100, 100:125]
        assert (patch == COLOURS[index]).all(2).sum() > 100
        assert ink(patch) > 10
        assert (dark if ink is light else light)(patch) == 0


@pytest.mark.parametrize("at", [(0, 0), (395, 0), (0, 295), (395, 295), (395, 150), (200, 0), (200, 295)])
def test_labels_stay_inside_the_picture(at: tuple[int, int]) -> None:
    """At every edge the whole label is there: as many of its pixels as in the middle."""
    label = "something"

    def ink(x: int, y: int) -> int:
        array = np.asarray(draw_regions(canvas(), [Box(x, y, x + 4, y + 4, label)]))
        return light(array)

    assert ink(*at) == ink(200, 150) > 20


def test_labels_keep_clear_of_each_other() -> None:
    """Four phrases for one box are all read: they show as much ink together as one by one."""
    boxes = [Box(100, 100, 300, 200, label) for label in ("first", "second", "third", "fourth")]
    together = np.asarray(draw_regions(canvas(), boxes))
    # One by one, each in its own colour: regions before it take the others.
    alone = [
        np.asarray(draw_regions(canvas(), [*(Box(0, 299, 0, 299, str(n)) for n in range(i)), box]))[:280, 90:310]
        for i, box in enumerate(boxes)
    ]
    assert light(together) + dark(together) == sum(light(a) + dark(a) for a in alone) > 40


def test_a_box_without_a_phrase_has_no_label() -> None:
    """Nothing but the outline is drawn."""
    array = drawn("<box>(250,250),(750,750)</box>")
    assert {tuple(int(v) for v in p) for p in array.reshape(-1, 3)} == {GREY, COLOURS[0]}


@pytest.mark.parametrize(
    "label",
    [
        "x" * 10**6,
        "many words " * 500,
        "two\nlines\tand\0more",
        "\ud800",
        "\U0010ffff",
        "\u200b",
        "\n",
        "🐕",
        "שלום",
        "e\u0301",
    ],
)
def test_labels_of_every_kind_survive(label: str) -> None:
    """Endless, with control characters, lone surrogates, invisible, from right to left: none is worth a crash."""
    array = np.asarray(draw_regions(canvas(), [Region(label, ((100, 500), (900, 900)), "box")]))
    assert tuple(array[200, 40]) == COLOURS[0]
    left, top, right, _ = where(array, COLOURS[0])
    assert (left, right) >= (0, 359)
    assert top >= 100


def test_a_long_label_ends_in_dots() -> None:
    """It is cut to the picture's width."""
    typeface = ImageFont.load_default(14)
    text = module._shortened("a rather long label", typeface, 80)
    assert text.endswith("...")
    assert text.startswith("a ra")
    assert typeface.getlength(text) <= 80
    assert module._shortened("short", typeface, 80) == "short"
    assert module._shortened("long", typeface, 8) == ""


def test_a_huge_number_of_boxes_takes_seconds() -> None:
    """Five thousand labelled boxes neither crash nor crawl."""
    reply = "".join(
        f"<ref>thing {i % 100}</ref><box>({i % 990},{i // 6}),({i % 990 + 9},{i // 6 + 9})</box>" for i in range(5000)
    )
    start = time.monotonic()
    drawn(reply)
    assert time.monotonic() - start < 10


# ---- fonts


def test_chinese_in_the_given_font(tmp_path: Path) -> None:
    """The checkpoint's font is used where it has the characters: its solid squares are to be seen."""
    path = tmp_path / "SimSun.ttf"
    path.write_bytes(font_with(DOG))
    with_font = drawn(f"<ref>{DOG}</ref><box>(250,500),(750,900)</box>", font=path)
    without = drawn(f"<ref>{DOG}</ref><box>(250,500),(750,900)</box>")
    assert light(with_font) > 60 > 10 > light(without)
    assert (with_font != without).any()
    assert (with_font[150:] == without[150:]).all()


def test_a_font_without_the_characters_gives_way(tmp_path: Path) -> None:
    """A font that would show a label as empty boxes is passed over for one that has it, wherever that is."""
    given, system = tmp_path / "given.ttf", tmp_path / "system.ttf"
    given.write_bytes(font_with(CAT))
    system.write_bytes(font_with(DOG + CAT))
    for characters, expected in (("dog", "Aileron"), (CAT, str(given))):
        typeface = module._font(given, 14, set(characters))
        assert expected in (typeface.path, typeface.getname()[0])
    assert not module._has(ImageFont.truetype(str(given), 14), DOG)
    assert module._has(ImageFont.truetype(str(given), 14), CAT)


def test_the_systems_chinese_font_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A known name in a system folder, best first; fonts of other names are not opened at all."""
    folder = tmp_path / "fonts" / "truetype"
    folder.mkdir(parents=True)
    (folder / "Unknown.ttf").write_bytes(font_with(DOG + CAT))
    (folder / "NotoSansCJK-Bold.ttc").write_bytes(font_with(DOG))
    (folder / "NotoSansCJK-Regular.otf").write_bytes(b"damaged")  # Pillow would look for a .ttc in the system
    (folder / "msyh.ttc").write_bytes(font_with(DOG + CAT))
    monkeypatch.setattr(module, "FONT_FOLDERS", (str(tmp_path / "missing"), str(tmp_path / "fonts")))
    assert [path.name for path in module._chinese_fonts(module.FONT_FOLDERS)] == [
        *("NotoSansCJK-Regular.otf", "NotoSansCJK-Bold.ttc", "msyh.ttc")
    ]
    assert Path(str(module._font(None, 14, {DOG}).path)).name == "NotoSansCJK-Bold.ttc"
    assert Path(str(module._font(None, 14, {DOG, CAT}).path)).name == "msyh.ttc"
    assert module._font(None, 14, {"a", "b"}).getname()[0] == "Aileron"


def test_without_any_chinese_font_a_placeholder_is_shown() -> None:
    """The label is there, in the built-in font's sign for what it lacks."""
    array = drawn(f"<ref>{DOG}{CAT}</ref><box>(250,500),(750,900)</box>")
    assert light(array[:150]) > 0


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "folder", "cut", "shapes"])
def test_a_damaged_font_is_passed_over(tmp_path: Path, damage: str) -> None:
    """A label's font is never worth a crash."""
    path = tmp_path / "SimSun.ttf"
    whole = font_with(DOG)
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        outlines = whole.index(struct.pack(">h", 400) + struct.pack(">h", 0) + struct.pack(">h", 500)) - 2
        spoilt = whole[:outlines] + b"\x7f\xff" * 40 + whole[outlines + 80 :]
        path.write_bytes({"empty": b"", "text": b"not a font" * 99, "cut": whole[:150], "shapes": spoilt}[damage])
    reply = f"<ref>{DOG}</ref><box>(250,500),(750,900)</box>"
    array = drawn(reply, font=path)
    assert tuple(array[200, 100]) == COLOURS[0]
    assert (array == drawn(reply)).all()


# ---- saving


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp", "图.bmp"])
def test_a_picture_is_saved_by_its_ending(tmp_path: Path, name: str) -> None:
    """The format follows the name, an older file is replaced, and nothing else is left in the folder."""
    path = tmp_path / name
    path.write_bytes(b"old")
    save_image(canvas(), str(path))
    with Image.open(path) as image:
        assert image.size == (400, 300)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a write is one line, and what was there is still there."""

    def full(_: Image.Image, file: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ImageError, match="No space left"):
        save_image(canvas(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a", "a.txt", "a.pdf", "a.eps", "no/such/folder/a.png", "file/a.png", "a\0.png"])
def test_names_that_cannot_be_saved(tmp_path: Path, name: str) -> None:
    """An unknown ending or a folder that is none: one line."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError) as caught:
        save_image(canvas(), tmp_path / name)
    assert "\n" not in str(caught.value)
