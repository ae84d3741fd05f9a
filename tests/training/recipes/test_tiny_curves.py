"""The curves: all phases in one picture, one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from PIL import Image

from qwenvl.training.log import LOG_FILE
from qwenvl.training.recipes.tiny_curves import SMOOTHING, plot, read_log


def write_log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    """A phase's folder."""
    folder.mkdir()
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three phases: one without evaluation, one with, one that had no time for a line."""
    first = [{"step": 10 * k, "loss": 8.0 / k, "gradient_norm": 1.0} for k in range(1, 31)]
    second = [{"step": 50, "loss": 2.0}, {"step": 50, "evaluation": {"box": 0.25, "box IoU": 0.3}}]
    second += [{"step": 100, "loss": 1.0}, {"step": 100, "evaluation": {"box": 0.5, "box IoU": 0.6}}]
    return [write_log(tmp_path / name, lines) for name, lines in (("1-a", first), ("2-b", second), ("3-c", []))]


def test_a_picture(folders: list[Path], tmp_path: Path) -> None:
    """A PNG of a readable size is written."""
    plot(folders, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_what_is_drawn(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are counted on through the phases; losses are smoothed, evaluations are not."""
    drawn: list[Any] = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    plot(folders, tmp_path / "curves.png")
    losses, answers = drawn[0].axes
    lines = {line.get_label(): line for line in (*losses.get_lines(), *answers.get_lines())}
    assert lines["1-a"].get_xdata().tolist() == list(range(10, 301, 10))
    assert lines["2-b"].get_xdata().tolist() == [350, 400]
    smooth = lines["1-a"].get_ydata().tolist()
    values = [8.0 / k for k in range(1, 31)]
    assert smooth[0] == 8.0
    assert smooth[-1] == pytest.approx(sum(values[-SMOOTHING:]) / SMOOTHING)
    assert lines["2-b"].get_ydata().tolist() == [2.0, 1.5]
    assert (lines["box"].get_xdata().tolist(), lines["box"].get_ydata().tolist()) == ([350, 400], [0.25, 0.5])
    assert lines["box IoU"].get_ydata().tolist() == [0.3, 0.6]
    assert lines["box IoU"].get_linestyle() != lines["box"].get_linestyle()
    assert losses.get_yscale() == "log"


def test_log_lines(folders: list[Path]) -> None:
    """A log is read line by line, as it was written."""
    assert len(read_log(folders[1] / LOG_FILE)) == 4
