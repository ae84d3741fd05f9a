"""`qwenvl demo`: the whole path on a picture that it draws itself, and honest about what it shows."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops
from speech import speak

import qwenvl
from qwenvl import cli, demo
from qwenvl.demo import demonstrate, draw_scene
from qwenvl.errors import ImageError
from qwenvl.pipeline import Pipeline
from qwenvl.training.recipes.tiny_scenes import COLOURS, Split, Thing, scene

SEED = 5
CHINESE = re.compile("[\u4e00-\u9fff]")


def shown(seed: int = SEED) -> tuple[Thing, ...]:
    """The shapes of the picture that a seed shows."""
    return scene(Split.TEST.seed(seed), least=2).shapes


@pytest.fixture
def pipeline() -> Pipeline:
    """The embedded model."""
    return qwenvl.load("tiny", "cpu", quiet=True)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The model's next replies: to the three questions, and then to what is to be found."""

    def spoken(*found: str, answers: tuple[str, str, str] = ("one", "两个", "three")) -> None:
        speak(monkeypatch, *answers, *found)

    return spoken


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command asks three questions in two languages, searches for every kind of thing, writes both pictures."""
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--out", str(out), "--quiet", "--seed", str(SEED)]) == 0
    text = capsys.readouterr().out
    questions = re.findall(r"^you: +(.*)$", text, re.MULTILINE)
    assert [bool(CHINESE.search(question)) for question in questions] == [False, True, False]
    assert text.count("truth:") == 3
    assert text.count("find:") == len({(thing.colour, thing.shape) for thing in shown()})
    drawn, boxes = Image.open(out / "scene.png"), Image.open(out / "boxes.png")
    small = scene(Split.TEST.seed(SEED), least=2)
    assert drawn.size == boxes.size == (demo.TIMES * small.width, demo.TIMES * small.height)
    assert sorted(file.name for file in out.iterdir()) == ["boxes.png", "scene.png"]


def test_a_seed_is_a_picture(pipeline: Pipeline, tmp_path: Path, say: Callable[..., None]) -> None:
    """The same number, the same picture and questions; without one, a fresh picture each time, told by its number."""
    pictures = {}
    for name, seed in (("one", 7), ("two", 7), ("three", 8), ("four", None), ("five", None)):
        say(*["none"] * 5)
        demonstrate(pipeline, str(tmp_path / name), seed)
        pictures[name] = (tmp_path / name / "scene.png").read_bytes()
    assert pictures["one"] == pictures["two"]
    assert len(set(pictures.values())) == 4


def test_a_fresh_picture_can_be_had_again(
    pipeline: Pipeline, tmp_path: Path, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed that is printed gives the same questions again."""
    say(*["none"] * 5)
    demonstrate(pipeline, str(tmp_path))
    first = capsys.readouterr().out
    (seed,) = re.findall(r"--seed (\d+)", first)
    say(*["none"] * 5)
    demonstrate(pipeline, str(tmp_path), int(seed))
    again = capsys.readouterr().out
    timeless = [re.sub(r"[\d.]+ s", "", text) for text in (first, again)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("seed", [0, 2**30 - 1, 2**70, -3])
def test_pictures_are_of_the_test_split(
    seed: int, pipeline: Pipeline, tmp_path: Path, say: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number is given, training has not seen the picture."""
    seen: list[int] = []
    monkeypatch.setattr(demo, "scene", lambda seed, **limits: seen.append(seed) or scene(seed, **limits))
    say(*["none"] * 5)
    demonstrate(pipeline, str(tmp_path), seed)
    (one,) = seen
    assert one in Split.TEST.value
    assert one not in Split.TRAIN.value


def test_something_can_be_asked_of_every_picture() -> None:
    """Two shapes or, where the room did not suffice, one: there are three questions, and the answers are there."""
    for seed in range(300):
        small = scene(Split.TEST.seed(seed), least=2)
        for language, skills in demo.ASKED:
            exchange = demo._first(demo.random.Random(seed), small, language, skills)
            assert exchange.question
            assert exchange.answer


def test_scene_is_where_it_says() -> None:
    """Each shape of the fixed picture fills its box: its colour touches all four sides, and is nowhere else."""
    picture, shapes = draw_scene()
    assert picture.size == (640, 448)
    pixels = np.asarray(picture).astype(int)
    for shape, colour in zip(shapes, ("red", "blue", "green"), strict=True):
        rows, columns = np.nonzero((pixels == COLOURS[colour]).all(axis=2))
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(found, (shape.x1, shape.y1, shape.x2, shape.y2))).max() <= 1, shape
    assert [shape.label for shape in shapes] == ["red circle", "blue square", "green triangle"]
    assert np.array_equal(pixels, np.asarray(draw_scene()[0]))  # the same each time


def test_boxes_of_the_model_are_drawn(
    pipeline: Pipeline, tmp_path: Path, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model gives a box, it is printed in pixels and drawn; control characters are not."""
    kinds = list(dict.fromkeys((thing.colour, thing.shape) for thing in shown()))
    say(*["none"] * len(kinds))
    demonstrate(pipeline, str(tmp_path / "none"), SEED)
    assert capsys.readouterr().out.count("no box") == len(kinds)
    say("(10,500),(500,900)</box>", *["none"] * (len(kinds) - 1), answers=("\x1b[31m", "一个。", "none"))
    demonstrate(pipeline, str(tmp_path / "found"), SEED)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "model:  一个。\n" in text
    without, found = (Image.open(tmp_path / folder / "boxes.png") for folder in ("none", "found"))
    width, height = without.size
    corners = f"({0.01 * width:.0f},{0.5 * height:.0f}),({0.5 * width:.0f},{0.9 * height:.0f})"
    assert f"find:   {' '.join(kinds[0])}\nmodel:  {corners}\n" in text
    assert ImageChops.difference(without, Image.open(tmp_path / "none" / "scene.png")).getbbox() is None
    changed = np.asarray(ImageChops.difference(without, found)).max(axis=2) > 0
    left, middle = round(0.01 * width), round(0.7 * height)
    assert changed[middle, left - 1 : left + 2].any()  # its left side
    assert not changed[middle, width // 4]  # its inside
    assert not changed[middle, round(0.6 * width) :].any()


def test_several_of_a_kind(
    pipeline: Pipeline, tmp_path: Path, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two red circles are searched for as `red circles`, once, with room for two boxes."""

    def repeated(seed: int) -> bool:
        return len({(thing.colour, thing.shape) for thing in shown(seed)}) < len(shown(seed))

    seed = next(seed for seed in range(1000) if repeated(seed))
    (kind,) = {k for k in ((t.colour, t.shape) for t in shown(seed)) if list(kinds(seed)).count(k) > 1}
    order = list(dict.fromkeys(kinds(seed)))
    two = "(0,0),(100,100)</box><box>(200,200),(999,999)</box>"
    say(*[two if one == kind else "none" for one in order])
    demonstrate(pipeline, str(tmp_path), seed)
    text = capsys.readouterr().out
    assert text.count("find:") == len(order)
    (line,) = re.findall(rf"find:   {kind[0]} {kind[1]}(?:s|es)\nmodel:  (.*)\n", text)
    assert line.count(";") == 1


def kinds(seed: int) -> list[tuple[str, str]]:
    """Colour and shape of each."""
    return [(thing.colour, thing.shape) for thing in shown(seed)]


def test_a_note_is_told(
    pipeline: Pipeline, tmp_path: Path, say: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a checkpoint confesses stands at the end; one that has nothing to confess is not accused."""
    for note in ("untrained noise", None):
        pipeline.config = replace(pipeline.config, note=note)
        say(*["none"] * 5)
        demonstrate(pipeline, str(tmp_path), SEED)
        assert ("Please note: untrained noise." in capsys.readouterr().out) == (note is not None)


def test_a_folder_that_cannot_be_made(pipeline: Pipeline, tmp_path: Path) -> None:
    """A file in the way is one line, before anything is asked."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="cannot make the folder"):
        demonstrate(pipeline, str(tmp_path / "file"), SEED)
