"""The whole path on a picture that is drawn here: no download, no file of anyone else's.

draw_scene    a fixed picture of three coloured shapes, for examples, and where they are
demonstrate   a new picture, three questions in two languages, boxes, timed step by step
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import Image

from .draw import draw_regions, save_image
from .errors import ImageError, printable
from .pipeline import GROUNDING_TOKENS, Pipeline
from .text.boxes import Box
from .text.parts import parse_tagged
from .training.recipes.tiny_questions import SKILLS, Exchange
from .training.recipes.tiny_scenes import COLOURS, Scene, Split, Thing, draw, enlarged, scene
from .training.recipes.tiny_words import CHINESE, ENGLISH, Language

TIMES = 3  # as large as the pictures of the training, for people to look at
# What is asked: the first of each row that can be asked about the picture.
ASKED: tuple[tuple[Language, tuple[str, ...]], ...] = (
    (ENGLISH, ("box", "description")),
    (CHINESE, ("count",)),
    (ENGLISH, ("text", "relation", "colour", "shape", "exists", "description")),
)


def draw_scene() -> tuple[Image.Image, list[Box]]:
    """A picture of 640 x 448 pixels with a circle, a square and a triangle, and the pixel boxes of the three."""
    things = tuple(
        Thing(shape, colour, Box(*corners, f"{colour} {shape}"), COLOURS[colour])
        for shape, colour, corners in (
            ("circle", "red", (60, 70, 230, 240)),
            ("square", "blue", (270, 210, 430, 370)),
            ("triangle", "green", (450, 60, 600, 200)),
        )
    )
    shown = Scene(1, 640, 448, things, "gradient", ((252, 246, 227), (190, 205, 224)))
    return draw(shown), [thing.box for thing in things]


def demonstrate(pipeline: Pipeline, out: str, seed: int | None = None) -> None:
    """Ask `pipeline` about a picture that its training never saw, and write what it shows into the folder `out`.

    `seed` chooses among the test split's pictures; None is a fresh one. Raises ImageError if `out` cannot be written.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"cannot make the folder {folder}: {error.strerror}") from None
    pictures = len(Split.TEST.value)
    chosen = random.randrange(pictures) if seed is None else seed % pictures
    small = scene(Split.TEST.seed(chosen), least=2)
    shown = enlarged(small, TIMES)
    picture = draw(shown)
    save_image(picture, folder / "scene.png")
    print(f"drew {_inventory(shown)}: {folder / 'scene.png'} (again with --seed {chosen})\n")

    began = time.perf_counter()
    rng = random.Random(chosen)
    for language, skills in ASKED:
        exchange = _first(rng, small, language, skills)
        stream = pipeline.chat_stream([{"image": picture}, *parse_tagged(exchange.question)])
        print(f"you:    {exchange.question}\nmodel:  ", end="", flush=True)
        for delta in stream:
            print(printable(delta).replace("\n", " "), end="", flush=True)
        print(f"\ntruth:  {exchange.answer}   ({_since(began)} s so far)\n")

    found: list[Box] = []
    for (colour, shape), number in Counter((t.colour, t.shape) for t in shown.shapes).items():
        phrase = ENGLISH.phrase(colour, shape, number)
        boxes = pipeline.ground(picture, phrase, max_new_tokens=number * GROUNDING_TOKENS)
        answer = "; ".join(f"({b.x1:.0f},{b.y1:.0f}),({b.x2:.0f},{b.y2:.0f})" for b in boxes) or "no box"
        print(f"find:   {phrase}\nmodel:  {answer}")
        found += [replace(box, label=phrase) for box in boxes]
    save_image(draw_regions(picture, found, pipeline.font), folder / "boxes.png")
    print(f"\n{folder / 'boxes.png'}: the picture with the model's boxes")
    print(f"done in {_since(began)} s on {pipeline.device} in {str(pipeline.dtype).removeprefix('torch.')}")
    if pipeline.config.note:
        print(f"\nPlease note: {pipeline.config.note}.\nFor photographs: qwenvl chat --model Qwen/Qwen-VL-Chat")


def _first(rng: random.Random, shown: Scene, language: Language, skills: tuple[str, ...]) -> Exchange:
    """The first of these skills that has something to ask about the scene; the last always has."""
    for skill in skills:
        exchange = SKILLS[skill](rng, shown, language)
        if exchange is not None:
            return exchange
    raise AssertionError(f"nothing of {skills} can be asked about the scene of seed {shown.seed}")


def _inventory(shown: Scene) -> str:
    """What is in the picture, in words."""
    pieces = [ENGLISH.one(ENGLISH.phrase(t.colour, t.shape, 1)) for t in shown.shapes]
    return ENGLISH.join([*pieces, *([f"the text {shown.text.word}"] if shown.text else [])])


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.1f}"
