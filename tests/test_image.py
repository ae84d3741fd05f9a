"""qwenvl.image: every kind of source becomes the same RGB picture, and that the same pixels."""

import base64
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import BLUE, GREEN, RED, WHITE, encoded, picture, pixels_of, png, refused
from PIL import Image
from safetensors.torch import load_file

from qwenvl.errors import ImageError
from qwenvl.image import MEAN, SERVER_POLICY, STD, image_hash, open_image, preprocess

# ---- sources


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "bytearray", "memoryview", "stream", "data URL", "base64"])
def test_every_source_of_a_file_gives_the_same_picture(kind: str, tmp_path: Path) -> None:
    """A picture is the same wherever its file comes from."""
    data = encoded()
    path = tmp_path / "图片 with spaces.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    source: Any = {
        "path": path,
        "str": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "stream": io.BytesIO(data),
        "data URL": f"data:image/png;base64,{text}",
        "base64": text,
    }[kind]
    image = open_image(source)
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert pixels_of(image) == pixels_of(picture())


def test_pil_and_numpy_sources_are_copied() -> None:
    """An in-memory picture gives an equal one that shares nothing with it."""
    original = picture()
    for source in (original, np.array(original)):
        opened = open_image(source)
        assert pixels_of(opened) == pixels_of(original)
        opened.putpixel((0, 0), (1, 2, 3))
        assert np.asarray(source)[0, 0].tolist() == list(RED)


def test_a_file_object_is_read_from_its_start_and_stays_open() -> None:
    """The same object can be given for two rounds of a chat."""
    stream = io.BytesIO(encoded())
    assert pixels_of(open_image(stream)) == pixels_of(open_image(stream)) == pixels_of(picture())
    assert not stream.closed


def test_an_unseekable_stream_is_read() -> None:
    """A pipe cannot go back to its start and need not."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

    assert pixels_of(open_image(Pipe(encoded()))) == pixels_of(picture())


def test_data_urls_as_browsers_write_and_read_them() -> None:
    """Case, parameters, a wrong media type, line breaks, escapes and missing padding do not matter."""
    text = base64.b64encode(encoded()).decode()
    wrapped = "\r\n".join(text[i : i + 40] for i in range(0, len(text), 40))
    for url in (
        f"DATA:image/png;BASE64,{text}",
        f"data:image/jpeg;name=a.png;base64,{text}",
        f"data:;base64,{wrapped}",
        f"  data:image/png;base64,{text.rstrip('=')}\n",
        "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ):
        assert pixels_of(open_image(url)) == pixels_of(picture())


def test_no_file_is_left_open(tmp_path: Path) -> None:
    """Neither a good file nor a broken one keeps a descriptor."""
    descriptors = Path("/dev/fd")
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded())
    bad.write_bytes(encoded()[:60])
    before = len(os.listdir(descriptors)) if descriptors.exists() else 0
    kept = []
    for _ in range(3):
        kept.append(open_image(good))
        refused(bad)
    assert (len(os.listdir(descriptors)) if descriptors.exists() else 0) == before


# ---- colours


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "F", "RGBX", "PA", "RGBa"])
def test_modes_become_rgb_as_the_reference_converts_them(mode: str) -> None:
    """Whatever Pillow's convert("RGB") says is what the reference computes: alpha dropped, not blended."""
    image = picture().convert("RGBA" if mode in ("RGBa", "PA") else "RGB").convert(mode)
    assert pixels_of(open_image(image)) == pixels_of(image.convert("RGB"))


def test_alpha_is_dropped() -> None:
    """A fully transparent red stays red, from a file and from an array."""
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    for source in (encoded(red), encoded(red, "WEBP", lossless=True, exact=True), np.asarray(red), red):
        assert pixels_of(open_image(source)) == [RED] * 4


