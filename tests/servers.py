"""A real server on the loopback, in a thread, around a small model; and means to slow or script what it says."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

import qwenvl.generation.schedule
from qwenvl.generation.request import Request
from qwenvl.pipeline import Pipeline
from qwenvl.serving.api import create_app
from qwenvl.serving.server import _Server, config_of, listen
from qwenvl.serving.service import Service
from qwenvl.serving.settings import Settings
from qwenvl.text.tokenizer import REGION_TAGS


@dataclass
class Running:
    """A server that answers at `url`."""

    service: Service
    url: str
    server: uvicorn.Server

    def client(self, **more: Any) -> httpx.Client:
        """For plain requests."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False, **more)

    def post(self, path: str, **body: Any) -> httpx.Response:
        """One request of JSON."""
        with self.client() as client:
            return client.post(path, json=body)

    def chat(self, text: str = "hello", **more: Any) -> httpx.Response:
        """One question."""
        return self.post(
            "/v1/chat/completions",
            **{"model": self.service.name, "messages": [{"role": "user", "content": text}], **more},
        )


@contextmanager
def running(pipeline: Pipeline, settings: Settings | None = None) -> Iterator[Running]:
    """A server around a pipeline, until the end of the block."""
    service = Service(pipeline, settings)
    with listen("127.0.0.1", 0) as listening:
        config = config_of(create_app(service), service)
        config.timeout_graceful_shutdown = 10
        server = _Server(config, service, lambda: None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Running(service, f"http://127.0.0.1:{listening.getsockname()[1]}", server)
        finally:
            server.should_exit = True
            thread.join(30)
            pipeline.engine = None
    assert not thread.is_alive(), "the server did not stop"


def until(reached: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it; fail where it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


@contextmanager
def slowly(service: Service, seconds: float = 0.05) -> Iterator[list[int]]:
    """Every step of the engine takes at least so long, and no new answer ends before its limit.

    Gives a list with an entry for each step.
    """
    engine, steps = service.engine, []
    step, stop_ids = engine.step, engine.stop_ids

    def slow() -> bool:
        time.sleep(seconds)
        steps.append(engine.load.active)
        return step()

    engine.step, engine.stop_ids = slow, ()  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        engine.step, engine.stop_ids = step, stop_ids  # type: ignore[method-assign]


def script(monkeypatch: pytest.MonkeyPatch, service: Service, *replies: str) -> list[Request]:
    """The next requests say `replies`, in this order, whatever the model would. Gives the requests as they come."""
    waiting, said = list(replies), {}
    seen: list[Request] = []

    def choose(_: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        ids = []
        for request in requests:
            if request not in seen:
                seen.append(request)
                text = service.tokenizer.encode_tagged(waiting.pop(0), REGION_TAGS)
                said[id(request)] = [*text, service.tokenizer.im_end_id]
            ids.append(said[id(request)][request.chosen])
        return torch.tensor(ids)

    monkeypatch.setattr(qwenvl.generation.schedule, "choose", choose)
    return seen


def data_url(image: Image.Image) -> str:
    """A picture as a client sends it."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Of one colour."""
    return Image.new("RGB", size, colour)
