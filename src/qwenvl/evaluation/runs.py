"""Runs beside one another: by model and benchmark, and how far they differ on the same questions.

Runs       reports by label and benchmark
compared   each benchmark's difference to the first run, pair by pair
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .scoring import figure

Report = Mapping[str, Any]


class Runs:
    """Reports by the label of their run and the name of their benchmark; runs in more bits come first.

    A label is the model's name, and where several runs have that, what tells them apart.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        self.benchmarks = list(dict.fromkeys(one["benchmark"] for one in reports))
        keys = {id(one): _key(one["settings"]) for one in reports}
        names = {key: _label(key, set(keys.values())) for key in sorted(set(keys.values()), key=_order)}
        self.labels = list(names.values())
        self._reports = {(names[keys[id(one)]], one["benchmark"]): one for one in reports}

    def report(self, label: str, benchmark: str) -> Report | None:
        """A run's report of a benchmark, if it has one."""
        return self._reports.get((label, benchmark))

    def of(self, benchmark: str) -> list[Report]:
        """All reports of a benchmark."""
        return [one for label in self.labels if (one := self.report(label, benchmark))]

    def any(self, benchmark: str) -> Report:
        """The report of a benchmark that has the most figures: some may not have been scored yet."""
        return max(self.of(benchmark), key=lambda one: len(one["figures"]))


_Key = tuple[str, str, "int | None", int, str]  # model, dtype, bits, examples, weights


def _key(settings: Mapping[str, Any]) -> _Key:
    return (settings["model"], settings["dtype"], settings["bits"], settings["few_shot"], settings["weights"])


def _order(key: _Key) -> tuple[int, str, str, int, str]:
    model, dtype, bits, few_shot, weights = key
    return (-(bits or 99), model, dtype, few_shot, weights)


def _label(key: _Key, others: set[_Key]) -> str:
    """The model, and each of the rest in which another run of the same name differs."""
    model, dtype, bits, few_shot, weights = key
    rest = [other for other in others if other[0].split("/")[-1] == model.split("/")[-1]]
    parts = [model.split("/")[-1]]
    if len({other[1] for other in rest}) > 1:
        parts.append(dtype)
    if len({other[2] for other in rest}) > 1:
        parts.append(f"{bits} bits" if bits else "not packed")
    if few_shot or len({other[3] for other in rest}) > 1:
        parts.append(f"{few_shot}-shot")
    if sum(other[:4] == key[:4] for other in rest) > 1:
        parts.append(weights[:6])
    return ", ".join(parts)


def compared(runs: Runs) -> list[list[str]]:
    """Rows of benchmark, run, difference of the scores' mean to the first run with its interval, equal answers.

    Differences are taken item by item, so that their interval is that of what changed, not of the questions.
    """
    rows = []
    for name in runs.benchmarks:
        base = runs.report(runs.labels[0], name)
        for label in runs.labels[1:]:
            other = runs.report(label, name)
            if base is None or other is None or base["settings"]["questions"] != other["settings"]["questions"]:
                continue
            ours = {row["id"]: row for row in base["answers"] if "score" in row}
            pairs = [(ours[row["id"]], row) for row in other["answers"] if row["id"] in ours and "score" in row]
            if not pairs:
                continue
            change = figure("difference", [[after["score"] - before["score"] for before, after in pairs]])
            alike = [_said(before) == _said(after) for before, after in pairs]
            told = f"{change.value:+.2f} ({change.low:+.2f} to {change.high:+.2f})"
            rows.append([other["title"], label, told, f"{sum(alike) / len(alike):.1%}"])
    return rows


def _said(row: Mapping[str, Any]) -> object:
    """An answer's text; of options, the chosen one."""
    if "losses" in row:
        return min(range(len(row["losses"])), key=row["losses"].__getitem__)
    return row["answer"]
