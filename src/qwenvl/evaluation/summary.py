"""Reports as Markdown: the paper's tables with our figures, subtasks, and runs beside one another.

listed      benchmarks for `qwenvl eval list`
runs_in     the folders of runs at and below a folder
table       figures of some reports
summary     all of that, subtasks and comparisons too
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .benchmark import Benchmark
from .catalogue import BENCHMARKS
from .forms import JUDGED
from .items import DataError
from .pooled import with_pooled
from .report import REPORT
from .runs import Runs, compared

TITLES = {
    4: "Table 4: captions and general questions",
    5: "Table 5: texts in pictures",
    6: "Table 6: phrases to find",
    7: "Table 7: instructions",
    None: "Other benchmarks",
}
Report = Mapping[str, Any]


def listed(benchmarks: Iterable[Benchmark]) -> list[dict[str, Any]]:
    """Each benchmark's name, title, metric, table, size, and the paper's figures: {figure: {model: value}}."""
    found = []
    for one in benchmarks:
        published: dict[str, dict[str, float]] = {}
        for model, figures in one.published.items():
            for name, value in figures.items():
                published.setdefault(name, {})[model] = value
        about = {"name": one.name, "title": one.title, "metric": one.form.metric, "table": one.table, "size": one.size}
        found.append({**about, "published": published})
    return found


def runs_in(folder: Path, having: str = REPORT) -> list[Path]:
    """Folders of runs that have a report, or another file. Raises DataError where there is none."""
    found = sorted(path.parent for path in folder.rglob(having)) if folder.is_dir() else []
    if not found:
        raise DataError(f"there is no run in {folder}: `qwenvl eval run` makes one")
    return found


def table(reports: Sequence[Report]) -> str:
    """Figures of each benchmark in the paper's tables, a column for each run, with the paper's own beside them."""
    runs = Runs(with_pooled(reports))
    sections = []
    for number, title in TITLES.items():
        names = [name for name in runs.benchmarks if _table_of(runs, name) == number]
        if names:
            sections.append("\n".join([f"## {title}", "", *_figures(runs, names)]))
    return "\n\n".join([*sections, *_remarks(reports)])


def _table_of(runs: Runs, name: str) -> int | None:
    return BENCHMARKS[name].table if name in BENCHMARKS else runs.of(name)[0]["table"]


def _figures(runs: Runs, names: Sequence[str]) -> list[str]:
    figures = {name: runs.figures(name) for name in names}
    papers = sorted({model for known in figures.values() for one in known.values() for model in one["published"]})
    head = ["benchmark", "figure", *runs.labels, *(f"paper: {model.split('/')[-1]}" for model in papers)]
    rows = []
    for name in names:
        for at, (title, figure) in enumerate(figures[name].items()):
            cells = [_cell(runs, label, name, title) for label in runs.labels]
            paper = [str(figure["published"].get(model, "")) for model in papers]
            rows.append(["" if at else runs.title(name), title, *cells, *paper])
    return markdown(head, rows)


def _cell(runs: Runs, label: str, name: str, title: str) -> str:
    report, figure = runs.report(label, name), runs.figure(label, name, title)
    return "" if report is None or figure is None else _shown(figure) + ("" if report["whole"] else " *")


def _shown(figure: Mapping[str, Any]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _remarks(reports: Sequence[Report]) -> list[str]:
    """What a reader of the figures has to know."""
    remarks = ["In brackets: 95% bootstrap intervals."]
    for one in reports:
        told = []
        if not one["whole"]:
            size = one["items_of_the_benchmark"]
            told.append(f"{one['items']:,} items" + (f" of {size:,}" if size else "") + " (*)")
        if one["problems"]:
            told.append(f"{len(one['problems'])} left out")
        told += [f"{len(ids)} {what}" for what, ids in one["odd"].items()]
        if one["hidden"]:
            told.append(f"{one['hidden']:,} without public annotations: submission.json is for their owner")
        elif not one["figures"]:
            judged = one["benchmark"] in BENCHMARKS and BENCHMARKS[one["benchmark"]].form.metric == JUDGED
            told.append("not judged yet: `qwenvl eval judge`" if judged else "no figure can be had from these")
        if told:
            remarks.append(f"{one['benchmark']}, {one['model']}: {'; '.join(told)}.")
    return ["\n".join(f"- {remark}" for remark in remarks)]


def summary(reports: Sequence[Report]) -> str:
    """The tables, subtasks, and how runs over the same questions differ."""
    runs = Runs(with_pooled(reports))
    sections = [table(reports)]
    for name in runs.benchmarks:
        if groups := _groups(runs, name):
            sections.append("\n".join([f"## {runs.title(name)}, by subtask", "", *groups]))
    if differences := compared(runs):
        head = ["benchmark", "run", f"difference to {runs.labels[0]}", "answers alike"]
        sections.append("\n".join(["## Runs over the same questions", "", *markdown(head, differences)]))
    return "\n\n".join(sections)


def _groups(runs: Runs, name: str) -> list[str]:
    """Subtasks down; if they are "skill, language", languages across."""
    groups = list(dict.fromkeys(group for one in runs.of(name) for group in one["groups"]))
    if not groups:
        return []
    split = [group.rpartition(", ") for group in groups]
    columns = list(dict.fromkeys(column for row, _, column in split)) if all(row for row, _, _ in split) else [""]
    if len(columns) == 1:
        columns = [""]  # rows alone
    labels = [label for label in runs.labels if runs.report(label, name)]
    head = ["", *(", ".join(filter(None, (column, label))) for column in columns for label in labels)]
    rows = []
    for row in dict.fromkeys(row for row, _, _ in split) if len(columns) > 1 else groups:
        cells = []
        for column in columns:
            for label in labels:
                report = runs.report(label, name)
                found = report["groups"].get(f"{row}, {column}" if column else row) if report else None
                cells.append(_shown(found) if found else "")
        rows.append([row, *cells])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
