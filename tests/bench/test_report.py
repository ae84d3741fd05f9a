"""What is printed and what is written down, from figures made up here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenvl.bench.figures import Event, Facts, Figure, Missing, Target, target
from qwenvl.bench.report import Report, append
from qwenvl.config import QwenVLConfig
from qwenvl.training.memory import QWEN_VL

H100 = Facts({"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu128", "dtype": "bfloat16", "kind": "cuda"})
CPU = Facts({"device": "a CPU, 2 threads", "torch": "2.13.0+cpu", "dtype": "float32", "kind": "cpu"})
DECODE = Figure("decode", "bfloat16", "decode 1792", 140.0, "tok/s", limit=200.0, limited_by="memory", warm_up=1.5)
ENCODE = Figure("encode", "bfloat16", "encode one image", 12.0, "ms", limit=6.0, limited_by="matmul")
COPY = Figure("device", "device", "memory copy", 3000.0, "GB/s")


def report(*events: Event, config: QwenVLConfig = QWEN_VL, table: bool = True) -> Report:
    """One that has heard these."""
    new = Report("full", "random", config, seconds=60, table=table, quiet=True)
    with new:
        for event in events:
            new.add(event)
    return new


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One row a figure, its columns under their heads: value, fraction and what limits, warm-up, published, bar."""
    report(H100, COPY, "being measured", DECODE, ENCODE)
    device, head, *rows = capsys.readouterr().out.splitlines()
    assert device.startswith("NVIDIA H100 80GB HBM3, torch 2.11.0+cu128, ")
    assert head.split("  ")[-1].strip() == "bar (aim) on H100"
    assert [row.split() for row in rows] == [
        ["device"],
        ["memory", "copy", "3000", "GB/s"],
        ["bfloat16"],
        ["decode", "1792", "140", "tok/s", "70%", "memory", "1.50", "s", "28.87", ">=", "128", "(170)", "passed"],
        ["encode", "one", "image", "12", "ms", "50%", "matmul", "<=", "9", "MISSED"],
    ]
    decode, encode = rows[3], rows[4]
    assert decode.index("tok/s") == encode.index("ms")
    assert decode.index(">=") == encode.index("<=") == head.index("bar")
    assert decode.index("28.87") + len("28.87") == head.index("on A100") + len("on A100")


def test_the_json() -> None:
    """What a script reads: figures with unit, limit, fraction, what they are held against, and what is missing."""
    gone = Missing("batch", "int4", "out of memory", failed=True)
    absent = Missing("transformers", "transformers", "it is not installed here", failed=False)
    result = json.loads(json.dumps(report(H100, DECODE, ENCODE, COPY, gone, absent, table=False).result(12.34)))
    decode, encode, copy = result.pop("figures")
    assert decode == {
        "part": "decode",
        "subject": "bfloat16",
        "name": "decode 1792",
        "value": 140.0,
        "unit": "tok/s",
        "limit": 200.0,
        "limited_by": "memory",
        "warm_up": 1.5,
        "whole": True,
        "fraction": 0.7,
        "published": 28.87,
        "bar": 128,
        "aim": 170,
        "passed": True,
    }
    assert (encode["fraction"], encode["passed"]) == (0.5, False)
    assert set(copy) == {"part", "subject", "name", "value", "unit", "whole"}
    assert result.pop("failed") == [
        {"part": "batch", "subject": "int4", "reason": "out of memory", "failed": True},
    ]
    assert [missing["part"] for missing in result.pop("left_out")] == ["transformers"]
    assert set(result) == {
        *("bench", "date", "version", "commit", "mode", "weights", "seconds"),
        *("device", "torch", "dtype", "kind"),
    }
    assert result["seconds"] == 12.3


def test_bars_are_for_an_h100_and_the_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Elsewhere a bar is shown and not judged, nor where a run was cut; a model of other sizes has none."""
    cut = Figure("decode", "bfloat16", "decode 1792", 100.0, "tok/s", whole=False)
    for events in ((CPU, DECODE), (H100, cut)):
        assert "passed" not in report(*events).result(1)["figures"][0]
        assert capsys.readouterr().out.rstrip().endswith(">= 128 (170)")
    small = QwenVLConfig(**{**vars(QWEN_VL), "num_hidden_layers": 4})
    assert "bar" not in report(H100, DECODE, config=small).result(1)["figures"][0]
    assert target(DECODE, small) == Target()


def test_bars_of_a_cpu_are_for_any_model(capsys: pytest.CaptureFixture[str]) -> None:
    """There they are passed or missed; on a GPU they are shown, and an H100's bars are not a CPU's."""
    small = QwenVLConfig(**{**vars(QWEN_VL), "num_hidden_layers": 4})
    soon = Figure("second-round", "float32", "second round, how much sooner", 4.5, "x")
    slow = Figure("throughput", "float32", "8 at once to one at a time", 2.9, "x")
    for config in (small, QWEN_VL):
        figures = report(CPU, soon, slow, config=config).result(1)["figures"]
        assert [(figure["bar"], figure["passed"]) for figure in figures] == [(4, True), (3, False)]
    out = capsys.readouterr().out
    assert ">= 4, cpu passed" in out
    assert ">= 3, cpu MISSED" in out
    assert "passed" not in report(H100, soon).result(1)["figures"][0]
    steady = Figure("steady", "bfloat16", "32 rows decoding", 2500.0, "tok/s")
    assert report(H100, steady).result(1)["figures"][0]["passed"]
    assert "passed" not in report(CPU, steady).result(1)["figures"][0]


def test_what_is_missing_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure stands out from what was left out, and only a failure makes the benchmark fail."""
    left_out = report(CPU, Missing("compile", "int4", "there is no g++", failed=False))
    assert capsys.readouterr().out.endswith("int4\n  compile: left out: there is no g++\n")
    assert not left_out.failed
    assert report(CPU, Missing("batch", "int4", "out of memory", failed=True)).failed
    assert "  batch: FAILED: out of memory\n" in capsys.readouterr().out


def test_results_are_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line more each time; nothing where there is no such folder; a disk that says no costs a remark."""
    path = tmp_path / "bench.jsonl"
    for seconds in (1, 2):
        append(report(CPU, COPY, table=False).result(seconds), path)
    assert [json.loads(line)["seconds"] for line in path.read_text().splitlines()] == [1, 2]
    append({}, tmp_path / "nowhere" / "bench.jsonl")
    assert not (tmp_path / "nowhere").exists()
    append({}, tmp_path)
    assert "the result was not added to" in capsys.readouterr().err
