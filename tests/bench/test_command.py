"""`qwenvl bench`, from the command line to the last line of JSON."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from commands import outside

from qwenvl import cli, loading
from qwenvl.bench import report, runner
from qwenvl.bench.command import EPILOG
from qwenvl.bench.figures import TARGETS, Event, Facts, Figure
from qwenvl.bench.jobs import Job
from qwenvl.bench.plan import OF_AN_ENGINE, PARTS, TINY, Budget

CPU = Facts({"device": "a CPU", "torch": "2", "dtype": "float32", "kind": "cpu"})


class Jobs:
    """In place of processes: notes what is asked for, and says one figure a job."""

    def __init__(self) -> None:
        self.apart: list[Job] = []
        self.here: list[Job] = []
        self.fails = ""
        self.takes: Callable[[float], object] = lambda limit: limit  # what a job does of the time that it may take

    def run(self, job: Job) -> Iterator[Event]:
        """The device's facts and limits, else a figure, but none of writing; a failure where that is asked for."""
        if job.kind == "device":
            yield Facts(CPU.about if job.dtype == "auto" else {**CPU.about, "dtype": job.dtype})
            yield Figure("device", "device", "copy", 10.0, "GB/s")
            yield Figure("device", "device", "read", 20.0, "GB/s")
            yield Figure("device", "device", "product", 2.0, "TFLOP/s")
        elif job.kind == self.fails:
            yield job.missing("it broke")
        elif job.kind != "write":
            yield Figure(job.part, job.subject, job.kind, 1.0, "s")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    """No process, no checkout's results."""
    new = Jobs()
    for name, noted in (("run_apart", new.apart), ("run_here", new.here)):

        def run(job: Job, limit: float = 0.0, noted: list[Job] = noted) -> Iterator[Event]:
            new.takes(limit)
            noted.append(job)
            yield from new.run(job)

        monkeypatch.setattr(runner, name, run)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results" / "bench.jsonl")
    (tmp_path / "results").mkdir()
    return new


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command here; returns its status, what it printed, and its remarks."""
    try:
        status = cli.main(["bench", *words])
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_tiny_runs_every_part() -> None:
    """`make bench` without a GPU: all parts once on the embedded model and on packed weights; the last line is JSON."""
    done = outside("bench", "--tiny")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    measured = {(figure["part"], figure["subject"]) for figure in result["figures"]}
    assert measured >= {(part, kind) for part in TINY.parts[:-1] for kind in ("float32", "int4")}
    assert result["failed"] == []
    if "transformers" not in {part for part, _ in measured}:
        (told,) = (one for one in result["left_out"] if one["part"] == "transformers")
        assert told["reason"] == "it is not installed here"
    assert result["mode"] == "tiny"
    limited = {figure["part"] for figure in result["figures"] if figure.get("fraction")}
    assert limited == {"encode", "prefill", "first-token", "decode", "batch"}
    assert len({len(line) for line in table if " tok/s " in line}) == 1  # columns are aligned
    assert "Traceback" not in done.stderr


def test_a_full_run(jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of weights, each in processes of its own, the bars' parts first; limits reach them; one line is added.

    `--device cpu` asks for the published shape where there is no GPU.
    """
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda _: None)
    status, out, _ = bench(capsys, "--device", "cpu")
    assert status == 0
    assert [(job.kind, job.subject) for job in jobs.apart] == [
        ("device", "device"),
        *(("model", kind) for kind in ("float32", "int4")),
        *((kind, name) for name in ("float32", "int4") for kind in ("write", "start")),
        *(("compile", kind) for kind in ("float32", "int4")),
    ]
    assert jobs.here == []
    assert {job.limits for job in jobs.apart[1:]} == {type(jobs.apart[1].limits)(20e9, 2e12)}
    result = json.loads(out.splitlines()[-1])
    assert json.loads(report.RESULTS.read_text()) == result
    starts = [figure for figure in result["figures"] if figure["part"] == "start-up"]
    assert len(starts) == 2
    assert (result["mode"], result["weights"]) == ("full", "random")


