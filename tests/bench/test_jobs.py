"""Jobs in processes of their own: what they say arrives, and how they end takes nothing with it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import bench_children as children
import pytest

from qwenvl.bench import jobs
from qwenvl.bench.device import Device
from qwenvl.bench.figures import Event, Figure, Missing
from qwenvl.bench.jobs import Job, Kind, Weights, perform, run_apart
from qwenvl.bench.plan import TINY
from qwenvl.config import QuantizationConfig, QwenVLConfig
from qwenvl.weights.hub import embedded

CONFIG = QwenVLConfig.load(embedded("tiny"))


def job(kind: Kind = "model", **changes: object) -> Job:
    """One for the small model."""
    return Job(kind, TINY, Weights(CONFIG, str(embedded("tiny"))), "cpu", "float32", **changes)  # type: ignore[arg-type]


def test_what_a_process_says_arrives(capfd: pytest.CaptureFixture[str]) -> None:
    """Events in their order; whatever else it prints goes to stderr, for stdout is a table or JSON."""
    assert list(run_apart(job(), 60, children.speak)) == [children.BEFORE, "something to come"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "a library's remark" in err


def test_a_process_that_dies() -> None:
    """What it had said stays, and one line says how it ended."""
    assert list(run_apart(job(), 60, children.crash)) == [
        children.BEFORE,
        Missing("weights", "float32", "its process ended by signal 9", failed=True),
    ]


def test_a_process_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped when its time is up, and so is whatever it had started."""
    events = run_apart(job("compile"), 60, children.hang)
    first = next(events)
    assert isinstance(first, Figure)
    real = time.perf_counter
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: real() + 60)
    assert list(events) == [Missing("compile", "float32", "it was stopped after 60 s, its time was up", failed=False)]
    for _ in range(500):  # until whoever adopts orphans has buried it
        if not _runs(int(first.value)):
            break
        time.sleep(0.02)
    assert not _runs(int(first.value))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_reader_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or an error while printing: the process is stopped, too."""
    stopped: list[int | None] = []
    stop = jobs._stop

    def noted(process: jobs.SpawnProcess) -> None:
        stop(process)
        stopped.append(process.exitcode)

    monkeypatch.setattr(jobs, "_stop", noted)
    events = run_apart(job(), 60, children.hang)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert stopped == [-9]


def test_names_of_jobs() -> None:
    """A figure's subject is its bits where weights are packed, else the dtype; a job that fails misses its part."""
    packed = Weights(QwenVLConfig(**{**vars(CONFIG), "quantization_config": QuantizationConfig(8)}))
    assert Job("model", TINY, packed, "cpu", "bfloat16").subject == "int8"
    assert job().missing("no").part == "weights"
    assert job("write").missing("no") == Missing("start-up", "float32", "no", failed=True)
    assert job("transformers").missing("no") == Missing("transformers", "transformers", "no", failed=False)


def test_a_bug_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place where it happened; its traceback goes to stderr. A comparison's bug is no failure of ours."""

    def broken(*_: object) -> Iterator[Event]:
        raise ValueError("two\nlines")

    for kind, failed in (("model", True), ("transformers", False)):
        monkeypatch.setitem(jobs._KINDS, kind, broken)
        (missing,) = perform(job(kind))  # type: ignore[arg-type]
        assert isinstance(missing, Missing)
        assert missing.reason.startswith("ValueError: two lines (test_jobs.py, line ")
        assert missing.failed is failed
        assert ("Traceback" in capsys.readouterr().err) is failed


def test_time_to_start_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are those since the job was made: a process that took 20 of 60 to start has 40."""
    left: list[float] = []

    def note(_: Job, device: Device, end: float) -> Iterator[Event]:
        left.append(end - device.clock())
        yield "done"

    monkeypatch.setitem(jobs._KINDS, "model", note)
    list(perform(job(seconds=60.0, begun=time.time() - 20)))
    assert left[0] == pytest.approx(40, abs=1)