def test_palettes_with_and_without_transparency() -> None:
    """A palette's own colours come out, its transparent entry too."""
    plain = picture().quantize(16)
    for transparency in (None, 0, bytes(range(0, 160, 10))):
        options = {} if transparency is None else {"transparency": transparency}
        assert pixels_of(open_image(encoded(plain, **options))) == pixels_of(plain.convert("RGB"))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    """0x80FF is 0x80 in grey, in colour, with alpha, in PNG, TIFF and PPM, as an array: not white, and not a wrap."""
    grey = np.array([[0, 255, 256], [0x80FF, 0xFF00, 0xFFFF]], np.uint16)
    expected = [(v, v, v) for v in (0, 0, 1, 0x80, 0xFF, 0xFF)]
    image = Image.fromarray(grey)
    assert image.mode == "I;16"
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    sources = [image, grey, grey.astype(">u2"), encoded(image), encoded(image, "TIFF"), png(3, 2, 16, 0, raw)]
    sources += [Image.fromarray(grey.astype(np.int32)), Image.frombytes("I;16B", (3, 2), grey.astype(">u2").tobytes())]
    sources.append(b"P5 3 2 65535\n" + grey.astype(">u2").tobytes())
    for source in sources:
        assert pixels_of(open_image(source)) == expected
    for colour, channels in ((2, 3), (6, 4), (4, 2)):
        rows = b"".join(b"\0" + np.repeat(row[:, None], channels, 1).astype(">u2").tobytes() for row in grey)
        assert pixels_of(open_image(png(3, 2, 16, colour, rows))) == expected
    assert pixels_of(open_image(np.repeat(grey[:, :, None], 3, 2))) == expected


def test_whole_numbers_beyond_sixteen_bits_are_clipped() -> None:
    """Pillow's 32-bit mode holds 16-bit pictures; what lies outside does not wrap around."""
    image = Image.fromarray(np.array([[-5, 70000]], np.int32))
    assert pixels_of(open_image(image)) == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.bool_, np.uint8])
def test_arrays_of_every_accepted_type(dtype: type) -> None:
    """0 is black and the type's one (or 255) is white; one channel and none are the same."""
    one = 255 if dtype is np.uint8 else 1
    array = np.array([[0, one]], dtype)
    for source in (array, array[:, :, None], np.repeat(array[:, :, None], 3, 2), array[::-1]):
        assert pixels_of(open_image(source)) == [(0, 0, 0), WHITE]


