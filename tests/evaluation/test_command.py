"""`qwenvl eval`: from a command line to tables, files and a picture; mistakes are one line."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_data import DATA, copied
from commands import Run
from PIL import Image

import qwenvl
from qwenvl.evaluation.catalogue import BENCHMARKS
from qwenvl.evaluation.command import _longest
from qwenvl.evaluation.endpoint import OpenAIJudge

pytest_plugins = ("command_fixtures",)


@pytest.fixture(autouse=True)
def _engine_of_its_own(shared: qwenvl.Pipeline) -> Iterator[None]:
    """Other tests' pipeline has the engine that it had."""
    before = shared.engine
    yield
    shared.engine = before


def evaluated(run: Run, *arguments: str) -> tuple[str, str]:
    """What the command prints on both streams, when it succeeds."""
    status, out, err = run("eval", *arguments)
    assert status == 0, err
    return out, err


def test_run_score_report(run: Run, tmp_path: Path) -> None:
    """The embedded model's benchmark in one command; then its scores anew, tables by skill and language, a plot."""
    out, err = evaluated(run, "run", "tiny", "tiny_grounding", "--limit", "44", "--out", str(tmp_path / "runs" / "a"))
    assert "| Small model: skills | accuracy |" in out
    assert "44 items of 6,600 (*)" in out
    assert str(tmp_path / "runs" / "a") in err
    again, _ = evaluated(run, "score", str(tmp_path / "runs"))
    assert again == out
    told, err = evaluated(run, "report", str(tmp_path / "runs"))
    assert told.startswith(out.rstrip())
    assert "| colour | 100.00 (100.00 to 100.00) | 100.00 (100.00 to 100.00) |" in told
    assert "|  | English, tiny | Chinese, tiny |" in told
    plot = tmp_path / "runs" / "radar.png"
    assert str(plot) in err
    with Image.open(plot) as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_json_for_scripts(run: Run, tmp_path: Path) -> None:
    """With --json each part prints one JSON document and nothing else."""
    listed = json.loads(evaluated(run, "list", "--json")[0])
    assert {one["name"] for one in listed} > {"nocaps", "mme", "touchstone_cn", "refcocog_test", "tiny"}
    answered = json.loads(
        evaluated(run, "run", "refcoco_val", "--data", str(DATA), "--out", str(tmp_path), "--json")[0]
    )
    assert answered[0]["figures"][0]["published"] == {"Qwen/Qwen-VL": 89.36, "Qwen/Qwen-VL-Chat": 88.55}
    assert json.loads(evaluated(run, "score", str(tmp_path), "--json")[0]) == answered
    reported = json.loads(evaluated(run, "report", str(tmp_path), "--json")[0])
    assert reported == {"reports": answered, "plot": None}


def test_prepare_says_whether_the_data_are_whole(run: Run, tmp_path: Path) -> None:
    """Status 1 and what is missing, how large it is and where it is published; 0 for what is whole."""
    status, out, _ = run("eval", "prepare", "refcoco_val", str(tmp_path))
    assert status == 1
    assert "refcoco_val.jsonl: missing" in out
    assert "http://images.cocodataset.org/zips/train2014.zip (13 GB)" in out
    status, out, _ = run("eval", "prepare", "table6", str(DATA), "--json", "--quiet")
    assert status == 1
    assert [one["items"] for one in json.loads(out)] == [5] * 9
    assert evaluated(run, "prepare", "ocrvqa_test", str(DATA))[0].startswith(f"ocrvqa_test in {DATA}: ready")


def test_a_list_for_people(run: Run) -> None:
    """Every benchmark in a line, with its name, size and the paper's figures."""
    lines = evaluated(run, "list")[0].splitlines()
    assert "RefCOCO+ testB" in next(line for line in lines if line.startswith("refcoco+_testB"))
    assert next(line for line in lines if line.startswith("mme ")).endswith("Perception 1487.58; Cognition 360.71")
    assert max(map(len, lines)) <= 120


