"""Pictures from wherever they are to the pixels that the vision tower takes.

    open_image    a path, bytes, file object, PIL image, numpy array, base64, data URL or http(s) URL, as an RGB picture
    preprocess    the same sources, resized and normalised: [3, S, S]
    image_hash    a name for preprocessed pixels, under which caches keep what was computed from them

This is the one place that reads a local file or fetches a URL on a prompt's behalf, always under an ImagePolicy.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import ImageError
from .fetch import LIBRARY_POLICY, SERVER_POLICY, ImagePolicy, fetch, read_limited, shown

__all__ = [
    "FORMATS",
    "LIBRARY_POLICY",
    "MEAN",
    "SERVER_POLICY",
    "STD",
    "ImagePolicy",
    "ImageSource",
    "image_hash",
    "open_image",
    "preprocess",
]

# What pictures are made of out there, and no more: some of Pillow's other readers start programs or fetch files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B on a scale of 0 to 1, as the vision tower was trained with
STD = (0.26862954, 0.26130258, 0.27577711)

# How the base64 of a PNG, JPEG, GIF or WebP begins. At this length and in this alphabet, no one has a file so named.
BARE_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{48,}={0,2}")
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of those that stand between scans
# Pillow warns of large pictures, which `_to_rgb` refuses by the policy, and of odd metadata, which does not matter.
# Silenced once for all: around each picture, threads would undo one another's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
# A data URL may escape what base64 has beside letters and digits, and line breaks.
ESCAPES = {
    "%2b": "+",
    "%2B": "+",
    "%2f": "/",
    "%2F": "/",
    "%3d": "=",
    "%3D": "=",
    "%0a": "",
    "%0A": "",
    "%0d": "",
    "%0D": "",
}
SPACE = b" \t\n\r\v\f"
# Pillow's readers take some microseconds for each piece of a file, and for comments and EXIF data in many pieces
# quadratic time: minutes for a megabyte. No picture out there has a tenth of this before its pixels.
PIECES = 4000
MOST_SCANS = (
    20  # of a JPEG; progressive ones have about ten. Each goes over all pixels, and takes a few bytes of the file
)
MOST_SIDE = 65_535  # a JPEG's; to resize a picture takes Pillow 32 bytes for each pixel of a side
URL_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | np.ndarray[Any, Any]"
)


def open_image(
    source: ImageSource, policy: ImagePolicy = LIBRARY_POLICY, *, exif_orientation: bool = False
) -> Image.Image:
    """The picture that `source` stands for, as a new PIL image in RGB.

    source: a path; the bytes of a file, or a file object opened in binary mode, read from its start and left open; a
        PIL image; a numpy array [height, width] or [height, width, 1, 3 or 4] of bool, uint8, uint16 or of floats from
        0 to 1; a string that holds a data URL in base64, an http(s) URL or the base64 of a PNG, JPEG, GIF or WebP.
    policy: what may be read, and how large it may be.
    exif_orientation: turn the picture as its EXIF data says. The reference ignores it, so off is what it computes.

    Files are BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, told apart by their content; of an animation, the first frame.
    Colours become RGB as Pillow's `convert("RGB")` makes them, which is the reference: alpha is dropped, not blended.
    16 bits per channel become the upper 8 (Pillow's mode `I;16`, and `I` if a value is above 255, clipped to 16 bits).
    Raises ImageError: not a picture, broken, empty, too large, in too many pieces, not allowed, not to be fetched.
    """
    if isinstance(source, Image.Image):
        with _decoding("the PIL image"):  # which may not have read its file yet
            return _to_rgb(source, "the PIL image", policy, exif_orientation)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array", policy, exif_orientation=False)
    data, name = _read(source, policy)
    if not data:
        raise ImageError(f"{name} is empty: it holds no picture")
    file, formats = _File(data, name), policy.formats or FORMATS
    with _decoding(name, formats), Image.open(file, formats=formats) as image:
        if image.format in ("JPEG", "MPO") and _scans(data, file.tell()) > MOST_SCANS:
            raise ImageError(f"{name} is a JPEG of more than {MOST_SCANS} scans: save it anew")
        file.left = PIECES + len(data) // 64  # for the pixels
        return _to_rgb(image, name, policy, exif_orientation)


def preprocess(
    image: ImageSource, size: int, policy: ImagePolicy = LIBRARY_POLICY, *, exif_orientation: bool = False
) -> Tensor:
    """Pixels for the vision tower: float32 [3, S, S] with S = `size`, the configuration's `visual.image_size`.

    As the reference: resized to a square without regard to the aspect ratio, with Pillow's bicubic filter on 8-bit
    RGB, then scaled to 0..1 and normalised by MEAN and STD. The same with every version of Pillow. Arguments and errors
    are those of `open_image`.
    """
    if size < 1:
        raise ImageError(f"size must be at least 1 pixel, not {size}")
    picture = open_image(image, policy, exif_orientation=exif_orientation)
    resized = np.array(_square(picture, size))  # [S, S, 3]
    pixels = torch.from_numpy(resized).permute(2, 0, 1).to(torch.float32) / 255  # [3, S, S]
    return ((pixels - _per_channel(MEAN)) / _per_channel(STD)).contiguous()


def _square(picture: Image.Image, size: int) -> Image.Image:
    """The picture as S x S pixels, one side after the other.

    Between the two, values are rounded to 8 bits, so it matters which is first. Before version 13, Pillow always began
    with the width; this is the choice of 13, with which the reference's numbers were made.
    """
    height_first = picture.height - size > max(2 * (picture.width - size), 0)
    between = (picture.width, size) if height_first else (size, picture.height)
    return picture.resize(between, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)


def _per_channel(numbers: tuple[float, float, float]) -> Tensor:
    return torch.tensor(numbers, device="cpu").view(3, 1, 1)


def image_hash(pixels: Tensor) -> str:
    """SHA-256, in hex, of what `preprocess` returned: equal for equal pixels, wherever the picture came from."""
    return hashlib.sha256(pixels.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class _File(io.BytesIO):
    """A picture's file, which may be read so many times more."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name, self.left = name, PIECES

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ImageError(f"{self.name} is in too many pieces: save it anew, without comments and other metadata")
        return super().read(size)


def _scans(data: bytes, at: int) -> int:
    """How often a JPEG goes over its pixels; `at` is behind the head of the first scan. Stops when it knows enough."""
    scans, pieces = 1, 0
    while scans <= MOST_SCANS and (marker := JPEG_MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        pieces += 1
        scans += MOST_SCANS if pieces > PIECES else marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _read(source: object, policy: ImagePolicy) -> tuple[bytes, str]:
    """The bytes of an encoded picture, and what to call it in a message."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if memoryview(source).nbytes > policy.max_bytes:
            raise ImageError(f"the picture is larger than the limit of {policy.max_bytes} bytes: send a smaller one")
        return bytes(source), "the picture"
    if isinstance(source, str):
        text = source.strip()
        if text[:5].lower() == "data:":
            return _from_data_url(text, policy), "the data URL's picture"
        if BARE_BASE64.fullmatch(text):
            return _from_base64(text, policy), "the picture in base64"
        if URL_SCHEME.match(text):
            return fetch(text, policy), f"the picture at {shown(text)}"
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), policy), shown(str(source))
    if hasattr(source, "read"):
        return _read_file_object(source, policy), "the file object"
    raise ImageError(
        f"a picture is a path, bytes, file object, PIL image, numpy array or URL, not {type(source).__name__}"
    )


def _read_file(path: Path, policy: ImagePolicy) -> bytes:
    name = shown(str(path))
    if not policy.allow_files:
        raise ImageError("local files are not read here: send the picture itself, as bytes or as a data URL")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device might never end
            raise ImageError(f"{name} is not a file")
        with path.open("rb") as file:
            return read_limited(file.read, policy.max_bytes, name)
    except OSError as error:
        raise ImageError(f"cannot read {name}: {error.strerror}") from None
    except ValueError as error:  # a null character in the path
        raise ImageError(f"cannot read {name}: {error}") from None


def _read_file_object(file: Any, policy: ImagePolicy) -> bytes:  # noqa: ANN401 - whatever has a `read`
    try:
        if hasattr(file, "seek") and (not hasattr(file, "seekable") or file.seekable()):
            file.seek(0)  # as Pillow does: the same object can be given twice
        return read_limited(file.read, policy.max_bytes, "the file object")
    except TypeError:
        raise ImageError("the file object gives no bytes: open the file with mode 'rb'") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read the file object: {error}") from None


def _from_data_url(url: str, policy: ImagePolicy) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().rstrip().endswith(";base64"):
        raise ImageError("a picture's data URL looks like data:image/png;base64,...")
    return _from_base64(payload, policy)


def _from_base64(text: str, policy: ImagePolicy) -> bytes:
    # Measured before it is decoded; line breaks count too.
    if (len(text) - text[-2:].count("=")) * 3 // 4 > policy.max_bytes:
        raise ImageError(f"the base64 is over the limit of {policy.max_bytes} bytes of picture: send a smaller one")
    for escaped, meant in ESCAPES.items():
        text = text.replace(escaped, meant)
    try:
        packed = text.encode().translate(None, SPACE)
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"the picture's base64 cannot be decoded: {error}") from None


@contextmanager
def _decoding(name: str, formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Pillow at work: its errors become ours."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in one of the formats {', '.join(formats)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name} has too many pixels: send a smaller one") from None
    except Exception as error:  # on damaged files, decoders raise whatever they stumbled over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be decoded: {reason}") from None


def _to_rgb(image: Image.Image, name: str, policy: ImagePolicy, exif_orientation: bool) -> Image.Image:
    """A new 8-bit RGB image. The size comes from the header, so nothing too large is ever decoded."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels: it is {width} x {height}")
    if width * height > policy.max_pixels:
        raise ImageError(
            f"{name} is {width} x {height}, over the limit of {policy.max_pixels} pixels: send a smaller one"
        )
    if max(width, height) > MOST_SIDE:
        raise ImageError(f"{name} is {width} x {height}, over the limit of {MOST_SIDE} pixels to a side")
    if exif_orientation:
        image = ImageOps.exif_transpose(image)
    values = np.clip(np.asarray(image), 0, 0xFFFF) if image.mode[0] == "I" else np.zeros(0)
    # Mode I holds whatever was put in; Pillow's `convert("I")` of an 8-bit picture leaves 8-bit values.
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 0xFF):
        image = _from_array(values.astype(np.uint16))
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any]) -> Image.Image:
    """The picture in an array [height, width] or [height, width, channels]."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            f"an array of shape {array.shape} is no picture: it takes [height, width] or [height, width, 1, 3 or 4]"
        )
    if 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} has no pixels")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # which NaN is not either
            raise ImageError("an array of floats must be in 0..1: scale it, or convert it to uint8")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"an array of {array.dtype} is no picture: convert it to uint8, in 0..255")
    return Image.fromarray(np.ascontiguousarray(array))
