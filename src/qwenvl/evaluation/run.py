"""A benchmark from its data to a report: what is left is answered, everything is scored.

Plan            how it is to be run
evaluate        answers what has no answer yet, in this process or in all that torchrun started, and scores
rescore         scores the answers of an earlier run
judge_run       lets another model judge them first
check_format    whether a model can be asked in a benchmark's form at all
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..adapt.ranks import Ranks, shared_errors
from ..files import held
from ..pipeline import Pipeline
from .answering import Answer, Asker
from .benchmark import Benchmark, Dataset
from .catalogue import BENCHMARKS, read
from .endpoint import Judge
from .forms import JUDGED
from .items import DataError, Item, Problem, Unavailable
from .journal import SETTINGS, Journal
from .judge import TEMPLATES, Verdict, judge, transcript
from .provenance import device_name, fingerprint, today, versions
from .report import REPORT, load, report, write
from .scoring import Scores
from .touchstone import figures

LOCK, VERDICTS = ".lock", "judgements.jsonl"
CHINESE = "_cn"  # how the names of benchmarks in Chinese end
SHOWN = 3  # problems that an error quotes


@dataclass(frozen=True)
class Plan:
    """How benchmarks are run.

    Attributes:
        data: the folder of all data; None for those that need none.
        out: where answers and reports go, a folder for each benchmark.
        few_shot: examples before each question.
        seed: of examples and of sampling.
        limit: only the first so many items.
        skip: go on without items that cannot be asked; they are listed in the report.
        quiet: no progress bar.
    """

    data: Path | None
    out: Path
    few_shot: int = 0
    seed: int = 0
    limit: int | None = None
    skip: bool = False
    quiet: bool = False


def dataset_of(benchmark: Benchmark, plan: Plan) -> Dataset:
    """What is to be asked. Raises DataError where something is wrong with the data and `skip` is off."""
    if plan.data is None and benchmark.sources[0].files:
        raise DataError(f"{benchmark.name} needs --data, the folder that `qwenvl eval prepare` checks")
    found = read(benchmark, plan.data or Path(), shots=plan.few_shot > 0, limit=plan.limit)
    if found.problems and not plan.skip:
        raise DataError(f"{benchmark.name}: {counted(found.problems)} (--on-error skip leaves such items out)")
    if not found.items:
        raise DataError(f"{benchmark.name}: there is no item that could be asked" + _why(found.problems))
    if len(found.shots) < plan.few_shot:
        raise DataError(f"{benchmark.name}: {plan.few_shot} examples were asked for, and there are {len(found.shots)}")
    return found


def counted(problems: Sequence[Problem]) -> str:
    """How many of each kind, and the first ones."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(problem.kind for problem in problems).items())
    return f"{kinds}: " + "; ".join(map(str, problems[:SHOWN])) + ("; ..." if len(problems) > SHOWN else "")


def _why(problems: Sequence[Problem]) -> str:
    return f": {counted(problems)}" if problems else ""


def settings_of(benchmark: Benchmark, dataset: Dataset, plan: Plan, pipeline: Pipeline) -> dict[str, Any]:
    """What must be the same for answers to belong to one run."""
    quantization = pipeline.config.quantization_config
    return {
        "benchmark": benchmark.name,
        "model": pipeline.name,
        "weights": fingerprint(pipeline.model),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "bits": quantization.bits if quantization else None,
        "data": None if plan.data is None else str(plan.data.resolve()),
        "items": len(dataset.items),
        "questions": questions_in(dataset),
        "few_shot": plan.few_shot,
        "seed": plan.seed,
        "limit": plan.limit,
        "skip": plan.skip,
    }


def questions_in(dataset: Dataset) -> str:
    """A name for what is asked."""
    seen = hashlib.sha256()
    for item in (*dataset.items, *dataset.shots):
        seen.update(repr((item.id, item.text, item.hint, item.options, item.shot)).encode(errors="surrogatepass"))
    return seen.hexdigest()[:16]


def check_format(benchmark: Benchmark, pipeline: Pipeline) -> None:
    """Raises Unavailable where a benchmark asks in ChatML, and the checkpoint was never taught it."""
    known = pipeline.generation_config.chat_format
    if benchmark.form.way == "chat" and known != "chatml":
        raise Unavailable(
            f"{benchmark.name} asks in ChatML, and {pipeline.name} is no chat checkpoint: its chat_format is {known}"
        )


