"""qwenvl.image: whatever is not a picture, is too large or is not allowed is one clear line."""

import base64
import contextlib
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import file_of, hostile_pictures, odd_pictures, url_of
from pictures import encoded, pixels_of, png, refused
from PIL import Image

from qwenvl.errors import ImageError
from qwenvl.image import SERVER_POLICY, ImagePolicy, open_image

SMALL = ImagePolicy(max_bytes=200, max_pixels=100)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"just some text",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>',
        b"%PDF-1.4\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"P6 2 2 255\nab",
        b"P6 0 0 255\n",
        png(0, 5, 8, 2, b""),
        b"II*\0\xff\xff\xff\xff",
        b"RIFF\x04\0\0\0WEBP",
        encoded(kind="ICO"),
        encoded(kind="TGA"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    """Text, vector graphics, other formats, empty and zero-sized files: one line, from bytes and from a data URL."""
    refused(data)
    refused(f"data:image/png;base64,{base64.b64encode(data).decode()}")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_a_file_cut_off_anywhere_is_refused_or_whole(kind: str) -> None:
    """A truncated download never comes out as a half-grey picture, and never as another error than ours."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    data = encoded(noise, kind)
    whole = pixels_of(open_image(data))
    for end in [*range(0, len(data) // 2, 7), len(data) // 2, len(data) * 3 // 4]:
        assert refused(data[:end])
    for end in range(len(data) * 3 // 4, len(data), 5):
        try:
            opened = open_image(data[:end])
        except ImageError:
            continue
        assert kind not in ("PNG", "BMP", "PPM") or pixels_of(opened) == whole


def test_a_file_with_damaged_bytes_never_raises_another_error() -> None:
    """Decoders stumble in many ways; all of them end as an ImageError or a picture."""
    random = np.random.default_rng(1)
    for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"):
        data = encoded(kind=kind)
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(0, len(data), 3):
                damaged[position] = random.integers(0, 256)
            with contextlib.suppress(ImageError):
                open_image(bytes(damaged), ImagePolicy(max_pixels=10_000))


def test_a_bomb_is_refused_from_its_header() -> None:
    """A few bytes that claim a billion pixels are not decoded, and Pillow's own warning and error do not show."""
    for side in (9_500, 13_000, 60_000, 2**31 - 1):  # above our limit, above Pillow's warning, above Pillow's error
        assert "pixels" in refused(png(side, side, 8, 2, b"\0"))
    assert "10 x 11" in refused(encoded(Image.new("RGB", (10, 11))), ImagePolicy(max_pixels=109))
    assert open_image(encoded(Image.new("RGB", (10, 10))), ImagePolicy(max_pixels=100)).size == (10, 10)
    assert "10 x 11" in refused(Image.new("RGB", (10, 11)), SMALL)
    assert "10 x 11" in refused(np.zeros((11, 10, 3), np.uint8), SMALL)


def test_the_byte_limit_holds_for_every_source(tmp_path: Path) -> None:
    """Exactly the limit passes; one byte more does not, wherever it comes from."""
    data = encoded(Image.new("RGB", (5, 5)))
    data += b"\0" * (200 - len(data))
    path = tmp_path / "a.png"
    for size, source in ((200, data), (201, data + b"\0")):
        path.write_bytes(source)
        text = base64.b64encode(source).decode()
        for form in (source, path, io.BytesIO(source), f"data:image/png;base64,{text}", text):
            if size == 200:
                assert open_image(form, SMALL).size == (5, 5)
            else:
                assert "200 bytes" in refused(form, SMALL)


def test_base64_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge data URL costs no second copy of itself."""
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    assert "limit" in refused("data:image/png;base64," + "A" * 1000, SMALL)


def test_an_endless_file_object_is_given_up() -> None:
    """A stream that never ends stops at the byte limit."""

    class Endless:
        def read(self, size: int) -> bytes:
            return b"\0" * size

    assert "limit" in refused(Endless(), SMALL)


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png",
        "data:image/png,abc",
        "data:image/png;base64,!!!",
        "data:image/png;base64,abcde",
        "data:,",
    ],
)
def test_data_urls_that_are_none(url: str) -> None:
    """Each says what a data URL looks like or what is wrong with its base64."""
    refused(url)


def test_a_long_string_is_not_echoed() -> None:
    """A message has no room for a megabyte of the user's text."""
    for text in (
        "data:image/png;base64," + "é" * 10**6,
        "x" * 10**6,
        "http://[" + "x" * 10**6,
        "iVBORw0KGgo" + " " * 10**6,
    ):
        refused(text)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, a folder, a device, a null character, another scheme: each one line with the path in it."""
    assert "nothing.png" in refused(Path("nothing.png"))
    assert "not a file" in refused(tmp_path)
    assert "null" in refused("a\0b.png")
    for url in ("file:///etc/passwd", "ftp://host/a.png"):
        assert "by its path" in refused(url)
    refused("")
    refused("line\nbreak.png")
    if Path("/dev/zero").exists():
        assert "not a file" in refused("/dev/zero")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "not a file" in refused(tmp_path / "pipe")


def test_things_that_are_no_source(tmp_path: Path) -> None:
    """The type is named; a file opened as text and one that is closed say so."""
    for thing in (None, 3, [1, 2], {"image": "a"}, torch.zeros(3, 4, 4)):
        assert type(thing).__name__ in refused(thing)
    path = tmp_path / "a.txt"
    path.write_text("text")
    with path.open() as file:
        assert "rb" in refused(file)
    assert "closed" in refused(file)
    lazy = tmp_path / "a.png"
    lazy.write_bytes(encoded()[:60])
    with Image.open(lazy) as image:
        refused(image)
    refused(Image.new("RGB", (0, 5)))


def test_the_server_reads_neither_files_nor_urls(tmp_path: Path) -> None:
    """Its policy leaves data URLs and uploads; a path is refused before anyone looks whether it exists."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    for source in (path, str(path), str(tmp_path / "missing.png"), "/etc/passwd", "http://example.com/a.png"):
        message = refused(source, SERVER_POLICY)
        assert "data URL" in message
        assert "missing" not in message
    refused("file:///etc/passwd", SERVER_POLICY)
    text = base64.b64encode(encoded()).decode()
    for source in (encoded(), io.BytesIO(encoded()), f"data:image/png;base64,{text}", text):
        assert open_image(source, SERVER_POLICY).size == (4, 2)


# ---- files that cost more than pictures do


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_costs_little() -> None:
    """Comments in pieces took quadratic time (minutes for a megabyte), scans went over all pixels thousands of times, a
    side of forty million pixels took two gigabytes to resize: all of them small files that Pillow reads.
    """
    for name, data in hostile_pictures().items():
        if name in ("BMP", "TIFF", "PPM"):
            assert open_image(data).size == (8, 8)
            continue
        begun = time.process_time()
        refused(data)
        assert time.process_time() - begun < 3, name
    for data in odd_pictures().values():
        assert open_image(data).getpixel((0, 0)) == open_image(url_of(data)).getpixel((0, 0))


def test_a_server_reads_few_formats() -> None:
    """Those of OpenAI's: Pillow's readers of others are partly in Python, and 16 MB of PPM took them half a minute."""
    for kind in ("BMP", "PPM", "TIFF"):
        assert "GIF, JPEG, PNG, WEBP" in refused(file_of(Image.new("RGB", (2, 2)), kind), SERVER_POLICY)
    for kind in ("GIF", "JPEG", "PNG", "WEBP"):
        assert open_image(file_of(Image.new("RGB", (2, 2)), kind), SERVER_POLICY).size == (2, 2)


def test_a_data_url_costs_little() -> None:
    """Percent signs alone, and base64 in many words: they took gigabytes and twenty seconds."""
    begun = time.process_time()
    for text in ("%" * 8_000_000, "%41" * 3_000_000, "A " * 4_000_000, "%2B" * 3_000_000):
        refused("data:image/png;base64," + text)
    assert time.process_time() - begun < 3
