"""The load test of the server: a crowd is served whole, and what goes wrong is noticed."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from servers import running, until

import qwenvl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("load_serving")


class Liar(BaseHTTPRequestHandler):
    """Says 500 to whatever is asked."""

    def do_POST(self) -> None:
        """One request."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_crowd_is_served_whole(load: Any) -> None:
    """Questions are answered, lies refused, those who left forgotten; nothing is lost or left behind."""
    with running(qwenvl.load("tiny", quiet=True)) as server:
        tally = asyncio.run(load.crowd(server.url, load.Mix(server.service.name), 12, 4))
        until(lambda: not server.service.busy)
    assert tally.answers > 10
    assert tally.tokens > 0
    assert len(tally.whole) > len(tally.first) > 0
    assert tally.refusals
    assert all(400 <= status < 500 for status in tally.refusals)
    assert not tally.lost


def test_what_goes_wrong_is_noticed(load: Any) -> None:
    """A server that fails, and one that is not there."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        lost = asyncio.run(load.crowd(url, load.Mix("tiny"), 4, 1.5)).lost
        server.shutdown()
    assert {"status 500 to a question", "status 500 to a lie"} <= set(lost)
    assert set(asyncio.run(load.crowd(url, load.Mix("tiny"), 1, 1.0)).lost) == {"ConnectError"}


def test_another_answer_is_noticed(load: Any) -> None:
    """A greedy question has one answer, whoever else is being answered."""
    tally = load.Tally(0.0)
    tally.heard("how many?", "3")
    tally.heard("how many?", "3")
    assert not tally.lost
    tally.heard("how many?", "4")
    assert sum(tally.lost.values()) == 1


@pytest.mark.parametrize(
    ("tokens", "memory", "lost", "left", "missed"),
    [
        (300, [100.0] * 8, {}, 0, set()),
        (290, [100.0] * 8, {}, 0, {"throughput"}),
        (300, [100.0] * 6 + [106.0] * 2, {}, 0, {"memory"}),
        (300, [100.0] * 8, {"ReadError": 1}, 0, {"nothing"}),
        (300, [100.0] * 8, {}, 1, {"no"}),
    ],
)
def test_each_bar_can_be_missed(
    load: Any, tokens: int, memory: list[float], lost: dict[str, int], left: int, missed: set[str]
) -> None:
    """By throughput, memory, a request that was lost, a slot that was not given back."""

    def run(clients: int, tokens: int) -> Any:
        return load.Run(clients, load.Tally(0.0, tokens=tokens, lost=Counter(lost)), 1.0, memory)

    passed = load.judged([run(1, 90), run(64, tokens), run(1, 110)], left)["passed"]
    assert {name.split()[0] for name, there in passed.items() if not there} == missed
