"""The runner: every item once, whoever answers it and however often the run is stopped."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation.asked import benchmark, items, plan
from support import one_line_error

import qwenvl
from qwenvl.evaluation import journal as journals
from qwenvl.evaluation.answering import Answer, Asker
from qwenvl.evaluation.benchmark import Benchmark, Dataset
from qwenvl.evaluation.catalogue import BENCHMARKS
from qwenvl.evaluation.forms import CHOICE, EXACT, SMALL, VQA
from qwenvl.evaluation.items import DataError, Item, Problem, Unavailable
from qwenvl.evaluation.journal import Journal
from qwenvl.evaluation.report import WHOLE, load
from qwenvl.evaluation.run import Plan, dataset_of, evaluate, questions_in, rescore
from qwenvl.pipeline import Pipeline

CHAT = replace(SMALL, metric="exact", trusted=False)


@pytest.fixture(scope="module")
def small() -> Pipeline:
    """The embedded model with an engine of its own."""
    vl = qwenvl.load("tiny", "cpu", quiet=True)
    vl.start_engine(8)
    return vl


def answered(asked: Benchmark, vl: Pipeline, how: Plan) -> dict[str, Any]:
    """The report of a run."""
    return evaluate(asked, dataset_of(asked, how), vl, how)


def told(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what a second run may differ in."""
    return {key: value for key, value in report.items() if key not in ("run", "settings")}


@pytest.mark.parametrize("form", [EXACT, CHAT, CHOICE], ids=["generate", "chat", "losses"])
def test_batched_is_single(small: Pipeline, form: Any, tmp_path: Path) -> None:
    """Answers of many items computed together are those of each item by itself, in every way of asking."""
    asked = benchmark(form, items(8, options=form is CHOICE))
    together = answered(asked, small, plan(tmp_path / "together"))
    alone = qwenvl.load("tiny", "cpu", quiet=True)
    alone.start_engine(1)
    single = answered(asked, alone, plan(tmp_path / "single"))
    for one, other in zip(together["answers"], single["answers"], strict=True):
        losses = one.pop("losses", []), other.pop("losses", [])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert one == other
    assert len({json.dumps(one) for one in together["answers"]}) > 4, "answers differ, so the test can fail"
    assert together["figures"] == single["figures"]


