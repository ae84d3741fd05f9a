"""The whole path on a picture that is drawn here: no download, no file of anyone else's.

draw_scene    three coloured shapes and where they are
demonstrate   question, streamed answer, grounding, drawn boxes, timed step by step
"""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image, ImageDraw

from .draw import draw_regions, save_image
from .errors import ImageError, printable
from .pipeline import Pipeline
from .text.boxes import Box, to_thousandths
from .text.parts import Query

WIDTH, HEIGHT = 640, 448
SKY, GROUND = (252, 246, 227), (148, 190, 224)  # the background fades from one to the other


def draw_scene() -> tuple[Image.Image, list[Box]]:
    """A picture of 640 x 448 pixels with a circle, a square and a triangle, and the pixel boxes of the three."""
    picture = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(picture)
    for y in range(HEIGHT):
        share = y / HEIGHT
        draw.line((0, y, WIDTH, y), fill=tuple(round(a + (b - a) * share) for a, b in zip(SKY, GROUND, strict=True)))
    shapes = [
        Box(60, 70, 230, 240, "red circle"),
        Box(270, 210, 430, 370, "blue square"),
        Box(450, 60, 600, 200, "green triangle"),
    ]
    circle, square, triangle = ((box.x1, box.y1, box.x2, box.y2) for box in shapes)
    draw.ellipse(circle, fill=(214, 48, 49))
    draw.rectangle(square, fill=(41, 98, 255))
    x1, y1, x2, y2 = triangle
    draw.polygon([((x1 + x2) / 2, y1), (x2, y2), (x1, y2)], fill=(0, 150, 80))
    return picture, shapes


def demonstrate(pipeline: Pipeline, out: str) -> None:
    """Ask `pipeline` about the scene, show what it says, and write the pictures into the folder `out`."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"cannot make the folder {folder}: {error.strerror}") from None
    scene, shapes = draw_scene()
    save_image(scene, folder / "scene.png")
    print(f"drew a picture with {', '.join(str(s.label) for s in shapes)}: {folder / 'scene.png'}\n")

    began = time.perf_counter()
    shown = to_thousandths(shapes[0], *scene.size)
    question: Query = [{"image": scene}, {"text": "What is "}, {"ref": "this", "box": list(shown)}, {"text": "?"}]
    history = None
    asked: list[tuple[Query, str]] = [
        (question, f"What is in the box {shown}?"),
        ("图中有几个正方形？", "图中有几个正方形？(How many squares are in the picture?)"),
    ]
    for query, spoken in asked:
        print(f"you:    {spoken}\nmodel:  ", end="", flush=True)
        stream = pipeline.chat_stream(query, history)
        for delta in stream:
            print(printable(delta).replace("\n", " "), end="", flush=True)
        history = stream.history
        print(f"\n        ({len(stream.reply)} characters, {_since(began)} s so far)\n")

    found: list[Box] = []
    for shape in shapes:
        boxes = pipeline.ground(scene, str(shape.label))
        answer = "; ".join(f"({b.x1:.0f},{b.y1:.0f}),({b.x2:.0f},{b.y2:.0f})" for b in boxes) or "no box"
        print(f"find:   {shape.label}\nmodel:  {answer}")
        found += [Box(b.x1, b.y1, b.x2, b.y2, f"{shape.label} (model)") for b in boxes]
    save_image(draw_regions(scene, [*shapes, *found], pipeline.font), folder / "boxes.png")
    print(f"\n{folder / 'boxes.png'}: the boxes that were drawn, and the model's own where it gave one")
    print(f"done in {_since(began)} s on {pipeline.device} in {str(pipeline.dtype).removeprefix('torch.')}")
    if pipeline.config.note:
        print(f"\nPlease note: {pipeline.config.note}.\nFor real answers: qwenvl chat --model Qwen/Qwen-VL-Chat")


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.1f}"
