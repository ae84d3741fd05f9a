"""Figures as a table, line by line while they come, and as one JSON object at the end.

Report     collects events, prints what people read
append     one line more in a file of `bench/results/`, in a checkout of this repository
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import QwenVLConfig
from ..errors import printable
from .figures import RATES, Event, Facts, Figure, Missing
from .targets import BARS_ON, PUBLISHED_ON, Target, target

ROOT = Path(__file__).resolve().parents[3]  # of the checkout, if this is one
RESULTS = ROOT / "bench" / "results" / "bench.jsonl"


class Report:
    """What came of a benchmark. `mode` is full, quick or tiny; `weights` is "random" or a checkpoint's name."""

    def __init__(self, mode: str, weights: str, config: QwenVLConfig, *, table: bool) -> None:
        self.mode, self.weights, self.config, self.table = mode, weights, config, table
        self.about: dict[str, str | int] = {}
        self.figures: list[Figure] = []
        self.missing: list[Missing] = []
        self._heading = ""

    @property
    def failed(self) -> bool:
        """Whether something has no figure that should have one."""
        return any(missing.failed for missing in self.missing)

    def add(self, event: Event) -> None:
        """Take an event in, and print it."""
        if isinstance(event, Facts):
            self.about = event.about
            self._print(f"{self.about['device']}, torch {self.about['torch']}, {_today()}; weights: {self.weights}")
            self._print(_row("", "measured", "of the limit", "warm-up", PUBLISHED_ON, f"bar (aim) on {BARS_ON}"))
            return
        if event.subject != self._heading:
            self._heading = event.subject
            self._print(event.subject)
        if isinstance(event, Missing):
            self.missing.append(event)
            self._print(f"  {event.part}: {'FAILED' if event.failed else 'left out'}: {event.reason}")
            return
        self.figures.append(event)
        known = target(event, self.config)
        cells = (
            f"{_digits(event.value)} {event.unit}",
            f"{event.fraction:.0%} {event.limited_by}" if event.fraction else "",
            f"{event.warm_up:.2f} s" if event.warm_up else "",
            f"{known.published:g}" if known.published else "",
            self._bar(event, known),
        )
        self._print(_row(event.name, *cells))
        if event.note:
            self._print(f"      {event.note}")

    def finish(self, seconds: float) -> dict[str, Any]:
        """The JSON object of it all."""
        return {
            "bench": "bench",
            "date": _today(),
            "version": __version__,
            "commit": _commit(),
            "mode": self.mode,
            "weights": self.weights,
            **self.about,
            "figures": [self._facts(figure) for figure in self.figures],
            "failed": [missing.as_dict() for missing in self.missing if missing.failed],
            "left_out": [missing.as_dict() for missing in self.missing if not missing.failed],
            "seconds": round(seconds, 1),
        }

    def _facts(self, figure: Figure) -> dict[str, Any]:
        known = target(figure, self.config)
        held = {name: value for name, value in vars(known).items() if value}
        return figure.as_dict() | held | ({"passed": known.passed(figure)} if self._judged(figure, known) else {})

    def _judged(self, figure: Figure, known: Target) -> bool:
        return bool(known.bar) and figure.whole and BARS_ON in str(self.about.get("device", ""))

    def _bar(self, figure: Figure, known: Target) -> str:
        if not known.bar:
            return ""
        told = f"{'>=' if figure.unit in RATES else '<='} {known.bar:g}" + (f" ({known.aim:g})" if known.aim else "")
        if not self._judged(figure, known):
            return told
        return f"{told} {'passed' if known.passed(figure) else 'MISSED'}"

    def _print(self, line: str) -> None:
        if self.table:
            print(printable(line), flush=True)


def append(result: dict[str, Any], path: Path = RESULTS) -> None:
    """One line more in a file of results; nothing where this is no checkout. A disk that says no costs a remark."""
    if not path.parent.is_dir():
        return
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    except OSError as error:
        print(f"the result was not added to {path}: {error.strerror}", file=sys.stderr)


def _row(name: str, value: str, share: str, warm_up: str, published: str, bar: str) -> str:
    return f"  {name:<37}{value:>15}{share:>14}{warm_up:>10}{published:>8}   {bar}".rstrip()


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _today() -> str:
    return datetime.date.today().isoformat()


def _commit() -> str:
    """Of the checkout that this runs from; "unknown" where that cannot be told."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
