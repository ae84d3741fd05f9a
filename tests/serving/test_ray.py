"""Replicas on a Ray cluster answer as one server does, whichever is asked, and go on when one of them dies."""

from __future__ import annotations

import importlib
import os
import re
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray_cluster import ROOT, Cluster, cluster
from servers import Running, data_url, running, until

import qwenvl
from qwenvl.demo import draw_scene
from qwenvl.errors import ConfigError
from qwenvl.serving.settings import Settings

# Not by importing it, which takes seconds of every run's collection.
pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[serve,ray]'"),
    pytest.mark.slow,  # a minute
]

KEY = "some words of a key"
BEARER = {"Authorization": f"Bearer {KEY}"}
SCENE = {"type": "image_url", "image_url": {"url": data_url(draw_scene()[0])}}
QUESTION = [{"role": "user", "content": [SCENE, {"type": "text", "text": "What is in the picture?"}]}]
LONG = {"model": "model", "prompt": "the", "max_tokens": 300, "temperature": 2, "seed": 0, "n": 8, "stream": True}
TRIES = 60  # Ray draws a replica for each request: that one of two is never drawn has a chance of 2 ** -59
RENEWAL = 60  # seconds


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two of them, of the embedded model, that ask for a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\nanother\n", encoding="utf-8")
    source = {"model": "tiny", "device": "cpu", "dtype": "float32", "gpus": 0}
    with cluster(**source, min_replicas=2, rows=2, name="model", api_keys_file=str(keys)) as found:
        yield found


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    """A server of the same settings without Ray."""
    vl = qwenvl.load("tiny", "cpu", "float32", quiet=True)
    with running(vl, Settings(rows=2, name="model", api_keys=(KEY, "another"))) as found:
        yield found


def client_of(url: str) -> openai.OpenAI:
    """OpenAI's."""
    http = httpx.Client(timeout=60, trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, http_client=http)


def ask(url: str, messages: list[Any]) -> tuple[str, str | None]:
    """The greedy answer, and who has given it."""
    with client_of(url) as client:
        raw = client.chat.completions.with_raw_response.create(model="model", messages=messages, temperature=0)
        answer = raw.parse().choices[0].message.content
    assert answer
    return answer, raw.headers.get("x-replica")


def ask_both(url: str, messages: list[Any]) -> dict[str | None, str]:
    """The answer of each of the two replicas, which gives the same one each time."""
    answers: dict[str | None, str] = {}
    for _ in range(TRIES):
        answer, replica = ask(url, messages)
        assert answers.setdefault(replica, answer) == answer
        if len(answers) == 2:
            return answers
    pytest.fail(f"of two replicas, only {set(answers)} have answered")


def test_both_replicas_answer_alike(replicas: Cluster) -> None:
    """Requests are shared out, and nobody can tell by a greedy answer who has given it."""
    first, second = ask_both(replicas.url, QUESTION).values()
    assert first == second == "A red circle, a blue square and a green triangle."


def test_a_conversation_goes_on_at_any_replica(replicas: Cluster, plain: Running) -> None:
    """Neither replica remembers anything: both rounds are answered by either as by a server without Ray."""
    reply, _ = ask(plain.url, QUESTION)
    said = {"role": "assistant", "content": reply}
    again = [*QUESTION, said, {"role": "user", "content": "Box the red circle."}]
    second, _ = ask(plain.url, again)
    assert "<box>" in second
    assert set(ask_both(replicas.url, QUESTION).values()) == {reply}
    assert set(ask_both(replicas.url, again).values()) == {second}


