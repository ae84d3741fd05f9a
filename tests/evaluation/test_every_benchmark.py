"""Every benchmark, from five invented questions in its files' form to a report, answered by the embedded model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_data import DATA, copied
from support import one_line_error

import qwenvl
from qwenvl.evaluation.catalogue import BENCHMARKS, find, read
from qwenvl.evaluation.items import DataError
from qwenvl.evaluation.report import load
from qwenvl.evaluation.run import Plan, dataset_of, evaluate, rescore
from qwenvl.evaluation.summary import summary, table
from qwenvl.pipeline import Pipeline

WITH_FILES = [one for one in BENCHMARKS.values() if one.sources[0].files]
SHOTS = ["vqav2_val", "gqa_testdev", "flickr", "chartqa_test_human"]


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """The embedded model with an engine of its own."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    vl.start_engine(16)
    return vl


@pytest.fixture(scope="module")
def reports(small: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The reports of all of them."""
    plan = Plan(DATA, tmp_path_factory.mktemp("out"), quiet=True)
    return {one.name: evaluate(one, dataset_of(one, plan), small, plan) for one in WITH_FILES}


@pytest.mark.parametrize("name", [one.name for one in WITH_FILES])
def test_from_files_to_a_report(name: str, reports: dict[str, dict[str, Any]]) -> None:
    """Each item of the files is answered, scored where its truth is known, and in the report on the disk."""
    found, benchmark = reports[name], BENCHMARKS[name]
    items = read(benchmark, DATA).items
    assert [row["id"] for row in found["answers"]] == [item.id for item in items]
    assert found["items"] == len(items) >= 5
    assert not found["problems"]
    truths = [item.truth for item in items]
    judged = benchmark.form.metric == "judged"
    assert bool(found["figures"]) == (not judged and None not in truths)
    assert found["hidden"] == truths.count(None)
    for figure in found["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"]
    known = {figure for figures in benchmark.published.values() for figure in figures}
    assert judged or not found["figures"] or known <= {figure["name"] for figure in found["figures"]}
    assert json.loads(json.dumps(found)) == found


def test_answers_to_hidden_truths_can_be_submitted(small: Pipeline, tmp_path: Path) -> None:
    """Where the owner keeps the annotations, the answers are written as its server takes them."""
    plan = Plan(DATA, tmp_path, quiet=True)
    for name, key in (("vqav2_testdev", "question_id"), ("docvqa_test", "questionId"), ("mmbench_test", "question_id")):
        benchmark = BENCHMARKS[name]
        found = evaluate(benchmark, dataset_of(benchmark, plan), small, plan)
        rows = json.loads((tmp_path / name / "submission.json").read_bytes())
        assert [str(row[key]) for row in rows] == [row["id"] for row in found["answers"]]
        assert all(isinstance(row["answer"], str) for row in rows)
        assert not found["figures"]
    assert {row["answer"] for row in rows} <= set("ABCD")


@pytest.mark.parametrize("name", SHOTS)
def test_few_shot_from_files(name: str, small: Pipeline, tmp_path: Path) -> None:
    """Examples come from the training split of the same files, and stand before each question."""
    plan = Plan(DATA, tmp_path, few_shot=1, quiet=True)
    benchmark = BENCHMARKS[name]
    found = evaluate(benchmark, dataset_of(benchmark, plan), small, plan)
    assert all(len(row["shots"]) == 1 for row in found["answers"])
    assert rescore(tmp_path / name) == load(tmp_path / name / "report.json") == found


def test_tables_have_every_benchmark_and_the_papers_figures(reports: dict[str, dict[str, Any]]) -> None:
    """The Markdown has a row for each figure, in the paper's tables, with its figures and what was put together."""
    told = summary(list(reports.values()))
    for name, found in reports.items():
        if found["figures"]:
            assert f"| {found['title']} | {found['figures'][0]['name']} |" in told, name
    lines = {line.split(" | ")[0].strip("| "): line for line in told.splitlines() if line.startswith("| ")}
    assert lines["RefCOCO+ testB"].endswith("| 77.21 | 76.79 |")
    assert lines["ChartQA"].endswith("| 65.7 | 66.3 |")
    assert lines["SEED-Bench, all"].endswith("| 56.3 | 58.2 |")
    for number in (4, 5, 6, 7):
        assert f"## Table {number}" in told
    assert "5 items of 214,354 (*)" in told
    assert "submission.json is for their owner" in told
    assert "not judged yet" in told
    assert table(list(reports.values())) in told


def test_names_of_benchmarks() -> None:
    """A table's name means its benchmarks; a word that is no name is one line with the nearest name."""
    assert [one.name for one in find(["table6"])] == [name for name, one in BENCHMARKS.items() if one.table == 6]
    assert [one.name for one in find(["mme", "table7", "mme"])].count("mme") == 1
    assert len(find(["table6"])) == 9
    with one_line_error(DataError, "refcoco_vall", "did you mean refcoco_val?"):
        find(["refcoco_vall"])


def test_data_may_move(small: Pipeline, tmp_path: Path) -> None:
    """Answers stay a run's own when the folder of data is another one: it goes on, and can be scored anew."""
    for name in ("here", "there"):
        copied(tmp_path / name, "refcoco", "coco")
    benchmark = BENCHMARKS["refcoco_val"]
    plan = Plan(tmp_path / "here", tmp_path / "out", quiet=True)
    found = evaluate(benchmark, dataset_of(benchmark, plan), small, plan)
    shutil.rmtree(tmp_path / "here")
    with one_line_error(DataError, "there is no folder", "here"):
        rescore(tmp_path / "out" / "refcoco_val")
    assert rescore(tmp_path / "out" / "refcoco_val", tmp_path / "there") == found
    moved = Plan(tmp_path / "there", tmp_path / "out", quiet=True)
    again = evaluate(benchmark, dataset_of(benchmark, moved), small, moved)
    assert again["run"]["answered"] == 0
    assert again["figures"] == found["figures"]
    assert rescore(tmp_path / "out" / "refcoco_val") == again


@pytest.mark.parametrize(
    ("prefixes", "metric", "way", "tokens"),
    [
        (("nocaps", "flickr"), "captions", "generate", (8, 30)),
        (("vqav2", "okvqa", "textvqa", "vizwiz"), "vqa", "generate", (1, 10)),
        (("docvqa", "infographicvqa"), "anls", "generate", (1, 100)),
        (("chartqa",), "relaxed", "generate", (1, 100)),
        (("gqa",), "gqa", "generate", (1, 10)),
        (("ai2d",), "exact", "generate", (1, 10)),
        (("ocrvqa",), "exact", "generate", (1, 100)),
        (("scienceqa_test_img_letter",), "letter", "generate", (1, 10)),
        (("scienceqa_test_img", "seed_"), "choice", "losses", (1, None)),
        (("mmbench",), "circular", "losses", (1, None)),
        (("refcoco", "grit"), "grounding", "generate", (10, 28)),
        (("mme",), "mme", "chat", (1, None)),
        (("touchstone",), "judged", "chat", (1, None)),
    ],
)
def test_each_benchmark_is_asked_as_the_reference_asks_it(
    prefixes: tuple[str, ...], metric: str, way: str, tokens: tuple[int, int | None]
) -> None:
    """A benchmark under another's form would still run: metric, way of asking and new tokens are the reference's."""
    letter = prefixes[0].endswith("letter")
    found = [one for one in WITH_FILES if one.name.startswith(prefixes) and one.name.endswith("letter") == letter]
    assert found
    for one in found:
        form = one.form
        asked = (form.metric, form.way, (form.min_new_tokens, form.max_new_tokens))
        assert asked == (metric, way, tokens), one.name
