"""Runs beside one another: by model and benchmark, and how far they differ on the same questions.

Runs       reports by label and benchmark
numbered   reports that say which of several runs alike they are
compared   each benchmark's difference to the first run, pair by pair
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .scoring import figure

Report = Mapping[str, Any]


class Runs:
    """Reports by the label of their run and the name of their benchmark; runs in more bits come first.

    A label is the model's name, and where several runs have that, what tells them apart. Reports are those that
    `numbered` gives.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        self.benchmarks = list(dict.fromkeys(one["benchmark"] for one in reports))
        keys = {id(one): (*key_of(one["settings"]), one[NUMBER]) for one in reports}
        names = {key: _label(key, set(keys.values())) for key in sorted(set(keys.values()), key=_order)}
        self.labels = list(names.values())
        self._reports = {(names[keys[id(one)]], one["benchmark"]): one for one in reports}

    def report(self, label: str, benchmark: str) -> Report | None:
        """A run's report of a benchmark, if it has one."""
        return self._reports.get((label, benchmark))

    def of(self, benchmark: str) -> list[Report]:
        """All reports of a benchmark."""
        return [one for label in self.labels if (one := self.report(label, benchmark))]

    def title(self, benchmark: str) -> str:
        """A benchmark's name for people."""
        title: str = self.of(benchmark)[0]["title"]
        return title

    def figures(self, benchmark: str) -> dict[str, Mapping[str, Any]]:
        """A benchmark's figures by name, as the first report has them that has them: no run need have all."""
        found: dict[str, Mapping[str, Any]] = {}
        for report in sorted(self.of(benchmark), key=lambda one: -len(one["figures"])):
            for one in report["figures"]:
                found.setdefault(one["name"], one)
        return found

    def figure(self, label: str, benchmark: str, name: str) -> Mapping[str, Any] | None:
        """A run's figure of that name, if it has one."""
        report = self.report(label, benchmark)
        return next((one for one in report["figures"] if one["name"] == name), None) if report else None


NUMBER = "run_number"
_Settings = tuple[str, str, "int | None", int, str]  # model, dtype, bits, examples, weights
_Key = tuple[str, str, "int | None", int, str, int]  # and the number


def numbered(reports: Sequence[Report]) -> list[Report]:
    """The reports with a number each, from 1: which it is of those of one benchmark whose runs cannot be told apart.

    Without it one of them would take another's place.
    """
    seen: Counter[object] = Counter()
    found: list[Report] = []
    for one in reports:
        alike = (one["benchmark"], *key_of(one["settings"]))
        seen[alike] += 1
        found.append({**one, NUMBER: seen[alike]})
    return found


def key_of(settings: Mapping[str, Any]) -> _Settings:
    """What makes runs over several benchmarks one."""
    return (settings["model"], settings["dtype"], settings["bits"], settings["few_shot"], settings["weights"])


def _order(key: _Key) -> tuple[int, str, str, int, str, int]:
    model, dtype, bits, few_shot, weights, number = key
    return (-(bits or 99), model, dtype, few_shot, weights, number)


def _label(key: _Key, others: set[_Key]) -> str:
    """The model, and each of the rest in which another run of the same name differs."""
    model, dtype, bits, few_shot, weights, number = key
    rest = [other for other in others if other[0].split("/")[-1] == model.split("/")[-1]]
    parts = [model.split("/")[-1]]
    if len({other[1] for other in rest}) > 1:
        parts.append(dtype)
    if len({other[2] for other in rest}) > 1:
        parts.append(f"{bits} bits" if bits else "not packed")
    if few_shot or len({other[3] for other in rest}) > 1:
        parts.append(f"{few_shot}-shot")
    if len({other[4] for other in rest if other[:4] == key[:4]}) > 1:
        parts.append(weights[:6])
    if number > 1:
        parts.append(f"run {number}")
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
