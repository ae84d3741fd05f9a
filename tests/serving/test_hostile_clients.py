"""Who speaks to the server as no client does: slow, endless, huge, broken, or in another's name."""

from __future__ import annotations

import argparse
import gzip
import http.client
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import connected, dribble, head, pour, question, received, refused, well
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, running, until

import qwenvl
from qwenvl.pipeline import Pipeline
from qwenvl.serving import command, guard
from qwenvl.serving import server as module
from qwenvl.serving.settings import Settings

JSON = {"Content-Type": "application/json"}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/grounding")
LIMIT = 100_000  # bytes of a body, below


@pytest.fixture(scope="module")
def strict(chat_folder: Path) -> Iterator[Running]:
    """A server with little patience."""
    vl = qwenvl.load(chat_folder, device="cpu", dtype="float32", quiet=True)
    settings = Settings(rows=2, queue=4, max_length=1024, body_timeout=0.5, max_body_bytes=LIMIT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HEAD_TIMEOUT", 0.5)
        with running(vl, settings) as found:
            yield found


def status(said: bytes) -> int:
    """Of the one answer in what a connection said before the server closed it."""
    assert len(re.findall(rb"HTTP/1\.1 \d", said)) == 1, said
    return int(said.split(b" ", 2)[1])


# ---- slow, endless, huge


@pytest.mark.parametrize("body", ["never", "now and then"])
@pytest.mark.parametrize("announced", [500, None])
def test_a_body_that_does_not_come(strict: Running, announced: int | None, body: str) -> None:
    """It was announced: half a second later the connection is closed, whatever drips in."""
    begun = time.monotonic()
    chunked = [] if announced else ["Transfer-Encoding: chunked"]
    with connected(strict, head(announced, *chunked)) as sock:
        if body == "now and then":
            dribble(sock, b" " if announced else b"1\r\n \r\n")
        assert status(received(sock)) == 408
    assert time.monotonic() - begun > 0.4
    well(strict)


@pytest.mark.parametrize("announced", [100 << 20, None])
@pytest.mark.parametrize("path", [*ROUTES, "/v1/models", "/nothing", "/health"])
def test_a_body_without_end(strict: Running, announced: int | None, path: str) -> None:
    """A hundred megabytes, announced or not, where they belong and where they do not: little of it is ever read."""
    chunked = [] if announced else ["Transfer-Encoding: chunked"]
    piece = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with connected(strict, head(announced, *chunked, path=path)) as sock:
        sent = pour(sock, piece)
        said = received(sock)
    assert sent < 20 << 20  # most of it in the two sockets' buffers
    if said:  # a reset connection may lose the last words
        assert status(said) in (413, 404, 405)
        assert b"onnection: close" in said
    well(strict)


def test_all_bodies_together_are_bounded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within its limit, and all are held: there is room again when one of them ends."""
    monkeypatch.setattr(guard, "BODIES", 1)
    with running(pipeline, Settings(rows=1, max_body_bytes=LIMIT)) as server:
        with connected(server, head(LIMIT) + b" " * (LIMIT - 10)):
            until(lambda: server.chat(max_tokens=2).status_code == 429)
            assert refused(server.chat(), 429)["code"] == "queue_full"
        until(lambda: server.chat(max_tokens=2).status_code == 200)


def answered(sock: socket.socket) -> int:
    """The status of an answer, which is read to its end, in however many pieces it comes."""
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    answer.read()
    return answer.status


def test_a_head_that_does_not_come(strict: Running) -> None:
    """Silence, half a head, a header now and then, also on a connection that has had its answer: closed in time."""
    whole = head(len(question(strict))) + question(strict)
    for sent in (b"", b"GET / HT", head()[:-2], whole):
        begun = time.monotonic()
        with connected(strict, sent) as sock:
            if sent == whole:
                assert answered(sock) == 200
                sock.sendall(b"GET /health HTTP/1.1\r\n")
            elif sent:
                dribble(sock, b"X: y\r\n")
            received(sock)
        assert time.monotonic() - begun > 0.4
    with connected(strict, whole) as sock:  # who is in time keeps the connection
        assert answered(sock) == 200
        time.sleep(0.7)
        sock.sendall(whole)
        assert answered(sock) == 200


def test_a_head_without_end(strict: Running) -> None:
    """One long header, many, a long path, no line end: cut off at 64 KB or a little more."""
    for start, more in (
        (b"GET / HTTP/1.1\r\nX: ", b"x" * 10_000),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 2000),
        (b"GET /", b"x" * 10_000),
        (b"", b"x" * 10_000),
    ):
        with connected(strict, start) as sock:
            sent = pour(sock, more)
            said = received(sock)
        assert sent < 20 << 20
        assert not said or status(said) == 400
    well(strict)


def test_silent_connections_shut_nobody_out(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even as many as there may be: they are closed after a while. Before, they could stay for ever."""
    monkeypatch.setattr(strict.server.config, "limit_concurrency", 20)
    held = [connected(strict) for _ in range(40)]
    try:
        for each in held:
            each.__enter__()
        until(lambda: strict.chat(max_tokens=2).status_code == 200, 10)
    finally:
        for each in held:
            each.__exit__(None, None, None)


def test_who_does_not_read_is_given_up(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks and asks and reads nothing keeps its connection for so long and no longer."""
    monkeypatch.setattr(module, "READ_TIMEOUT", 0.3)
    with connected(strict) as sock:
        assert pour(sock, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10) < 100 << 20
        until(lambda: len(strict.server.server_state.connections) <= 1)
    well(strict)


# ---- broken HTTP


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x10"],
        ["Content-Length: " + "9" * 30],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding : chunked"],
        ["Content-Length: 5", " folded: yes"],
        ["Host: other"],
        ["X: a\0b"],
        ["X\0: a"],
    ],
)
def test_a_request_is_one_request(strict: Running, lines: list[str]) -> None:
    """Where a proxy and the server might see different ends, there is one answer, a refusal, and no second request."""
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(strict, head(None, *lines) + smuggled) as sock:
        said = received(sock)
    assert status(said) in (400, 413, 501)
    assert b"qwenvl_" not in said
    well(strict)


# ---- broken bodies


def bodies(model: str) -> dict[str, bytes]:
    """Bodies that are refused."""
    start = f'{{"model": "{model}", "max_tokens": 2, "messages": [{{"role": "user", "content": "a"}}]'
    tool = start + ', "tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]}'
    part = '{"model": "%s", "messages": [{"role": "user", "content": [%s]}]}'
    return {
        name: text if isinstance(text, bytes) else text.encode()
        for name, text in {
            "nothing": "",
            "null": "null",
            "a list": "[]",
            "a text": '"hello"',
            "half": start,
            "two": start + "}{}",
            "brackets": "[" * 100_000,
            "closed brackets": "[" * 40_000 + "]" * 40_000,
            "braces": '{"a":' * 20_000 + "1" + "}" * 20_000,
            "deep parameters": tool % ('{"a":' * 3000 + "1" + "}" * 3000),
            "less deep parameters": tool % ('{"a":' * 400 + "1" + "}" * 400),
            "many values": '{"model": "m", "messages": [' + "0," * 40_000 + "0]}",
            "many keys": start + "".join(f',"{number}":0' for number in range(9000)) + "}",
            "NaN": start + ', "temperature": NaN}',
            "Infinity": start + ', "temperature": Infinity}',
            "NaN in parameters": tool % '{"a": NaN}',
            "a huge exponent": start + ', "temperature": 1e999}',
            "a huge number": start + f', "seed": {"9" * 5000}}}',
            "a large number": start + f', "seed": {"9" * 400}}}',
            "a fraction": start + ', "n": 1.5}',
            "a whole fraction": start + ', "n": 1.0}',
            "true for one": start + ', "n": true}',
            "a lone surrogate": start.replace('"a"', '"\\ud800"') + "}",
            "a lone surrogate's key": start + ', "\\ud800": 1}',
            "a lone surrogate's stop": start + ', "stop": ["\\udfff"]}',
            "a lone surrogate's picture": part % (model, '{"type": "image_url", "image_url": {"url": "\\ud800"}}'),
            "an unknown part": part % (model, '{"type": "input_audio", "input_audio": {"data": ""}}'),
            "an unknown key": start + ', "__proto__": {"polluted": true}}',
            "a key as long as it goes": start + ', "%s": 1}' % ("k" * 90_000),
            "Latin-1": start.replace('"a"', '"é"').encode("latin-1") + b"}",
            "no UTF-8": b'{"model": "\xff\xfe\xfd"}',
            "an unpaired byte": b"\xff\xfe{",
            "zeros": b"\0" * 5000,
            "a form": b"model=a&messages=b",
            "compressed": gzip.compress(start.encode() + b"}"),
            "XML": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><x>&e;</x>",
            "a comment": start + "} // yes",
            "single quotes": start.replace('"', "'") + "}",
        }.items()
    }


def test_broken_bodies(strict: Running) -> None:
    """No JSON, too much of it, JSON of things that are no question: told in a line, by whichever route."""
    with strict.client() as client:
        for name, body in bodies(strict.service.name).items():
            for route in ROUTES:
                begun = time.process_time()
                refused(client.post(route, content=body, headers=JSON), 400, 404, 413)
                assert time.process_time() - begun < 2, name
    well(strict)


def test_json_is_what_python_reads(strict: Running) -> None:
    """A byte order mark and UTF-16 are read; of two equal keys the last counts, for all that look at it."""
    body = question(strict).decode()
    with strict.client() as client:
        for given in (body.encode("utf-8-sig"), body.encode("utf-16"), body.encode("utf-32-le")):
            assert client.post(ROUTES[0], content=given, headers=JSON).status_code == 200
        twice = body[:-1] + ', "model": "other"}'
        refused(client.post(ROUTES[0], content=twice, headers=JSON), 404)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "text/plain; application/json"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/jsonp"},
        {**JSON, "Content-Encoding": "gzip"},
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_a_page_of_another_site_cannot_ask(strict: Running, route: str, headers: dict[str, str]) -> None:
    """What a browser sends for any page without asking first is no request here: only JSON that says so is."""
    with strict.client() as client:
        request = client.build_request("POST", route, content=question(strict))
        request.headers.pop("content-type", None)
        request.headers.update({**headers, "Origin": "https://evil.example"})
        refused(client.send(request), 415)
        assert (
            client.post(route, content=b"{}", headers={"Content-Type": "Application/JSON;charset=utf-8"}).status_code
            == 400
        )


# ---- in another's name


def test_names_that_are_not_the_servers(pipeline: Pipeline) -> None:
    """A page whose name is made to stand for this machine gets no answer; its own names and addresses do."""
    with running(pipeline, Settings(rows=1, hosts=("localhost", "api.test"))) as server, server.client() as client:
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[x",
            "a b",
        ):
            for path in ("/v1/models", "/metrics", "/nothing"):
                refused(client.get(path, headers={"Host": host}), 421)
        for host in ("localhost", "LOCALHOST:8000", "api.test", "127.0.0.1:1", "[::1]:8000", "10.1.2.3"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_which_names_are_the_servers(tmp_path: Path) -> None:
    """On this machine's own address `localhost`, unless a key or somebody's word says who may come."""
    keys = tmp_path / "keys"
    keys.write_text("k\n", encoding="utf-8")

    def hosts(*flags: str) -> tuple[str, ...]:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return command.settings_of(parser.parse_args(flags)).hosts

    assert hosts() == hosts("--host", "::1") == hosts("--host", "localhost") == ("localhost",)
    assert hosts("--host", "0.0.0.0") == hosts("--api-keys", str(keys)) == hosts("--share") == ()
    assert hosts("--allow-host", "a.test", "--allow-host", "b.test") == ("a.test", "b.test")


def test_keys_are_asked_for_however_the_path_is_spelt(pipeline: Pipeline) -> None:
    """No spelling of a route leads around the key; what is refused says nothing about what there is."""
    with running(pipeline, Settings(rows=1, api_keys=("secret-key",))) as server, server.client() as client:
        for path in (
            "/v1/models",
            "/v1/models/",
            "/%761/models",
            "/v1%2fmodels",
            "/v1/./models",
            "/v1/x/../models",
            "/v1",
        ):
            answer = client.get(path)
            assert answer.status_code in (401, 404), path
            assert "secret" not in answer.text
        for path in ("//v1/models", "/V1/models", "/v1//models", "/x/../v1/models"):
            assert client.get(path).status_code in (401, 404), path
        for given in (
            "Bearer",
            "Bearer secret-ke",
            "Bearer secret-key2",
            "Basic secret-key",
            "secret-key",
            "Bearer \xff",
        ):
            refused(client.get("/v1/models", headers={b"Authorization": given.encode("latin-1")}), 401)
        body = question(server)
        refused(client.post(ROUTES[0], content=body), 401)  # before anything is said of the body
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret-key"}).status_code == 200


# ---- what is kept of it


def test_requests_leave_few_traces(server: Running) -> None:
    """Paths, methods and ids of a client's making make no new counters and are not repeated."""

    def counters() -> int:
        with server.client() as client:
            families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
        return len(families["qwenvl_requests"].samples)

    ids = set()
    with server.client() as client:
        client.get("/a"), client.post("/a"), client.post("/v1/models"), client.get("/v1/models/x")
        before = counters()
        for number in range(50):
            answer = client.request("GET", f"/{number}", headers={"X-Request-Id": f"mine-{number}"})
            refused(answer, 404)
            ids.add(answer.headers["x-request-id"])
            client.request(f"METHOD{number}", "/v1/models")
            client.get(f"/v1/models/{number}")
    assert counters() <= before + 2  # a status or two that were new
    assert len(ids) == 50
    assert not any("mine" in id_ for id_ in ids)


def test_methods_and_paths_that_are_not_there(server: Running) -> None:
    """Told as any mistake is; where the path is another's, with what there is to do."""
    with server.client() as client:
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "OPTIONS"):
            for route in ROUTES:
                answer = client.request(method, route)
                refused(answer, 405)
                assert answer.headers["allow"] == "POST"
        for path in (
            "/docs",
            "/redoc",
            "/.git/config",
            "/..%2f..%2fetc/passwd",
            "/%00",
            "/v1",
            "/" + "x" * 5000,
            "/openapi.json/x",
        ):
            refused(client.get(path), 404)
    well(server)


def test_a_mistake_in_a_stream_is_told_before_it_begins(server: Running) -> None:
    """With the status of any refusal, not within a stream that has begun well."""
    refused(server.chat(stream=True, n=17))
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]
    refused(server.chat(stream=True, messages=[{"role": "user", "content": parts}]))
