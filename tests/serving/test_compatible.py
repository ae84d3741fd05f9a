"""What OpenAI's clients, and what is built on them, send beside the plain case; and what plain HTTP clients do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from servers import Running, data_url, picture, running

import qwenvl
from qwenvl.errors import ConfigError
from qwenvl.pipeline import Pipeline
from qwenvl.serving import gate
from qwenvl.serving.api import create_app
from qwenvl.serving.server import listen
from qwenvl.serving.service import Service
from qwenvl.serving.settings import Settings
from qwenvl.serving.web import mount_page

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def paged() -> Iterator[TestClient]:
    """A client of the API with the page at its side."""
    service = Service(qwenvl.load("tiny", quiet=True), Settings(rows=1))
    with TestClient(mount_page(create_app(service), service), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    "body",
    [
        {"logit_bias": {}, "modalities": ["text"], "functions": [], "function_call": "none"},
        {"logit_bias": None, "functions": None, "function_call": None, "modalities": None, "reasoning_effort": None},
        {"verbosity": None, "prediction": None, "audio": None, "safety_identifier": "a", "prompt_cache_key": "b"},
        {"seed": -1, "top_k": -1, "temperature": 1},
        {
            "tools": [TOOL],
            "history": [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "1"},
            ],
        },
        {
            "history": [
                {"role": "assistant", "content": "yes", "reasoning_content": None},
                {"role": "user", "content": "and?"},
            ]
        },
    ],
)
def test_fields_that_ask_for_nothing_are_taken(server: Running, body: dict[str, Any]) -> None:
    """Clients send them in every request, or send back what they were given."""
    history = body.pop("history", [])
    messages = [{"role": "user", "content": "hello"}, *history]
    answer = server.chat(messages=messages, max_tokens=2, **body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [{"logit_bias": {"5": 1}}, {"functions": [{"name": "f"}]}, {"verbosity": "low"}])
def test_fields_that_ask_for_something_are_refused(server: Running, body: dict[str, Any]) -> None:
    """It would not be done."""
    assert server.chat(**body).status_code == 400


def test_completions_take_their_neutral_fields(server: Running) -> None:
    """Of OpenAI's old form of completions."""
    body = {"model": server.service.name, "prompt": "a", "max_tokens": 2}
    assert server.post("/v1/completions", **body, echo=False, best_of=1, suffix="").status_code == 200
    assert server.post("/v1/completions", **body, echo=True).status_code == 400


def test_a_pictures_url_may_stand_alone(server: Running) -> None:
    """As other servers take it: the text of the URL in place of an object."""
    part: dict[str, Any] = {"type": "image_url", "image_url": data_url(picture("red"))}
    alone = server.chat(messages=[{"role": "user", "content": [part]}], max_tokens=3, temperature=0).json()
    part["image_url"] = {"url": part["image_url"]}
    whole = server.chat(messages=[{"role": "user", "content": [part]}], max_tokens=3, temperature=0).json()
    assert alone["choices"][0]["message"] == whole["choices"][0]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]},
            "messages.0.content.0.image_url.url",
        ),
        ({"stop": [""]}, "stop.0"),
        ({"temperature": "hot"}, "temperature"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": 3}, "messages"),
    ],
)
def test_a_mistake_is_named_by_its_place(server: Running, body: dict[str, Any], param: str) -> None:
    """In the request as it was sent, whatever forms were tried on the way."""
    assert server.chat(**body).json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models"])
def test_head(paged: TestClient, path: str) -> None:
    """Probes ask so."""
    assert (paged.head(path).status_code, paged.head(path).content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/nope", 404),
        ("GET", "/nope", 404),
    ],
)
def test_beside_the_page_errors_are_openais_too(paged: TestClient, method: str, path: str, status: int) -> None:
    """The page is mounted at "/", and would be asked for whatever the API does not know."""
    answer = paged.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in answer.headers) == (status == 405)


def test_uploads_are_bounded(paged: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What visitors upload is kept for a while; no more is taken than the disk can bear."""
    monkeypatch.setattr(gate, "uploaded", lambda: gate.MOST_UPLOADED + 1)
    answer = paged.post("/gradio_api/upload", files={"files": ("a.png", b"x")})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_another_origin_reads_refusals(pipeline: Pipeline) -> None:
    """A page that may call the API is told why it may not do this: a browser hides answers without the header."""
    settings = Settings(cors_origins=("https://example.com",), api_keys=("key",))
    with running(pipeline, settings) as server, server.client(headers={"Origin": "https://example.com"}) as client:
        for answer in (client.get("/v1/models"), client.post("/v1/chat/completions", content=b"{}")):
            assert answer.status_code == 401
            assert answer.headers["access-control-allow-origin"] == "https://example.com"
            assert "Retry-After" in answer.headers["access-control-expose-headers"]


def test_a_port_is_one_servers() -> None:
    """The second is told so before it loads its model; numbers that are no ports are not taken for others."""
    with listen("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="cannot listen"):
        listen("127.0.0.1", first.getsockname()[1])
    for port in (65536, 99999, -1):
        with pytest.raises(ConfigError, match="from 0 to 65535"):
            listen("127.0.0.1", port)