def test_judge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to TouchStone are judged by another model, in both orders, and the report has the scores then."""
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    asked: list[Any] = []

    def judged(_judge: OpenAIJudge, messages: Any) -> str:
        asked.append(messages)
        return "8 6\nbecause" if len(asked) > 1 else "so good"

    monkeypatch.setattr(OpenAIJudge, "__call__", judged)
    before, _ = evaluated(run, "run", "touchstone_cn", "--data", str(DATA), "--out", str(tmp_path))
    assert "not judged yet" in before
    folder = str(tmp_path / "touchstone_cn")
    command = ("judge", folder, "--model", "gpt-4", "--key", "JUDGE_KEY", "--threads", "1", "--quiet")
    status, out, _ = run("eval", *command)
    assert status == 1, "one round has no verdict"
    assert len(asked) == 10
    assert "两位助手" in asked[0][0]["content"]
    assert "| TouchStone, Chinese | score | " in out
    assert "401.2" in out
    assert "1 rounds without a verdict (no two numbers)" in out
    again, _ = evaluated(run, *command)
    assert len(asked) == 11, "only the round without scores is asked again"
    assert "rounds without" not in again
    found = json.loads((tmp_path / "touchstone_cn" / "report.json").read_bytes())
    assert [round(one["value"], 6) for one in found["figures"]] == [700, 700]
    assert "a-key-of-the-judge" not in (tmp_path / "touchstone_cn" / "judgements.jsonl").read_text()


def test_flags_reach_what_they_are_for(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed, rows and time-out are those that were given; a row holds a video's frames and examples; what is wrong with
    the data is fatal unless it is to be skipped.
    """
    engines: list[Any] = []
    start = qwenvl.Pipeline.start_engine

    def started(self: qwenvl.Pipeline, rows: int | None = None, **named: Any) -> Any:
        engines.append((rows, named["max_length"]))
        return start(self, rows, **named)

    monkeypatch.setattr(qwenvl.Pipeline, "start_engine", started)
    flags = ("--seed", "5", "--rows", "3", "--data", str(DATA), "--json")
    (found,) = json.loads(evaluated(run, "run", "okvqa_val", *flags, "--out", str(tmp_path / "a"))[0])
    assert (found["settings"]["seed"], found["settings"]["few_shot"], engines[0][0]) == (5, 0, 3)

    data = copied(tmp_path / "data", "okvqa", "coco")
    next((data / "coco" / "val2014").iterdir()).unlink()
    wrong = ("run", "okvqa_val", "--data", str(data), "--out", str(tmp_path / "b"))
    status, _, err = run("eval", *wrong)
    assert status == 2
    assert "1 x missing picture" in err
    assert "1 left out" in evaluated(run, *wrong, "--on-error", "skip")[0]

    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    waited: list[float] = []
    monkeypatch.setattr(OpenAIJudge, "__init__", lambda _self, _url, _model, _key, timeout: waited.append(timeout))
    command = ("judge", str(tmp_path / "a" / "okvqa_val"), "--model", "x", "--key", "JUDGE_KEY", "--timeout", "7")
    assert run("eval", *command)[0] == 2
    assert waited == [7]


def test_rows_hold_videos_and_examples(shared: qwenvl.Pipeline) -> None:
    """A row has the trained length, or more for four frames and for examples, and never more than the positions."""
    config = dataclasses.replace(shared.config, seq_length=2048, max_position_embeddings=8192)
    config = dataclasses.replace(config, visual=dataclasses.replace(config.visual, n_queries=256))
    real: Any = SimpleNamespace(config=config)
    of = {name: [BENCHMARKS[name]] for name in ("okvqa_val", "seed_video")}
    assert _longest(of["okvqa_val"], real, 0) == 2048
    assert _longest(of["seed_video"], real, 0) == 2056
    assert _longest(of["okvqa_val"], real, 4) == 5 * (258 + 512) + 512
    assert _longest(of["okvqa_val"], real, 32) == 8192


def test_items_without_an_answer_are_not_judged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge is not asked about a picture that could not be shown: it would score an empty answer."""
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    monkeypatch.setattr(OpenAIJudge, "__call__", lambda *_: "8 8")
    evaluated(run, "run", "touchstone_en", "--data", str(DATA), "--out", str(tmp_path), "--quiet")
    folder = tmp_path / "touchstone_en"
    answers = folder / "answers-0.jsonl"
    first, *rest = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join([json.dumps({"id": json.loads(first)["id"], "error": "broken"}) + "\n", *rest]))
    evaluated(run, "judge", str(folder), "--model", "x", "--key", "JUDGE_KEY", "--quiet")
    assert len((folder / "judgements.jsonl").read_text().splitlines()) == 2 * len(rest)


def test_scores_are_of_one_judge(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that was stopped half-way left a mean of its scores and those of the judge before it."""
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-the-judge")
    monkeypatch.setattr(OpenAIJudge, "__call__", lambda *_: "8 8")
    evaluated(run, "run", "touchstone_en", "--data", str(DATA), "--out", str(tmp_path), "--quiet")
    folder = tmp_path / "touchstone_en"
    for model in ("first", "second"):
        evaluated(run, "judge", str(folder), "--model", model, "--key", "JUDGE_KEY", "--threads", "1", "--quiet")
    path = folder / "judgements.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:13]))
    (found,) = json.loads(evaluated(run, "score", str(folder), "--json")[0])
    assert found["run"]["judge"] == "second"
    assert len(found["odd"]["rounds without a verdict (not asked)"]) == 7
    assert sum(1 for row in found["answers"] if "score" in row) == 2
    answers = folder / "answers-0.jsonl"
    answers.write_text(
        "".join(
            json.dumps({**json.loads(line), "answer": "Other."}) + "\n" for line in answers.read_text().splitlines()
        )
    )
    (found,) = json.loads(evaluated(run, "score", str(folder), "--json")[0])
    assert not found["figures"], "verdicts on other answers are not these answers' scores"


