"""What came of a benchmark, as JSON: settings, versions, figures, every answer, and all that went wrong.

report       the report
compared     a figure beside the paper's
write        puts it on the disk, with a file to submit where the annotations are not public
REPORT       its name in the folder of a run
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import whole_file
from .answering import Answer
from .benchmark import Benchmark, Dataset
from .choices import likeliest
from .forms import LETTERS
from .items import DataError, Problem
from .journal import json_bytes
from .scoring import Answered, Figure, Scores, score

REPORT, SUBMISSION = "report.json", "submission.json"
# What every report of this version has.
WHOLE = {
    *("benchmark", "title", "model", "asked", "settings", "run", "items", "items_of_the_benchmark", "whole", "figures"),
    *("groups", "odd", "hidden", "cut", "problems", "answers"),
}


def report(
    benchmark: Benchmark,
    dataset: Dataset,
    answers: Mapping[str, Answer],
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    scores: Scores | None = None,
) -> dict[str, Any]:
    """All about a run over one benchmark, ready for JSON. `scores`, where they are not of the form's own metric."""
    answered = [
        Answered(item, answers[item.id].answer, answers[item.id].losses)
        for item in dataset.items
        if item.id in answers and not answers[item.id].error
    ]
    scores = scores or score(benchmark.form.metric, answered)
    problems = [*dataset.problems, *_unanswered(dataset, answers)]
    whole = benchmark.size in (None, len(dataset.items)) and not problems and settings["limit"] is None
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "model": settings["model"],
        "asked": {name: value for name, value in asdict(benchmark.form).items() if value not in (None, {}, "", False)},
        "settings": dict(settings),
        "run": dict(run),
        "items": len(answered),
        "items_of_the_benchmark": benchmark.size,
        "whole": whole,
        "figures": [compared(one, _published(benchmark, one)) for one in scores.figures],
        "groups": {name: asdict(one) for name, one in scores.groups.items()},
        "odd": {what: list(ids) for what, ids in scores.odd.items()},
        "hidden": sum(one.item.truth is None for one in answered),
        "cut": sum(answers[one.item.id].cut for one in answered),
        "problems": [asdict(problem) for problem in problems],
        "answers": [_told(one, answers[one.item.id], scores.items) for one in answered],
    }


def _unanswered(dataset: Dataset, answers: Mapping[str, Answer]) -> list[Problem]:
    """Items without an answer: broken pictures are seen when they are decoded."""
    found = []
    for item in dataset.items:
        answer = answers.get(item.id)
        if answer is None or answer.error:
            found.append(Problem("no answer", item.id, answer.error if answer else "it was not asked"))
    return found


def _published(benchmark: Benchmark, figure: Figure) -> dict[str, float]:
    """The paper's value of a figure, by model."""
    return {model: found[figure.name] for model, found in benchmark.published.items() if figure.name in found}


def compared(one: Figure, published: Mapping[str, float]) -> dict[str, Any]:
    """A figure beside the paper's."""
    differences = {model: one.value - known for model, known in published.items()}
    return {**asdict(one), "published": published, "difference": differences}


def _told(one: Answered, answer: Answer, scores: Mapping[str, float]) -> dict[str, Any]:
    return {
        **answer.to_dict(),
        **({"group": one.item.group} if one.item.group else {}),
        **({"score": scores[one.item.id]} if one.item.id in scores else {}),
    }


def write(found: Mapping[str, Any], benchmark: Benchmark, folder: Path) -> None:
    """Put the report into a folder; and a list of the answers, for the owner of annotations that are not public.

    That list is of {"question_id", "answer"}, under the names that the benchmark's server wants. Raises DataError.
    """
    _write(folder / REPORT, found)
    if found["hidden"]:
        _write(folder / SUBMISSION, [_submitted(row, benchmark.submit_as) for row in found["answers"]])


def _submitted(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An answer to submit; of options, the letter."""
    name = int(row["id"]) if row["id"].isdecimal() else row["id"]
    return {key: name, "answer": LETTERS[likeliest(row["losses"])] if "losses" in row else row["answer"]}


def _write(path: Path, found: Any) -> None:  # noqa: ANN401 - JSON
    try:
        with whole_file(path) as file:
            file.write(json_bytes(found, indent=1))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def load(path: Path, keys: Set[str] = frozenset({"run"})) -> dict[str, Any]:
    """A report from the disk, with `keys` in it. Raises DataError for what is none."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is no report: {error}") from None
    if not isinstance(found, dict) or not found.keys() >= keys:
        raise DataError(f"{path} is no report of this version: `qwenvl eval score {path.parent}` makes one")
    return found
