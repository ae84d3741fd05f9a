"""`qwenvl demo`: the whole path on a picture that it draws itself, and honest about what it shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops
from speech import speak

import qwenvl
from qwenvl import cli
from qwenvl.demo import demonstrate, draw_scene


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command runs question, answer, grounding and drawing, writes both pictures and says: untrained."""
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--out", str(out), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "untrained" in text
    assert text.count("you:") == 2
    assert text.count("find:") == 3
    scene, boxes = Image.open(out / "scene.png"), Image.open(out / "boxes.png")
    assert scene.size == boxes.size == (640, 448)
    assert ImageChops.difference(scene, boxes).getbbox() is not None
    assert sorted(file.name for file in out.iterdir()) == ["boxes.png", "scene.png"]


def test_scene_is_where_it_says() -> None:
    """Each shape fills its box: its colour touches all four sides, and is nowhere else."""
    scene, shapes = draw_scene()
    pixels = np.asarray(scene).astype(int)
    for shape, colour in zip(shapes, [(214, 48, 49), (41, 98, 255), (0, 150, 80)], strict=True):
        rows, columns = np.nonzero((pixels == colour).all(axis=2))
        found = (columns.min(), rows.min(), columns.max(), rows.max())
        assert np.abs(np.subtract(found, (shape.x1, shape.y1, shape.x2, shape.y2))).max() <= 1, shape
    assert np.array_equal(pixels, np.asarray(draw_scene()[0]))  # the same each time


def test_boxes_of_the_model_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the model gives a box, it is printed in pixels and drawn beside the true one."""
    pipeline = qwenvl.load("tiny", "cpu", quiet=True)
    speak(monkeypatch, "A circle.", "一个。", "none", "none", "none")
    demonstrate(pipeline, str(tmp_path / "none"))
    assert capsys.readouterr().out.count("no box") == 3
    speak(monkeypatch, "\x1b[31m", "一个。", "(10,500),(200,900)</box>", "none", "(900,0),(2000,10)</box>")
    demonstrate(pipeline, str(tmp_path / "found"))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "find:   red circle\nmodel:  (6,224),(128,403)\n" in text
    assert "find:   blue square\nmodel:  no box\n" in text
    without, found = (Image.open(tmp_path / folder / "boxes.png") for folder in ("none", "found"))
    assert found.getpixel((6, 300)) != without.getpixel((6, 300))  # its left side
    assert found.getpixel((60, 300)) == without.getpixel((60, 300))  # its inside


def test_without_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that has nothing to confess is not called untrained."""
    pipeline = qwenvl.load("tiny", "cpu", quiet=True)
    pipeline.config = replace(pipeline.config, note=None)
    speak(monkeypatch, "a", "b", "c", "d", "e")
    demonstrate(pipeline, str(tmp_path))
    assert "untrained" not in capsys.readouterr().out