def test_floats_are_rounded() -> None:
    """0.5 of 255 is 128, not the 127 of truncation (127.5 goes to the even neighbour)."""
    assert pixels_of(open_image(np.array([[0.5, 0.999]]))) == [(128,) * 3, WHITE]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 2), np.int64), "uint8"),
        (np.zeros((2, 2), np.complex64), "uint8"),
        (np.array([["a"]]), "uint8"),
        (np.full((2, 2), 200.0), "0..1"),
        (np.full((2, 2), -0.1), "0..1"),
        (np.full((2, 2), np.nan), "0..1"),
        (np.zeros((3, 8, 8), np.uint8), "shape"),
        (np.zeros((8, 8, 2), np.uint8), "shape"),
        (np.zeros(8, np.uint8), "shape"),
        (np.zeros((), np.uint8), "shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array: Any, words: str) -> None:
    """A wrong type, range or shape is said, never guessed at."""
    assert words in refused(array)


def test_animations_give_their_first_frame() -> None:
    """As the reference does: GIF, APNG, WebP, and TIFF of several pages."""
    frames = [Image.new("RGB", (3, 3), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels_of(open_image(data)) == [RED] * 9


def test_cmyk_jpeg_and_grey_jpeg() -> None:
    """The print shop's JPEG and the scanner's."""
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    for mode in ("CMYK", "L"):
        converted = image.convert(mode)
        got = np.asarray(open_image(encoded(converted, "JPEG", quality=95))).astype(int)
        assert abs(got - np.asarray(converted.convert("RGB")).astype(int)).max() <= 6


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_one_pixel_in_every_format(kind: str) -> None:
    """1 x 1 is a picture, and can be preprocessed."""
    data = encoded(Image.new("RGB", (1, 1), WHITE), kind)
    assert pixels_of(open_image(data)) == [WHITE]
    assert preprocess(data, 14).shape == (3, 14, 14)


def test_exif_orientation_only_when_asked() -> None:
    """The reference ignores it, so the default does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    data = encoded(exif=exif)
    assert open_image(data).size == (4, 2)
    turned = open_image(data, exif_orientation=True)
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == RED
    assert open_image(picture(), exif_orientation=True).size == (4, 2)
    assert not torch.equal(preprocess(data, 14), preprocess(data, 14, exif_orientation=True))


# ---- preprocess


@pytest.mark.parametrize("name", ["tiny-112", "tiny-448"])
def test_pixels_are_the_references(goldens: Path, name: str) -> None:
    """The first picture's pixels, resized and normalised, are the numbers that the reference computed."""
    folder = goldens / name
    size = json.loads((folder / "config.json").read_text())["visual"]["image_size"]
    expected = load_file(folder / "cases.safetensors")["vision.pixels0_every_7th"]
    pixels = preprocess(sorted((folder / "images").iterdir())[0], size)
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    difference = (pixels[:, ::7, ::7] - expected).abs().max().item()
    print(f"{name}: largest difference {difference:.2g}")
    assert difference < 1e-6


@pytest.mark.parametrize("shape", [(40, 30), (90, 200), (448, 448)])
def test_the_resize_is_bicubic_and_antialiased(shape: tuple[int, int]) -> None:
    """As torch's own antialiased bicubic, but for the rounding to 8 bits between Pillow's two passes.

    The goldens' pictures have the model's size already, so they say nothing about the filter.
    """
    array = np.random.default_rng(0).integers(90, 166, (*shape, 3), np.uint8)  # overshoot is clipped nowhere
    image = torch.from_numpy(array).permute(2, 0, 1)[None].double()
    expected = F.interpolate(image, (112, 112), mode="bicubic", antialias=True, align_corners=False)[0]
    pixels = preprocess(array, 112).double() * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (pixels * 255 - expected).abs().max() < 2
    assert (pixels * 255 - expected).mean().abs() < 0.1
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-3)


@pytest.mark.parametrize(
    ("width", "height", "sha256"),
    [
        (97, 411, "6a9a944fd6e833fa"),
        (411, 97, "ef2e3fa01f5e3c44"),
        (50, 60, "3debc8e49e955bab"),
        (130, 149, "48fb673405e02de4"),
        (130, 148, "3bb572cdb30e0727"),
        (600, 800, "e2ae4006dcf3bf04"),
        (300, 700, "1e1ebee4e4b6f396"),
    ],
)
def test_the_resize_is_one_whatever_pillow_is_installed(width: int, height: int, sha256: str) -> None:
    """What Pillow 13 makes of a picture in one call; those before begin with the other side in three of these."""
    y, x, channel = np.mgrid[0:height, 0:width, 0:3]
    array = ((x * 37 + y * 91 + channel * 53 + (x * y) % 251) % 256).astype(np.uint8)
    pixels = preprocess(array, 112) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    assert hashlib.sha256(levels.tobytes()).hexdigest().startswith(sha256)


def test_preprocess_ignores_the_aspect_ratio_and_takes_every_source() -> None:
    """A wide picture becomes a square; the policy is honoured here too."""
    assert torch.equal(preprocess(picture(), 28), preprocess(encoded(), 28))
    assert preprocess(Image.new("RGB", (300, 2)), 28).shape == (3, 28, 28)
    with pytest.raises(ImageError, match="local files"):
        preprocess("a.png", 28, SERVER_POLICY)
    with pytest.raises(ImageError, match="at least 1"):
        preprocess(picture(), 0)


def test_image_hash_names_pixels() -> None:
    """Equal pixels, equal name, in whatever layout; one changed value, another name."""
    pixels = preprocess(picture(), 28)
    assert image_hash(pixels) == image_hash(preprocess(encoded(), 28))
    strided = pixels.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert image_hash(pixels) == image_hash(strided)
    changed = pixels.clone()
    changed[2, 27, 27] += 1e-3
    assert image_hash(pixels) != image_hash(changed)
    assert len(image_hash(pixels.bfloat16())) == 64


@pytest.mark.real
def test_real_photographs(reference_dir: Path) -> None:
    """Phone and web photographs, large JPEGs among them, become pixels of a plausible spread."""
    paths = [p for p in sorted((reference_dir / "images").iterdir()) if p.suffix in (".jpeg", ".jpg")]
    assert paths
    for path in paths:
        pixels = preprocess(path, 448)
        assert pixels.shape == (3, 448, 448)
        assert pixels.isfinite().all()
        assert 0.2 < pixels.std() < 3


def test_mode_i_of_an_eight_bit_picture() -> None:
    """Pillow's `convert("I")` keeps 8-bit values, which are greys and not the dark end of 16: it came out black."""
    assert open_image(Image.new("L", (2, 2), 200).convert("I")).getpixel((0, 0)) == (200, 200, 200)
