"""What the documents say of the server is so: examples run against one, tables have what there is, no more, no less."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import httpx
import pytest
from servers import Running, running
from test_docs import blocks, prose, read

import qwenvl
from qwenvl.cli import _parser
from qwenvl.serving.command import FLAGS
from qwenvl.serving.schema import ChatRequest, CompletionRequest, GroundingRequest
from qwenvl.serving.settings import Settings

SERVING, DEPLOYMENT = "docs/serving.md", "docs/deployment.md"
SHOWN = "http://127.0.0.1:8000"  # where the documents' server is


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    """The server that the documents speak of, but for its port."""
    with running(qwenvl.load("tiny", device="cpu", quiet=True)) as server:
        yield server


def rows_of(document: str, heading: str) -> list[list[str]]:
    """The cells of the table rows between a heading and the next, without those that head and rule the columns."""
    _, _, after = prose(document).partition(f"\n## {heading}\n")
    lines = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("|")]
    ruled = [number for number, line in enumerate(lines) if set(line) <= set("|-")]
    heads = {number - 1 for number in ruled}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for number, line in enumerate(lines)
        if number not in heads and number not in ruled
    ]


def test_examples_in_python(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader can paste them one after the other; each line `# -> text` is what the block above it prints."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    names: dict[str, Any] = {}
    assert SHOWN in blocks(SERVING, "python")[0]
    for number, block in enumerate(blocks(SERVING, "python"), 1):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block.replace(SHOWN, tiny.url), f"{SERVING}, python block {number}", "exec"), names)
        promised = re.findall(r"^ *# -> (.*)$", block, re.MULTILINE)
        assert promised == [line for line in output.getvalue().splitlines() if line in promised]


@pytest.mark.parametrize("document", [SERVING, DEPLOYMENT])
def test_examples_in_a_shell(document: str, tiny: Running) -> None:
    """Commands of ours are ones that we take; what others are told of us is answered."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "qwenvl":
            _parser().parse_args(arguments)
        else:
            assert program == "curl"
            if shutil.which("curl"):
                command = [program, *(argument.replace(SHOWN, tiny.url) for argument in arguments), "--noproxy", "*"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
                assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_every_field_is_told() -> None:
    """The tables of fields, and the line on grounding, name those that the API has."""
    tables = rows_of(SERVING, "What can be asked")
    told = {name for cells in tables for name in re.findall(r"`(\w+)`", cells[0])}
    told |= set(re.findall(r"`(\w+)`", next(line for line in prose(SERVING).splitlines() if "Of grounding:" in line)))
    assert told == {*ChatRequest.model_fields, *CompletionRequest.model_fields, *GroundingRequest.model_fields}


def test_every_path_is_told(tiny: Running) -> None:
    """The table of paths has those of the OpenAPI document."""
    cells = [name for cells in rows_of(SERVING, "What can be asked") for name in re.findall(r"`\w+ (/\S+)`", cells[0])]
    document = httpx.get(f"{tiny.url}/openapi.json", trust_env=False).json()
    assert sorted(cells) == sorted(document["paths"])


def test_every_limit_is_told() -> None:
    """Each setting stands in the table with its default and its flag, if it has one."""
    default, told = Settings(), {}
    for cell, value, flag, _ in rows_of(SERVING, "What a server allows"):
        told[cell.strip("`")] = (value, flag.strip("`"))
    assert set(told) == {field.name for field in fields(Settings)} - {"name"}
    options = _parser().parse_args(["serve"])
    for name, (value, flag) in told.items():
        own = getattr(default, name)
        if isinstance(own, (int, float)):
            assert float(re.sub(r"[, s]", "", value)) == own, name
        elif isinstance(own, tuple):
            assert (value, own) == ("none", ())
        assert bool(flag) == (name in FLAGS or isinstance(own, tuple)), name
        assert not flag or hasattr(options, flag.removeprefix("--").replace("-", "_"))


def test_every_metric_is_told(tiny: Running) -> None:
    """The table of metrics has those that are there, and the reasons those that an answer ends for."""
    tiny.chat(max_tokens=2)
    there = set(re.findall(r"^# TYPE (\w+)", tiny.service.metrics.text().decode(), re.MULTILINE))
    cells = [cells[0] for cells in rows_of(DEPLOYMENT, "Metrics")]
    told = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert told == {name for name in there if not name.endswith("_created")}


def test_what_others_are_told_fits_the_defaults() -> None:
    """Times and sizes of nginx and systemd leave the server its own; the service's command is ours."""
    default, nginx, systemd = Settings(), blocks(DEPLOYMENT, "nginx")[0], blocks(DEPLOYMENT, "ini")[0]

    def number(pattern: str, text: str) -> int:
        (found,) = re.findall(pattern, text)
        return int(found)

    assert number(r"client_max_body_size (\d+)m;", nginx) << 20 > default.max_body_bytes
    assert number(r"proxy_read_timeout (\d+)s;", nginx) > default.timeout
    assert number(r"TimeoutStopSec=(\d+)", systemd) >= default.grace + 10
    (line,) = re.findall(r"^ExecStart=\S+/qwenvl (.*)$", systemd, re.MULTILINE)
    assert _parser().parse_args(shlex.split(line)).api_keys
    assert "X-Accel-Buffering" in (read("src/qwenvl/serving/replies.py") + read(DEPLOYMENT))


def test_the_wrong_content_type_is_told_apart(tiny: Running) -> None:
    """The table of errors says 415 of a body that is not JSON."""
    with tiny.client() as client:
        answer = client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.status_code in {int(cells[0].split(",")[0]) for cells in rows_of(SERVING, "Errors")}
