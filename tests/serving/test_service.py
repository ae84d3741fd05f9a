"""The server under load and at its end: bounded, on time, and one client's trouble is nobody else's."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Running, data_url, picture, running, slowly, until

import qwenvl.generation.schedule
import qwenvl.pictures
from qwenvl.errors import ConfigError
from qwenvl.pipeline import Pipeline
from qwenvl.serving.service import CORES
from qwenvl.serving.settings import Settings, keys_of

LONG = {"max_tokens": 1000}


@contextmanager
def hanging(server: Running, count: int = 1, **body: Any) -> Iterator[list[socket.socket]]:
    """Raw connections that have asked for answers and read nothing; closed at the end."""
    messages = [{"role": "user", "content": "hello"}]
    text = json.dumps({"model": server.service.name, "messages": messages, **LONG, **body}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(text)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(count)]
    try:
        for sock in sockets:
            sock.sendall(head.encode() + text)
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def test_many_at_once_are_computed_together(pipeline: Pipeline) -> None:
    """Requests share the engine's steps, and each is answered as it would be alone."""
    questions = [f"question {number}" for number in range(8)]
    with running(pipeline, Settings(rows=4)) as server:

        def ask(text: str) -> Any:
            return server.chat(text, max_tokens=9).json()["choices"][0]["message"]

        with slowly(server.service, 0.003) as steps, concurrent.futures.ThreadPoolExecutor(8) as pool:
            alone = [ask(text) for text in questions]
            together = list(pool.map(ask, questions))
    assert together == alone
    assert max(steps) == 4