def test_a_killed_run_goes_on(small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle, even of a line, and goes on equals one that was never stopped; nothing twice."""
    asked = benchmark(EXACT, items(9))
    whole = answered(asked, small, plan(tmp_path / "whole"))
    add = journals.Writer.add

    def killed(self: journals.Writer, answer: Answer) -> None:
        if answer.id == "q5":
            self._file.write(b'{"id": "q5", "ans')
            self._file.flush()
            raise KeyboardInterrupt
        add(self, answer)

    with monkeypatch.context() as patch:
        patch.setattr(journals.Writer, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            answered(asked, small, plan(tmp_path / "stopped"))
    assert list(Journal(tmp_path / "stopped" / "invented").answers()) == [f"q{k}" for k in range(5)]
    resumed = answered(asked, small, plan(tmp_path / "stopped"))
    assert resumed["run"]["answered"] == 4
    assert told(resumed) == told(whole)
    lines = (tmp_path / "stopped" / "invented" / "answers-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"q{k}" for k in range(9)]


def test_two_processes_are_one(small: Pipeline, tmp_path: Path) -> None:
    """Two gloo processes, going on where one was stopped, answer every item that is left once, and as one does."""
    names = ("tiny", "tiny_grounding")
    one = [answered(BENCHMARKS[name], small, plan(tmp_path / "one", limit=13)) for name in names]
    begun = tmp_path / "two" / "tiny"
    begun.mkdir(parents=True)
    for name in ("run.json", "answers-0.jsonl"):
        (begun / name).write_bytes((tmp_path / "one" / "tiny" / name).read_bytes())
    lines = (begun / "answers-0.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "answers-0.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:10])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qwenvl.cli"]
    command = ["eval", "run", *names, "--limit", "13", "--json", "--quiet", "--device", "cpu"]
    two = subprocess.run(
        [sys.executable, *torchrun, *command, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    double = json.loads(two.stdout)
    assert [told(report) for report in double] == [told(report) for report in one]
    assert [report["run"]["processes"] for report in double] == [2, 2]
    for name in names:
        files = sorted((tmp_path / "two" / name).glob("answers-*.jsonl"))
        ids = Counter(json.loads(line)["id"] for file in files for line in file.read_text().splitlines())
        assert len(files) == 2
        assert set(ids.values()) == {1}
        assert len(ids) == 13


def test_a_broken_picture_ends_the_run_and_loses_nothing(small: Pipeline, tmp_path: Path) -> None:
    """By default, an item that cannot be asked is an error; what was answered stays, and a run that skips goes on."""
    good, broken = items(4), Item("broken", (b"no picture",), "What?", ["3"])
    with one_line_error(DataError, "broken", "could not be asked", "--on-error skip"):
        answered(benchmark(EXACT, [*good[:2], broken, *good[2:]]), small, plan(tmp_path))
    assert list(Journal(tmp_path / "invented").answers()) == ["q0", "q1", "broken"]
    found = answered(benchmark(EXACT, [*good[:2], broken, *good[2:]]), small, plan(tmp_path, skip=True))
    assert found["run"]["answered"] == 3
    assert [row["id"] for row in found["answers"]] == ["q0", "q1", "q2", "q3"]


def test_a_broken_picture_is_listed_and_not_scored(small: Pipeline, tmp_path: Path) -> None:
    """With skip, items that cannot be asked are counted, listed, and part of no figure; the report is not whole."""
    missing = Problem("missing picture", "q9", "there is no q9.jpg")
    broken = Item("broken", (b"no picture",), "What?", ["3"])
    long = Item("long", items(1)[0].pictures, "word " * 4000, ["3"])
    asked = benchmark(EXACT, [*items(3), missing, broken, long])
    found = answered(asked, small, plan(tmp_path, skip=True))
    assert [(one["kind"], one["where"]) for one in found["problems"]] == [
        ("missing picture", "q9"),
        ("no answer", "broken"),
        ("no answer", "long"),
    ]
    assert found["items"] == found["figures"][0]["count"] == 3
    assert not found["whole"]
    assert [row["id"] for row in found["answers"]] == ["q0", "q1", "q2"]


def test_a_part_is_not_the_whole(small: Pipeline, tmp_path: Path) -> None:
    """With a limit a report is not of the whole benchmark, also where nobody knows how many items that has; figures
    stand beside the paper's, above it with a plus.
    """
    asked = benchmark(EXACT, items(3), published={"Qwen/Qwen-VL": {"accuracy": 250.0}})
    assert not answered(asked, small, plan(tmp_path / "part", limit=2))["whole"]
    found = answered(asked, small, plan(tmp_path / "all"))
    assert found["whole"]
    assert not answered(replace(asked, size=4), small, plan(tmp_path / "lacks"))["whole"]
    (one,) = found["figures"]
    assert one["difference"] == {"Qwen/Qwen-VL": pytest.approx(one["value"] - 250)}


def test_problems_of_the_data_are_told_before_anything_is_asked(small: Pipeline, tmp_path: Path) -> None:
    """Without skip, bad data are one line with how many of each kind, and the first ones."""
    bad = [Problem("malformed", f"a.jsonl:{k}", "not JSON") for k in range(5)]
    with one_line_error(DataError, "5 x malformed", "a.jsonl:0: not JSON", "; ..."):
        answered(benchmark(EXACT, [*bad, *items(1)]), small, plan(tmp_path))
    with one_line_error(DataError, "no item that could be asked", "malformed"):
        answered(benchmark(EXACT, bad), small, plan(tmp_path, skip=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "told_of"),
    [
        ({"seed": 1}, "seed"),
        ({"limit": 2}, "items"),
        ({"few_shot": 1}, "few_shot"),
    ],
)
def test_answers_of_another_run_are_kept_apart(
    small: Pipeline, tmp_path: Path, changed: dict[str, Any], told_of: str
) -> None:
    """A folder with answers that were got otherwise is refused, and says in what they differ."""
    asked = benchmark(EXACT, items(3), shots=items(6)[3:])
    (tmp_path / "shots.jsonl").touch()
    first = replace(plan(tmp_path / "out"), data=tmp_path)
    answered(asked, small, first)
    with one_line_error(DataError, "another run", told_of):
        answered(asked, small, replace(first, **changed))


def test_other_weights_are_another_run(small: Pipeline, tmp_path: Path) -> None:
    """Answers of a checkpoint are not taken for those of another under the same name."""
    answered(benchmark(EXACT, items(2)), small, plan(tmp_path))
    other = qwenvl.load("tiny", "cpu", quiet=True)
    other.model.decoder.ln_f.weight.data.mul_(1.5)
    with one_line_error(DataError, "another run", "weights"):
        answered(benchmark(EXACT, items(2)), other, plan(tmp_path))


def test_answers_of_nobody_knows_which_run(small: Pipeline, tmp_path: Path) -> None:
    """Answers without the settings of their run were taken for those of any run that came."""
    answered(benchmark(EXACT, items(2)), small, plan(tmp_path))
    (tmp_path / "invented" / "run.json").unlink()
    with one_line_error(DataError, "no run.json", "another --out"):
        answered(benchmark(EXACT, items(2)), small, plan(tmp_path, seed=1))


def test_a_base_checkpoint_is_not_asked_in_chatml(
    small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MME and TouchStone ask in ChatML; a base checkpoint was asked without it, and its figures looked like others."""
    raw = replace(small.generation_config, chat_format="raw")
    monkeypatch.setattr(small, "generation_config", raw)
    with one_line_error(Unavailable, "invented asks in ChatML", "chat_format is raw"):
        answered(benchmark(CHAT, items(2)), small, plan(tmp_path))
    assert not list(tmp_path.iterdir())
    assert answered(benchmark(EXACT, items(2)), small, plan(tmp_path))["items"] == 2


@pytest.mark.parametrize("field", ["id", "text", "hint", "options", "shot"])
def test_changed_questions_are_another_run(field: str) -> None:
    """Whatever a question shows of itself is part of what makes a run: a change of it starts another."""
    first = replace(items(1)[0], hint="hint", options=("a", "b"), shot="one")
    other = replace(first, **{field: ("b", "a") if field == "options" else "other"})
    names = [questions_in(Dataset((one,), (), ())) for one in (first, other)]
    assert names[0] != names[1]


def test_two_runs_into_one_folder(small: Pipeline, tmp_path: Path) -> None:
    """A second process that writes to the same folder is refused, since both would answer the same items."""
    answered(benchmark(EXACT, items(2)), small, plan(tmp_path))
    holding = (
        "import sys, pathlib; from qwenvl.files import held\n"
        "with held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "invented" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with one_line_error(DataError, "another process"):
            answered(benchmark(EXACT, items(2)), small, plan(tmp_path))
        other.communicate("")


def test_who_stops_leaves_the_engine_to_others(small: Pipeline, tmp_path: Path) -> None:
    """A run that ends in the middle takes its questions back: the engine has nothing left to do."""
    assert small.engine is not None
    with one_line_error(DataError, "broken"):
        answered(benchmark(EXACT, [Item("broken", (b"?",), "What?", ["3"]), *items(20)]), small, plan(tmp_path))
    while small.engine.step():
        assert small.engine.load.waiting == 0
    assert small.engine.load.active == 0


def test_odd_characters_reach_the_report(small: Pipeline, tmp_path: Path) -> None:
    """Half a surrogate pair, line ends and quotes in ids and questions are kept as they are, and read again."""
    odd = replace(items(1)[0], id='a\ud83d"\n', text="What \ud83d\x00 is\nthis?")
    found = answered(benchmark(EXACT, [odd, items(2)[1]]), small, plan(tmp_path, skip=True))
    assert [row["id"] for row in found["answers"]] == [odd.id, "q1"]
    assert load(tmp_path / "invented" / "report.json", WHOLE) == found
    assert answered(benchmark(EXACT, [odd, items(2)[1]]), small, plan(tmp_path, skip=True))["run"]["answered"] == 0


def test_damaged_answers_are_told(small: Pipeline, tmp_path: Path) -> None:
    """A line in the middle of the answers that is none is an error with its place, not an item that is asked again."""
    asked = benchmark(EXACT, items(3))
    answered(asked, small, plan(tmp_path))
    path = tmp_path / "invented" / "answers-0.jsonl"
    first, _, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, '{"id": 5}\n', *rest]))
    with one_line_error(DataError, "answers-0.jsonl:2"):
        answered(asked, small, plan(tmp_path))


