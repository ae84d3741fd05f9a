"""The small model's training as a picture: loss, and right answers on validation, over all phases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..log import LOG_FILE

SMOOTHING = 10  # lines of the log that one point of the loss is the mean of


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot(folders: Sequence[Path], destination: Path) -> None:
    """Draw the logs of these folders, one phase after the other, into a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    losses, answers = figure.subplots(2, 1, sharex=True)
    begin = 0
    watched: dict[str, tuple[list[int], list[float]]] = {}
    for folder in folders:
        lines = read_log(folder / LOG_FILE)
        progress = [line for line in lines if "loss" in line]
        steps = [begin + line["step"] for line in progress]
        values = [line["loss"] for line in progress]
        smooth = [
            sum(part) / len(part) for k in range(len(values)) if (part := values[max(k - SMOOTHING + 1, 0) : k + 1])
        ]
        losses.plot(steps, smooth, label=folder.name)
        for line in lines:
            for name, value in line.get("evaluation", {}).items():
                xs, ys = watched.setdefault(name, ([], []))
                xs.append(begin + line["step"])
                ys.append(value)
        begin = steps[-1] if steps else begin
        for axes in (losses, answers):
            axes.axvline(begin, color="0.85", zorder=0)
    for name, (xs, ys) in watched.items():
        answers.plot(xs, ys, marker=".", linestyle="--" if name.endswith("IoU") else "-", label=name)
    losses.set(yscale="log", ylabel="loss")
    losses.legend(title="phase")
    answers.set(ylim=(0, 1), xlabel="update", ylabel="validation: share right, mean IoU")
    if watched:
        answers.legend(loc="upper left", ncols=2)
    figure.savefig(destination, dpi=110)