def evaluate(
    benchmark: Benchmark, dataset: Dataset, pipeline: Pipeline, plan: Plan, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Answer every item of `dataset_of` that has no answer yet, score all, and write and return the report.

    With `ranks`, each process does so for its share of the items; all of them see the same folder. Each item is
    answered by one of them. Returns the report in the first process, {} in the others. Raises DataError; nothing that
    was answered before is lost by it.
    """
    check_format(benchmark, pipeline)
    together, first = ranks is not None, ranks is None or ranks.first
    folder = plan.out / benchmark.name
    journal = Journal(folder)
    settings = settings_of(benchmark, dataset, plan, pipeline)
    with shared_errors(together):
        if first:
            journal.begin(settings)
    with held(folder / LOCK) if first else nullcontext(True) as ours:
        with shared_errors(together):
            if not ours:
                raise DataError(f"another process is writing to {folder}")
            known = journal.answers()
            left = [item for item in dataset.items if item.id not in known or known[item.id].error]
        begun = time.monotonic()
        with shared_errors(together):  # nobody writes before all have read, nor is read before all have written
            mine = left if ranks is None else left[ranks.rank :: ranks.count]
            _answer(benchmark, pipeline, plan, dataset, mine, journal, 0 if ranks is None else ranks.rank)
        if not first:
            return {}
        how = {
            "date": today(),
            "device": device_name(pipeline.device),
            "processes": 1 if ranks is None else ranks.count,
            "answered": len(left),
            "seconds": round(time.monotonic() - begun, 1),
            "versions": versions(),
        }
        return _finish(benchmark, dataset, journal, how)


def _answer(
    benchmark: Benchmark,
    pipeline: Pipeline,
    plan: Plan,
    dataset: Dataset,
    items: Sequence[Item],
    journal: Journal,
    rank: int,
) -> None:
    engine = pipeline.engine or pipeline.start_engine()
    asker = Asker(pipeline, engine, benchmark.form, shots=dataset.shots, few_shot=plan.few_shot, seed=plan.seed)
    bar = tqdm(asker.answers(items), benchmark.name, len(items), unit="item", disable=(plan.quiet or rank > 0) or None)
    with journal.appending(rank) as writer:
        for answer in bar:
            writer.add(answer)
            if answer.error and not plan.skip:
                raise DataError(
                    f"{benchmark.name}: item {answer.id} could not be asked: {answer.error} (--on-error skip goes on "
                    "without it; what was answered is kept)"
                )


def rescore(folder: Path, data: Path | None = None) -> dict[str, Any]:
    """The report anew, from the answers that a run left in a folder and the data that it asked; also of one that was
    stopped before it had a report. `data` is where these are now, if they have moved. Raises DataError.
    """
    benchmark, dataset = _earlier(folder, data)
    try:
        how = load(folder / REPORT)["run"]
    except DataError:  # there is none, or it is damaged or of another version: this makes a new one
        how = {}
    return _finish(benchmark, dataset, Journal(folder), how)


def judge_run(
    folder: Path,
    by: Judge,
    *,
    data: Path | None = None,
    template: str | None = None,
    threads: int = 8,
    quiet: bool = False,
) -> dict[str, Any]:
    """Let `by` judge what it has not judged yet of a run's answers, and score all; the report, which is written, too.

    Without a template, it is asked in the benchmark's language, in this library's words. Raises DataError, ConfigError.
    """
    benchmark, dataset = _earlier(folder, data)
    if benchmark.form.metric != JUDGED:
        raise DataError(f"{benchmark.name} is scored without a judge")
    answers = Journal(folder).answers()
    said = {name: one.answer for name, one in answers.items() if not one.error}
    asked = [(item, said[item.id]) for item in dataset.items if item.id in said]
    language = "zh" if benchmark.name.endswith(CHINESE) else "en"
    judge(asked, by, folder / VERDICTS, template=template or TEMPLATES[language], threads=threads, quiet=quiet)
    return rescore(folder, data)


def _earlier(folder: Path, moved: Path | None) -> tuple[Benchmark, Dataset]:
    """What a run asked. Raises DataError where the data are not the same any more."""
    journal = Journal(folder)
    settings = journal.settings()
    benchmark = BENCHMARKS.get(str(settings.get("benchmark")))
    if benchmark is None:
        raise DataError(f"{folder} has answers to {settings.get('benchmark')!r}, which is no benchmark")
    if lacking := [key for key in ("data", "few_shot", "limit", "skip", "questions") if key not in settings]:
        raise DataError(f"{folder}/{SETTINGS} lacks {lacking[0]}: it is of another version")
    data = moved or settings["data"]
    plan = Plan(
        None if data is None else Path(data),
        folder.parent,
        few_shot=settings["few_shot"],
        limit=settings["limit"],
        skip=settings["skip"],
    )
    dataset = dataset_of(benchmark, plan)
    if questions_in(dataset) != settings["questions"]:
        raise DataError(f"{folder}: the data in {data} are no longer those that were asked")
    return benchmark, dataset


def _finish(benchmark: Benchmark, dataset: Dataset, journal: Journal, how: Mapping[str, Any]) -> dict[str, Any]:
    scores, answers = None, journal.answers()
    if benchmark.form.metric == JUDGED:
        verdicts = _verdicts(journal.folder / VERDICTS, answers)
        scores = figures(dataset.items, verdicts) if verdicts else Scores((), {})
        how = {**how, "judge": verdicts[-1].model} if verdicts else how
    found = report(benchmark, dataset, answers, journal.settings(), how, scores)
    write(found, benchmark, journal.folder)
    return found


def _verdicts(path: Path, answers: Mapping[str, Answer]) -> list[Verdict]:
    """Those of the judge who was asked last, about the answers there are now: a score is of one judge and one run."""
    found = transcript(path) if path.exists() else []
    return [
        one
        for one in found
        if one.model == found[-1].model and one.id in answers and answers[one.id].answer in one.prompt
    ]