def test_an_engine(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """Its parts in place of the others, on both kinds of weights, in a process of each; and any of them by name."""
    status, *_ = bench(capsys, "--device", "cpu", "--engine", "--quick")
    assert status == 0
    assert [(job.kind, job.subject) for job in jobs.apart] == [
        ("device", "device"),
        ("model", "float32"),
        ("model", "int4"),
    ]
    assert {job.plan.parts for job in jobs.apart} == {OF_AN_ENGINE}
    assert json.loads(report.RESULTS.read_text())["mode"] == "quick"
    jobs.apart.clear()
    bench(capsys, "--device", "cpu", "--no-save", "--only", "steady", "decode")
    assert {job.kind for job in jobs.apart} == {"device", "model"}
    assert jobs.apart[1].plan.parts == ("steady", "decode")


def test_json_alone(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json stdout is one object; --no-save adds nothing."""
    status, out, _ = bench(capsys, "--json", "--device", "cpu", "--no-save", "--only", "decode")
    assert status == 0
    assert len(json.loads(out)["figures"]) == 3 + 2
    assert len(jobs.apart) == 3
    assert not report.RESULTS.exists()


def test_a_job_that_fails(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1, one line, and all else is measured; a comparison that fails costs no status."""
    jobs.fails = "model"
    status, out, _ = bench(capsys, "--device", "cpu", "--no-save")
    assert status == 1
    assert out.count("FAILED: it broke") == 2
    assert {job.kind for job in jobs.apart} >= {"start", "compile"}
    jobs.fails = "compile"
    status, out, _ = bench(capsys, "--device", "cpu", "--no-save")
    assert status == 0
    assert out.count("compile: left out: it broke") == 2


@pytest.mark.parametrize(("words", "minutes"), [([], 8), (["--quick"], 2)], ids=["full", "quick"])
def test_hanging_jobs_end_in_time(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], minutes: int
) -> None:
    """Where every process has to be stopped, the whole is over within the minutes that the documents promise."""
    now = [0.0]

    def hang(limit: float) -> None:
        now[0] += limit

    jobs.takes = hang
    monkeypatch.setattr(runner, "Budget", partial(Budget, clock=lambda: now[0]))
    bench(capsys, *words, "--device", "cpu", "--no-save")
    assert 0 < now[0] <= 60 * minutes


def test_no_room_for_a_checkpoint(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to do about it, and nothing is written or started."""
    monkeypatch.setattr(runner, "_roomy", lambda _: None)
    status, out, _ = bench(capsys, "--device", "cpu", "--no-save", "--only", "start-up")
    assert status == 1
    assert "start-up: FAILED: there is no room for a checkpoint of 42.49 GB; set TMPDIR to a larger disk" in out
    assert {job.kind for job in jobs.apart} == {"device"}


def test_a_checkpoint_that_was_not_written_is_not_started(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """Why there is none is told once, not again as a start that found nothing."""
    jobs.fails = "write"
    _, out, _ = bench(capsys, "--device", "cpu", "--no-save", "--only", "start-up")
    assert out.count("start-up: FAILED: it broke") == 2
    assert {job.kind for job in jobs.apart} == {"device", "write"}


def test_where_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In memory where that has room for it and for the model that is loaded, else on the disk, else nowhere."""
    free = {"disk": 1000, "memory": 2000}
    monkeypatch.setattr(runner, "IN_MEMORY", tmp_path)
    monkeypatch.setattr(runner, "free_memory", lambda: free["memory"])
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: argparse.Namespace(free=free["disk"]))
    assert runner._roomy(999) == tmp_path
    free["memory"] = 1500
    assert runner._roomy(999) == Path(tempfile.gettempdir())
    assert runner._roomy(1000) is None


def test_no_time_left(jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is no time for is not begun, and told; the device is measured all the same."""
    monkeypatch.setattr(runner.Budget, "left", property(lambda _: 1.0 if jobs.apart else 460.0))
    status, out, _ = bench(capsys, "--device", "cpu", "--no-save", "--only", "decode", "compile")
    assert status == 1
    assert out.count("weights: FAILED: there was no time left") == 2
    assert out.count("compile: left out: there was no time left") == 2


def test_a_laptop_gets_the_small_sizes(
    jobs: Jobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU the published shape would take hours: what --tiny does is measured, and a line says so."""
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: False)
    status, out, err = bench(capsys, "--quick")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["mode"] == "tiny"
    assert err.count("\n") == 1
    assert "--device cpu measures Qwen-VL's shape" in err
    assert {job.device for job in (*jobs.here, *jobs.apart)} == {"cpu"}
    assert {job.kind for job in jobs.apart} == {"start"}  # from a fresh process, however small
    assert not report.RESULTS.exists()


def test_a_checkpoint_is_measured_as_it_is(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    """Only its own weights, loaded by `load`; a dtype that is given is kept to."""
    bench(capsys, "--model", "tiny", "--dtype", "bfloat16", "--no-save", "--only", "decode", "start-up")
    device, model, start = jobs.apart
    assert Path(model.weights.folder).is_dir()
    assert start.weights == model.weights
    assert device.dtype == model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "decoding"], "invalid choice: 'decoding'"),
        (["--tiny", "--quick"], "not allowed with argument"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--dtype", "float32", "--int4"], "not allowed with argument"),
        (["--model", "tiny", "--int4"], "a checkpoint has the bits that it has (see qwenvl quantize)"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--tiny", "--device", "cuda:9"], "there is no device cuda:9 to use"),
        (["--tiny", "--device", "gpu"], "device 'gpu' is not one; use auto"),
    ],
    ids=" ".join,
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what is wrong, status 2, and nothing measured."""
    status, out, err = bench(capsys, *words)
    assert status == 2
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """All that --only takes, and what a machine without a GPU gets."""
    status, out, _ = bench(capsys, "--help")
    assert status == 0
    for parts in (PARTS, OF_AN_ENGINE):
        assert ",".join(parts).replace("-", "") in "".join(out.split()).replace("-", "")
    assert "Without a GPU" in out


def test_the_documents_commands() -> None:
    """Every `qwenvl bench` that docs/benchmark.md and the help name is one that the parser takes."""
    document = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    lines = re.findall(r"qwenvl (bench\b[^#`\n]*)", document + EPILOG)
    assert len(lines) > 10
    for line in lines:
        cli._parser().parse_args(line.strip(" ,.:;").split())


def test_the_documents_bars() -> None:
    """The table of docs/benchmark.md has the numbers that figures are held against."""
    document = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:-1] for row in document.splitlines() if "unmeasured |" in row]
    told = {tuple(re.findall(r"\d[\d.,]*", f"{published} {bar} {aim}")) for _, published, bar, aim, _ in rows}
    targets = (t for (_, name), t in TARGETS.items() if t.published or not name.startswith("peak"))  # told at 2048 once
    held = {tuple(f"{x:g}" for x in (t.published, t.bar, t.aim) if x) for t in targets}
    assert {tuple(f"{float(x.replace(',', '')):g}" for x in row) for row in told} == held
