"""Figures as a table, line by line while they come, and as one JSON object at the end.

Report     collects events, prints what people read
append     one line more in a file of `bench/results/`, in a checkout of this repository
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..config import QwenVLConfig
from ..errors import printable
from .figures import BARS_ON, CPU, RATES, Event, Facts, Figure, Missing, Target, target

ROOT = Path(__file__).resolve().parents[3]  # of the checkout, if this is one
RESULTS = ROOT / "bench" / "results" / "bench.jsonl"


class Report:
    """What came of a benchmark that may take `seconds`. `mode` is full, quick or tiny; `weights` says of what.

    A table is printed unless it is not wanted. Within `with`, a terminal shows what is being measured, unless `quiet`.
    """

    def __init__(
        self, mode: str, weights: str, config: QwenVLConfig, *, seconds: float, table: bool, quiet: bool
    ) -> None:
        self.mode, self.weights, self.config, self.table = mode, weights, config, table
        self.about: dict[str, str | int] = {}
        self.figures: list[Figure] = []
        self.missing: list[Missing] = []
        self._heading, self._begin = "", time.perf_counter()
        progress = "{percentage:3.0f}% of the time, {elapsed}, measuring {desc}"
        self._bar = tqdm(total=seconds, bar_format=progress, leave=False, disable=True if quiet else None)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def failed(self) -> bool:
        """Whether something has no figure that should have one."""
        return any(missing.failed for missing in self.missing)

    def add(self, event: Event) -> None:
        """Take an event in, and print it."""
        if isinstance(event, str):
            self._bar.n = min(time.perf_counter() - self._begin, self._bar.total)
            self._bar.set_description_str(event)
        elif isinstance(event, Facts):
            self.about = event.about
            self._print(f"{self.about['device']}, torch {self.about['torch']}, {_today()}; weights: {self.weights}")
            self._print(_row("", "measured", "of the limit", "warm-up", "on A100", f"bar (aim) on {BARS_ON}"))
        else:
            if event.subject != self._heading:
                self._heading = event.subject
                self._print(event.subject)
            if isinstance(event, Figure):
                self._add_figure(event)
            else:
                self.missing.append(event)
                self._print(f"  {event.part}: {'FAILED' if event.failed else 'left out'}: {event.reason}")

    def _add_figure(self, figure: Figure) -> None:
        self.figures.append(figure)
        known = target(figure, self.config)
        cells = (
            f"{_digits(figure.value)} {figure.unit:<7}",
            f"{figure.fraction:.0%} {figure.limited_by:<6}" if figure.fraction else "",
            f"{figure.warm_up:.2f} s" if figure.warm_up else "",
            f"{known.published:g}" if known.published else "",
            self._bar_of(figure, known),
        )
        self._print(_row(figure.name, *cells))
        if figure.note:
            self._print(f"      {figure.note}")

    def result(self, seconds: float) -> dict[str, Any]:
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
            "failed": [asdict(missing) for missing in self.missing if missing.failed],
            "left_out": [asdict(missing) for missing in self.missing if not missing.failed],
            "seconds": round(seconds, 1),
        }

    def _facts(self, figure: Figure) -> dict[str, Any]:
        known = target(figure, self.config)
        held = {name: value for name, value in asdict(known).items() if value and name != "on"}
        return figure.as_dict() | held | ({"passed": known.passed(figure)} if self._judged(figure, known) else {})

    def _judged(self, figure: Figure, known: Target) -> bool:
        kind, device = self.about.get("kind"), str(self.about.get("device"))
        return bool(known.bar) and figure.whole and (kind == CPU if known.on == CPU else known.on in device)

    def _bar_of(self, figure: Figure, known: Target) -> str:
        if not known.bar:
            return ""
        told = f"{'>=' if figure.unit in RATES else '<='} {known.bar:g}" + (f" ({known.aim:g})" if known.aim else "")
        if known.on != BARS_ON:
            told += f", {known.on}"
        if not self._judged(figure, known):
            return told
        return f"{told} {'passed' if known.passed(figure) else 'MISSED'}"

    def _print(self, line: str) -> None:
        if self.table:
            self._bar.clear()
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
    return f"  {name:<41}{value:>16}{share:>14}{warm_up:>10}{published:>9}   {bar}".rstrip()


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