def test_scores_can_be_had_again(small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring the answers of a run anew, without a model, gives its report; changed questions are refused."""
    monkeypatch.setitem(BENCHMARKS, "invented", benchmark(EXACT, items(4)))
    found = answered(BENCHMARKS["invented"], small, plan(tmp_path))
    assert rescore(tmp_path / "invented") == found
    other = benchmark(EXACT, [replace(one, text="Otherwise?") for one in items(4)])
    monkeypatch.setitem(BENCHMARKS, "invented", other)
    with one_line_error(DataError, "no longer those"):
        rescore(tmp_path / "invented")
    with one_line_error(DataError, "no run"):
        rescore(tmp_path / "nowhere")


def test_a_stopped_run_can_be_scored(small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run that never came to its report has answered is scored; the other items are listed as without answer."""
    monkeypatch.setitem(BENCHMARKS, "invented", benchmark(EXACT, items(4)))
    answered(BENCHMARKS["invented"], small, plan(tmp_path))
    path = tmp_path / "invented" / "answers-0.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    (tmp_path / "invented" / "report.json").unlink()
    found = rescore(tmp_path / "invented")
    assert found["figures"][0]["count"] == 3
    assert [one["where"] for one in found["problems"]] == ["q3"]
    assert not found["whole"]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_scoring_replaces_a_damaged_report(
    text: str, small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error about a damaged report says that scoring makes a new one, and scoring failed with the same error."""
    monkeypatch.setitem(BENCHMARKS, "invented", benchmark(EXACT, items(2)))
    found = answered(BENCHMARKS["invented"], small, plan(tmp_path))
    path = tmp_path / "invented" / "report.json"
    path.write_text(text)
    assert rescore(tmp_path / "invented") == {**found, "run": {}}
    assert load(path, WHOLE)["figures"] == found["figures"]


def test_runs_of_other_versions_are_told(small: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose files lack what this version needs is one line, not a traceback."""
    monkeypatch.setitem(BENCHMARKS, "invented", benchmark(EXACT, items(2)))
    answered(BENCHMARKS["invented"], small, plan(tmp_path))
    path = tmp_path / "invented" / "run.json"
    path.write_text(json.dumps({"benchmark": "invented"}))
    with one_line_error(DataError, "lacks data"):
        rescore(tmp_path / "invented")
    path = tmp_path / "invented" / "report.json"
    for text, says in (("[]", "no report of this version"), ("{", "is no report"), ('{"run": {}}', "eval score")):
        path.write_text(text)
        with one_line_error(DataError, says):
            load(path, WHOLE)


def test_examples_are_the_same_for_everybody(small: Pipeline) -> None:
    """Few-shot examples come from the seed and the item alone, differ from item to item, and never show its picture."""
    assert small.engine is not None
    shots = [replace(one, id=f"shot {one.id}") for one in items(40)]
    asker = Asker(small, small.engine, VQA, shots=shots, few_shot=4, seed=3)
    drawn = {one.id: [shot.id for shot in asker.examples(one)] for one in items(20)}
    again = Asker(small, small.engine, VQA, shots=shots, few_shot=4, seed=3)
    assert drawn == {one.id: [shot.id for shot in again.examples(one)] for one in reversed(items(20))}
    assert all(len(set(found)) == 4 for found in drawn.values())
    assert len({tuple(found) for found in drawn.values()}) > 15
    for one in items(20):
        assert not {picture for shot in asker.examples(one) for picture in shot.pictures} & set(one.pictures)
    other = Asker(small, small.engine, VQA, shots=shots, few_shot=4, seed=4)
    assert [shot.id for shot in other.examples(items(1)[0])] != drawn["q0"]


def test_examples_change_the_answers_and_are_noted(small: Pipeline, tmp_path: Path) -> None:
    """With `few_shot`, each answer names its examples, which come from the data's training split."""
    (tmp_path / "shots.jsonl").touch()
    asked = benchmark(EXACT, items(3), shots=[replace(one, id=f"shot {one.id}") for one in items(12)[6:]])
    found = answered(asked, small, replace(plan(tmp_path / "out", few_shot=2), data=tmp_path))
    assert all(len(row["shots"]) == 2 for row in found["answers"])
    with one_line_error(DataError, "7 examples", "there are 6"):
        answered(asked, small, replace(plan(tmp_path / "more", few_shot=7), data=tmp_path))
    with one_line_error(DataError, "few-shot examples come from"):
        answered(benchmark(EXACT, items(3)), small, replace(plan(tmp_path / "none", few_shot=1), data=tmp_path))