def test_openais_client_reads_a_stream(replicas: Cluster) -> None:
    """Its pieces make up the answer that comes whole, with the reason of its end, and the usage last."""
    whole, _ = ask(replicas.url, QUESTION)
    with client_of(replicas.url) as client:
        chunks = list(
            client.chat.completions.create(
                model="model",
                messages=QUESTION,  # type: ignore[arg-type]
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > 3
    assert "".join(choice.delta.content or "" for choice in choices) == whole
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None


def test_a_stream_arrives_as_it_is_computed(replicas: Cluster) -> None:
    """Ray's proxy holds nothing back: the pieces come all along the time that the answers take."""
    with httpx.stream(
        "POST", f"{replicas.url}/v1/completions", json=LONG, headers=BEARER, timeout=60, trust_env=False
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        pieces = [(time.monotonic(), piece) for piece in reply.iter_raw()]
    whole = pieces[-1][0] - pieces[0][0]
    assert whole > 0.05
    assert all(after - before < whole / 2 for (before, _), (after, _) in pairwise(pieces))
    assert b"".join(piece for _, piece in pieces).endswith(b"data: [DONE]\n\n")


def test_who_hangs_up_frees_the_rows(replicas: Cluster) -> None:
    """Ray's proxy passes it on that the client has left, and the replica computes no further."""
    with httpx.Client(base_url=replicas.url, headers=BEARER, timeout=60, trust_env=False) as client:

        def cancelled() -> tuple[str, float, bool]:
            """Of the replica that happens to be asked: its name, the answers whose clients left, whether it rests."""
            metrics = client.get("/metrics")
            (line,) = re.findall(r'^qwenvl_answers_total{reason="cancelled"} (.*)$', metrics.text, re.MULTILINE) or [
                "0"
            ]
            return metrics.headers["x-replica"], float(line), "\nqwenvl_busy 0.0\n" in metrics.text

        before = {name: count for name, count, _ in (cancelled() for _ in range(TRIES))}
        with client.stream("POST", "/v1/completions", json=LONG) as reply:
            next(reply.iter_raw())
        asked = reply.headers["x-replica"]

        def freed() -> bool:
            name, count, rests = cancelled()
            return name == asked and count > before[name] and rests

        until(freed)


def test_mistakes_are_told_as_without_ray(replicas: Cluster, plain: Running) -> None:
    """Whatever is refused is refused with the status and the words of a plain server, in OpenAI's form."""
    hello = {"model": "model", "messages": [{"role": "user", "content": "hello"}]}
    chat, wrong = "/v1/chat/completions", {"Authorization": "Bearer wrong"}
    part = {"Authorization": f"Bearer {KEY.split()[0]}"}  # a key is a line of the file, not a word
    cases: list[tuple[int, str, dict[str, Any]]] = [
        (400, chat, {"json": {**hello, "beam_size": 4}, "headers": BEARER}),
        (400, chat, {"json": {**hello, "messages": []}, "headers": BEARER}),
        (400, chat, {"content": b"{", "headers": {**BEARER, "Content-Type": "application/json"}}),
        (404, chat, {"json": {**hello, "model": "other"}, "headers": BEARER}),
        (404, "/v1/nothing", {"json": hello, "headers": BEARER}),
        (415, chat, {"content": b"hello", "headers": BEARER}),
        *((401, chat, {"json": hello, "headers": headers}) for headers in ({}, wrong, part)),
        (200, chat, {"json": {**hello, "max_tokens": 1}, "headers": BEARER}),
    ]
    with httpx.Client(timeout=60, trust_env=False) as client:
        for status, path, request in cases:
            here, there = (client.post(url + path, **request) for url in (plain.url, replicas.url))
            assert (there.status_code, here.status_code) == (status, status), (request, there.text)
            if status != 200:
                assert there.json() == here.json()
                assert set(there.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")  # Ray's
def test_build_refuses_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is named at once, where the command was given, before there is any cluster."""
    import ray
    from pydantic import ValidationError

    monkeypatch.syspath_prepend(ROOT)
    build = importlib.import_module("deploy.ray_serve").build
    with pytest.raises(ValidationError, match="1 validation error for Deployment\nbeams\n"):
        build({"model": "tiny", "beams": 4})
    with pytest.raises(ValidationError, match="1 validation error for Deployment\nrows\n"):
        build({"rows": "many"})
    (tmp_path / "keys.txt").write_text(" \n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"keys\.txt holds no API key"):
        build({"api_keys_file": str(tmp_path / "keys.txt")})
    with pytest.raises(ConfigError, match=r"cannot read the API keys: .*none\.txt"):
        build({"api_keys_file": str(tmp_path / "none.txt")})
    assert not ray.is_initialized()


def test_one_dies_and_another_comes(replicas: Cluster) -> None:
    """Where a replica's process is killed, the other one answers everybody until Ray has started a new one."""
    before = ask_both(replicas.url, QUESTION)
    (expected,) = set(before.values())
    os.kill(replicas.replicas()[0], signal.SIGKILL)
    seen: set[str | None] = set()

    def renewed() -> bool:
        answer, replica = ask(replicas.url, QUESTION)  # OpenAI's client asks again where Ray has lost the request
        assert answer == expected
        seen.add(replica)
        return not seen <= set(before)

    until(renewed, RENEWAL)
    after = ask_both(replicas.url, QUESTION)
    assert len(set(after) & set(before)) == 1
    assert set(after.values()) == {expected}
