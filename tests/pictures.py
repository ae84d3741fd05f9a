"""Small pictures, their files, and what `open_image` says of bad ones, for tests."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.errors import ImageError
from qwenvl.image import LIBRARY_POLICY, ImagePolicy, open_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture() -> Image.Image:
    """Two rows of four different colours, so that a turn or a swap of channels shows."""
    image = Image.new("RGB", (4, 2))
    image.putdata([RED, GREEN, BLUE, WHITE, (10, 20, 30), (40, 50, 60), (70, 80, 90), (0, 0, 0)])
    return image


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    (image or picture()).save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG as the specification has it, for the kinds that Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pixels_of(image: Image.Image) -> list[tuple[int, int, int]]:
    """Row by row."""
    return [tuple(int(v) for v in pixel) for pixel in np.asarray(image).reshape(-1, 3)]


def refused(source: Any, policy: ImagePolicy = LIBRARY_POLICY) -> str:
    """The message, which is always a single line of a sane length."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            open_image(source, policy)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message