def test_a_comparison_of_runs(run: Run, tmp_path: Path) -> None:
    """Runs of two models over the same questions stand side by side, with the difference item by item."""
    evaluated(run, "run", "tiny_grounding", "--limit", "6", "--out", str(tmp_path / "first"))
    evaluated(run, "run", "tiny_grounding", "--limit", "6", "--out", str(tmp_path / "second"))
    path = tmp_path / "second" / "tiny_grounding" / "report.json"
    other = json.loads(path.read_bytes())
    other["settings"] |= {"model": "somewhere/tiny-int4", "bits": 4}
    other["answers"][0] |= {"answer": "no box", "score": 0.0}
    path.write_text(json.dumps(other))
    told, _ = evaluated(run, "report", str(tmp_path), "--plot", str(tmp_path / "none.png"))
    assert "| benchmark | figure | tiny | tiny-int4 |" in told
    assert "| Small model: phrases | tiny-int4 | -16.67 (" in told
    assert "| 83.3% |" in told
    assert not (tmp_path / "none.png").exists(), "two subtasks are no radar"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run nothing", "there is no benchmark nothing"),
        ("run refcoco_val", "refcoco_val needs --data"),
        ("run refcoco_val --data nowhere", "there is no folder nowhere"),
        ("run refcoco_val --data .", "should have refcoco_val.jsonl"),
        ("run tiny --limit 0", "--limit must be 1 or more"),
        ("run tiny --few-shot -1", "--few-shot must be 0 or more"),
        ("run tiny --few-shot 2", "few-shot examples come from"),
        ("run tiny --rows 0", "--rows must be 1 or more"),
        ("run tiny --limit 1 --model nothing", "there is no folder nothing"),
        ("run tiny --out file/out --limit 1", "cannot write to file/out"),
        ("score nowhere", "there is no run in nowhere"),
        ("report .", "there is no run in ."),
        ("judge . --model x", "OPENAI_API_KEY"),
        ("judge . --model x --key KEY", "has no run"),
        ("judge . --model x --key KEY --template missing.txt", "cannot read missing.txt"),
        ("judge . --model x --key KEY --timeout 0", "--timeout must be more than 0"),
        ("prepare nothing .", "there is no benchmark nothing"),
        ("", "required: part"),
        ("run", "required: benchmark"),
    ],
)
def test_mistakes(arguments: str, says: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what is wrong, status 2, and no file is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "any")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "file").touch()
    status, out, err = run("eval", *arguments.split())
    lines = [line for line in err.splitlines() if not line.startswith("tiny: a demonstration")]
    assert status == 2
    assert out == ""
    assert len(lines) == 1, err
    assert says in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_table_leaves_out_what_cannot_be_run(
    run: Run, tmp_path: Path, shared: qwenvl.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Benchmarks of a table without files, or for chat checkpoints alone, are told and left out; named, they end it."""
    copied(tmp_path / "data", "seed_bench", "mme")
    raw = replace(shared.generation_config, chat_format="raw")
    monkeypatch.setattr(shared, "generation_config", raw)
    where = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--limit", "2")
    out, err = evaluated(run, "run", "table7", *where)
    told = [line.partition(": ")[2] for line in err.splitlines() if line.startswith("left out: ")]
    assert [line.split()[0].rstrip(":") for line in told] == ["touchstone_en", "touchstone_cn", "mme"]
    assert "| SEED-Bench, all | accuracy |" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["seed_image", "seed_video"]
    for name, says in (("mme", "asks in ChatML"), ("touchstone_cn", "should have")):
        status, _, err = run("eval", "run", "table7", name, *where)
        assert status == 2
        assert says in err.splitlines()[-1]
    status, _, err = run("eval", "run", "table6", *where)
    assert status == 2
    assert "none of these benchmarks" in err.splitlines()[-1]
