"""Copies of the server on the machines of a Ray cluster, as many as there is work for.

    serve run deploy.ray_serve:build model=Qwen/Qwen-VL-Chat rows=16 max_replicas=4

`build` takes the fields of Deployment, which are those of the server's Settings and a few of Ray's. Each replica is a
whole server in a process of its own, with a model of its own: docs/deployment.md says more.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from ray import serve
from ray.serve import Application
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qwenvl
from qwenvl.serving.api import create_app
from qwenvl.serving.service import Service
from qwenvl.serving.settings import Settings, keys_of


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Deployment(Settings):
    """Settings of every replica, and beside them:

    model, device, dtype, revision, cache_dir, adapter    as for `qwenvl.load`; a folder must be on every machine
    min_replicas, max_replicas      there are at least so many, and up to so many while answers wait for rows
    cpus, gpus                      that a replica has to itself; default, one of each, as far as there are GPUs here
    api_keys_file                   with a key a line, on every machine: arguments are for all to see on Ray's dashboard
    """

    rows: int = 8  # not what memory allows: Ray decides by it before there is a model
    model: str = "tiny"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    cache_dir: str | None = None
    adapter: str | None = None
    min_replicas: int = 1
    max_replicas: int = 2
    cpus: float = 1
    gpus: float = field(default_factory=lambda: float(torch.cuda.is_available()))
    api_keys_file: str | None = None


def build(arguments: dict[str, Any]) -> Application:
    """The application of `serve run` and of a file for `serve deploy`. Raises ValidationError, ConfigError."""
    given = TypeAdapter(Deployment).validate_python(arguments)
    if given.api_keys_file is not None:
        keys_of(given.api_keys_file)  # said here and at once; of a replica, it would be said in a log, again and again

    def server() -> FastAPI:
        """In a replica's process: a server like any other."""
        settings = given
        if given.api_keys_file is not None:
            settings = replace(given, api_keys=keys_of(given.api_keys_file))
        source = {"revision": given.revision, "cache_dir": given.cache_dir, "adapter": given.adapter}
        service = Service(qwenvl.load(given.model, given.device, given.dtype, quiet=True, **source), settings)
        app = create_app(service)
        app.state.service = service
        app.add_middleware(Signed, name=serve.get_replica_context().replica_id.unique_id)
        return app

    return serve.deployment(
        serve.ingress(server)(Replica),
        name="qwenvl",
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": given.max_replicas,
            "target_ongoing_requests": given.rows,
        },
        # More than a replica takes: it is to refuse the rest itself, by 429, and not to let them wait at the proxy.
        max_ongoing_requests=2 * (given.rows + given.queue) + 16,
        graceful_shutdown_timeout_s=given.grace + 15,
    ).bind()


class Replica:
    """What Ray asks beside the server, which `serve.ingress` gives it as `app`."""

    app: FastAPI

    def check_health(self) -> None:
        """Ray replaces who raises."""
        if (failure := self.app.state.service.failure) is not None:
            raise RuntimeError("the model has stopped working") from failure


class Signed:
    """Says which replica has answered, in the header X-Replica."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Replica"] = self.name
                del headers["X-Request-Id"]  # Ray's proxy adds one of its own
            await send(message)

        await self.app(scope, receive, signed)