def test_a_full_queue_answers_429(pipeline: Pipeline) -> None:
    """What is beyond rows and queue is refused at once, with the time to wait; there is room again when one leaves."""
    with running(pipeline, Settings(rows=1, queue=2)) as server, slowly(server.service):
        with hanging(server, 3) as sockets:
            until(lambda: server.service.busy == 3)
            refused = server.chat()
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert refused.json()["error"]["code"] == "queue_full"
            assert server.chat(n=2).status_code == 429
            sockets.pop().close()
            until(lambda: server.service.busy == 2)
            assert server.chat(n=2).status_code == 429  # there is one place, not two
        until(lambda: server.service.busy == 0)
        assert server.chat(max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_row_within_a_step(pipeline: Pipeline, stream: bool) -> None:
    """Also in the middle of an answer, streamed or not, and in the queue."""
    with running(pipeline, Settings(rows=1, queue=4)) as server, slowly(server.service, 0.1) as steps:
        with hanging(server, 3, stream=stream) as sockets:
            until(lambda: server.service.busy == 3)
            until(lambda: server.service.engine._rows.requests)
            (going,) = server.service.engine._rows.requests
            until(lambda: len(going.ids) > 2)
            before = len(steps)
            for sock in sockets:
                sock.close()
            until(lambda: server.service.busy == 0)  # all are cancelled ...
            cancelled = len(steps)
        until(lambda: not server.service.engine.load.active)  # ... and the row is free
        # One step may have begun before the news, the next one frees.
        assert cancelled - before <= 1
        assert len(steps) - cancelled <= 2
        assert server.service.engine.load.waiting == 0


def test_an_answer_that_takes_too_long_is_ended(pipeline: Pipeline) -> None:
    """After the settings' timeout: 504, or an event that says so; the row is free."""
    with running(pipeline, Settings(rows=1, timeout=0.4)) as server, slowly(server.service, 0.1):
        late = server.chat(**LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        streamed = server.chat(stream=True, **LONG)
        events = [line for line in streamed.text.splitlines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(events) > 1
        until(lambda: server.service.engine.load.active == 0)


def test_an_error_in_one_request_touches_no_other(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that one request meets is its own: a 500 that tells nothing of it; the others are answered as ever."""
    with running(pipeline, Settings(rows=4)) as server:
        well = server.chat("well", max_tokens=20).json()["choices"][0]["message"]
        choose = qwenvl.generation.schedule.choose

        def fail(logits: Any, requests: Any) -> Any:
            if any("BAD" in server.service.tokenizer.decode(request.prompt) for request in requests):
                raise RuntimeError("/home/secret/path.py went wrong")
            return choose(logits, requests)

        monkeypatch.setattr(qwenvl.generation.schedule, "choose", fail)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda text: server.chat(text, max_tokens=20), ["well", "BAD"] * 3))
        for number, answer in enumerate(answers):
            if number % 2:
                assert answer.status_code == 500
                assert "secret" not in answer.text
                assert "Traceback" not in answer.text
            else:
                assert answer.json()["choices"][0]["message"] == well


def test_stopping_ends_what_runs_and_refuses_what_comes(pipeline: Pipeline) -> None:
    """An answer that is under way when the server is told to stop is given whole."""
    with (
        running(pipeline, Settings(rows=2)) as server,
        slowly(server.service, 0.02),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        expected = server.chat(max_tokens=30).json()["choices"][0]["message"]
        answer = pool.submit(server.chat, max_tokens=30)
        until(lambda: server.service.busy)
        server.service.refuse_more()
        refused = server.chat()
        with server.client() as client:
            assert client.get("/ready").status_code == 503
            assert client.get("/health").status_code == 200
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        server.server.should_exit = True
        assert answer.result().json()["choices"][0]["message"] == expected
    assert (server.service.finished, server.service.cut) == (1, 0)  # since it was told to stop


def test_what_runs_beyond_the_grace_is_told() -> None:
    """A real process and a real signal: the stream ends with an event that says why, and the process with a count."""
    code = (
        "import sys, time, qwenvl.cli, qwenvl.generation.engine as e\n"
        "step = e.Engine.step\n"
        "e.Engine.step = lambda self: (time.sleep(0.5), step(self))[1]\n"
        "sys.exit(qwenvl.cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--port", "0", "--grace", "1", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("tiny is at http://127.0.0.1:"), said
        url = said.split()[3].rstrip(":")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        lines = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30, trust_env=False) as answer:
            for line in filter(None, answer.iter_lines()):
                if not lines:
                    process.send_signal(signal.SIGTERM)
                lines.append(line)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"
    assert told == "stopped: of 1 answers, 1 were cut off\n"


def test_keys(pipeline: Pipeline) -> None:
    """With keys, `/v1` asks for one of them; the probes of an orchestrator do not need it."""
    with running(pipeline, Settings(api_keys=("first", "schlüssel"))) as server, server.client() as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "first"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/v1", "/v1/chat/completions"):
                refused = client.get(path, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
                assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in (b"Bearer first", "bearer schlüssel".encode()):
            assert client.get("/v1/models", headers={b"Authorization": key}).status_code == 200
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_a_key_is_a_line_of_its_file(tmp_path: Path) -> None:
    """Also one of several words, each of which would be easy to guess; the file's empty lines are no keys."""
    (tmp_path / "keys").write_text("a long random key\n\n second \n", encoding="utf-8")
    assert keys_of(tmp_path / "keys") == ("a long random key", "second")
    (tmp_path / "keys").write_text(" \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no API key"):
        keys_of(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        keys_of(tmp_path)


def test_cors_is_off_until_it_is_asked_for(server: Running, pipeline: Pipeline) -> None:
    """A page of another origin may read answers only where the settings name it."""
    asks = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    with server.client() as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=asks).headers
        assert client.options("/v1/models", headers=asks).status_code == 405
    settings = Settings(cors_origins=("https://example.com",), api_keys=("k",))
    with running(pipeline, settings) as other, other.client() as client:
        allowed = client.options("/v1/models", headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://example.com"
        refused = client.options("/v1/models", headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_a_slow_reader_holds_no_place(pipeline: Pipeline) -> None:
    """Who asks for a stream and does not read it costs no more than its answer's steps."""
    with running(pipeline, Settings(rows=1, queue=0)) as server, hanging(server, 1, stream=True, n=1):
        until(lambda: server.service.engine.totals.new_tokens > 2)  # which are the warm-up's
        until(lambda: server.service.busy == 0)
        assert server.chat(max_tokens=2).status_code == 200


def test_pictures_are_prepared_beside_the_steps(pipeline: Pipeline) -> None:
    """A client that sends a picture while others are answered does not hold them up, nor is it lost."""
    url = data_url(picture("green", (600, 600)))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]
    with running(pipeline, Settings(rows=2)) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        answers = list(pool.map(lambda _: server.chat(**asked).status_code, range(8)))
    assert answers == [200] * 8


def shows(count: int) -> list[dict[str, Any]]:
    """A message with so many pictures."""
    part = {"type": "image_url", "image_url": {"url": data_url(picture("green"))}}
    return [{"role": "user", "content": [part] * count}]


@contextmanager
def opening(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], threading.Event]]:
    """Pictures are opened one by one, while the event is set; gives those that have begun."""
    begun: list[int] = []
    go = threading.Event()
    preprocess = qwenvl.pictures.preprocess

    def wait(*arguments: Any) -> Any:
        begun.append(1)
        go.wait(20)
        return preprocess(*arguments)

    monkeypatch.setattr(qwenvl.pictures, "preprocess", wait)
    try:
        yield begun, go
    finally:
        go.set()


def test_who_leaves_while_pictures_are_prepared_leaves_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that wait for a thread are gone at once; of those that have one, no further picture is opened."""
    with running(pipeline, Settings(rows=4)) as server, opening(monkeypatch) as (begun, go):
        with hanging(server, CORES + 3, messages=shows(2)):
            until(lambda: len(begun) == CORES and server.service.busy == CORES + 3)
        until(lambda: server.service.busy == CORES)
        go.set()
        until(lambda: server.service.busy == 0)
        assert len(begun) == CORES
        until(lambda: server.service.engine.load.active == server.service.engine.load.waiting == 0)


def test_texts_do_not_wait_for_pictures(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question without a picture is answered while all threads open others' pictures."""
    with (
        running(pipeline, Settings(rows=4)) as server,
        opening(monkeypatch) as (begun, _),
        hanging(server, CORES + 1, messages=shows(1)),
    ):
        until(lambda: len(begun) == CORES)
        assert server.chat(max_tokens=2).status_code == 200


def test_what_is_prepared_beyond_the_grace_is_told(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose pictures are opened, and those who wait for that, hear that the server stops, and are counted."""
    count = CORES + 2
    with opening(monkeypatch) as (begun, go), concurrent.futures.ThreadPoolExecutor(count) as pool:
        with running(pipeline, Settings(rows=4, grace=0.2)) as server:
            asked = [pool.submit(server.chat, messages=shows(2)) for _ in range(count)]
            until(lambda: len(begun) == CORES and server.service.busy == count)
            threading.Timer(0.5, go.set).start()
        answers = [answer.result() for answer in asked]
    assert [answer.status_code for answer in answers] == [503] * count
    assert {answer.json()["error"]["code"] for answer in answers} == {"stopping"}
    assert server.service.cut == count


def test_pixels_of_a_request_are_bounded(pipeline: Pipeline) -> None:
    """Each picture is within the limit; four times as many pixels are too many in all."""
    settings = Settings(max_image_pixels=1200, max_images=8)  # one of these pictures
    with running(pipeline, settings) as server:
        assert server.chat(messages=shows(4), max_tokens=2).status_code == 200
        answer = server.chat(messages=shows(5), max_tokens=2)
    assert answer.status_code == 400
    assert "4800 pixels in all" in answer.json()["error"]["message"]


def test_a_dead_engine_is_told(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the thread that computes end, health says so, and nobody waits for ever."""
    with running(pipeline, Settings(rows=1)) as server:

        def die() -> bool:
            raise SystemExit

        monkeypatch.setattr(server.service.engine, "step", die)
        assert server.chat(max_tokens=2).status_code == 503
        with server.client() as client:
            assert client.get("/health").status_code == 503
        assert server.chat(max_tokens=2).status_code == 503
