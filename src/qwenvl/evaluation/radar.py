"""A radar plot like the paper's: an axis for each benchmark, a polygon for each run.

radar   draws it into a PNG
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import QwenVLError
from ..files import whole_file
from .items import DataError
from .pooled import with_pooled
from .runs import Runs, numbered

PAPER = "Qwen/Qwen-VL"
LEAST_AXES = 3
COLOURS = ("#2a6fdb", "#d1495b", "#2e933c", "#8e5ea2", "#e08e1b")


def radar(reports: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw it; false, and nothing drawn, where there are fewer than three axes.

    An axis is a benchmark's first figure as a share of the paper's for Qwen-VL, which is the dashed ring (or for
    Qwen-VL-Chat, where it has none). If no benchmark is the paper's, axes are subtasks in percent, and the ring is 100.
    Raises QwenVLError if matplotlib is missing, DataError if the file cannot be written.
    """
    axes, lines = _of_paper(Runs(with_pooled(reports)))
    if len(axes) < LEAST_AXES:
        axes, lines = _of_subtasks(Runs(numbered(reports)))
    if len(axes) < LEAST_AXES:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise QwenVLError("a plot needs matplotlib: pip install 'qwenvl[eval]'") from None
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    plot: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * k / len(axes) for k in range(len(axes) + 1)]
    plot.plot(angles, [1.0] * len(angles), "--", color="#666666", linewidth=1)
    for (label, values), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        closed = [*values, values[0]]
        plot.plot(angles, closed, color=colour, label=label, linewidth=1.8)
        plot.fill(angles, [0 if math.isnan(value) else value for value in closed], color=colour, alpha=0.08)
    plot.set_theta_offset(math.pi / 2)
    plot.set_theta_direction(-1)
    plot.set_xticks(angles[:-1], axes, fontsize=9)
    plot.set_ylim(0, max(1.05, *(value for values in lines.values() for value in values if not math.isnan(value))))
    plot.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "50%", "", "100%"], fontsize=8, color="#666666")
    figure.legend(loc="outside lower center", ncols=min(len(lines), 3), frameon=False)
    try:
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None
    return True


def _of_paper(runs: Runs) -> tuple[list[str], dict[str, list[float]]]:
    """Benchmarks that the paper has."""
    axes, lines = [], {label: list[float]() for label in runs.labels}
    for name in runs.benchmarks:
        for at, (figure, known) in enumerate(runs.figures(name).items()):
            published = known["published"]
            if not published:
                continue
            full = published.get(PAPER, next(iter(published.values())))
            title = runs.title(name)
            axes.append(f"{title}\n{figure} {full:g}" if at else f"{title}\n{full:g}")
            for label, values in lines.items():
                own = runs.figure(label, name, figure)
                values.append(own["value"] / full if own else math.nan)
    return axes, lines


def _of_subtasks(runs: Runs) -> tuple[list[str], dict[str, list[float]]]:
    """Subtasks of the first benchmark that has enough; of "skill, language", skills, and a line for each language."""
    for name in runs.benchmarks:
        groups = list(dict.fromkeys(group for one in runs.of(name) for group in one["groups"]))
        if len(groups) < LEAST_AXES:
            continue
        split = [group.rpartition(", ") for group in groups]
        languages = (
            list(dict.fromkeys(last for first, _, last in split)) if all(first for first, _, _ in split) else [""]
        )
        axes = list(dict.fromkeys(first if languages != [""] else last for first, _, last in split))
        lines = {}
        for label in runs.labels:
            if report := runs.report(label, name):
                for language in languages:
                    keys = [f"{axis}, {language}" if language else axis for axis in axes]
                    found = [report["groups"].get(key) for key in keys]
                    line = ", ".join(filter(None, (label, language)))
                    lines[line] = [one["value"] / 100 if one else math.nan for one in found]
        return axes, lines
    return [], {}
