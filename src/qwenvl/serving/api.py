"""The API as an ASGI application.

create_app   routes, errors, limits and the service's life, on one FastAPI application
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import ConfigError, ImageError, PromptError, QwenVLError
from .chat import answer_chat
from .completions import answer_completion, answer_grounding
from .guard import Guard
from .refusals import Refused, mistake
from .replies import EventStream, check_model
from .schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Grounding,
    GroundingRequest,
    Model,
    Models,
)
from .service import Service

TROUBLE: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in (
        (400, "The request cannot be answered; the message says why"),
        (401, "No valid API key"),
        (404, "No such model"),
        (408, "The body came too slowly"),
        (413, "The body is too large"),
        (415, "The body is not JSON"),
        (421, "Not a name of this server"),
        (429, "Too much at once: try again later"),
        (500, "The answer failed"),
        (503, "The server is stopping"),
        (504, "The answer took too long"),
    )
}
METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}
STREAM = {
    "content": {
        "text/event-stream": {  # the schema of each event
            "schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        }
    },
    "description": "The answer, whole or as events",
}


def create_app(service: Service) -> FastAPI:
    """The application, which starts the service and stops it."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="qwenvl", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_answers(app, service)
    _add_facts(app, service)
    _add_methods(app)
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    if service.settings.cors_origins:  # around the guard, whose refusals a page is to read, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses={**TROUBLE, 200: STREAM}, tags=["answers"]
    )
    async def chat_completions(request: Request, asked: ChatRequest) -> ChatCompletion | EventStream:
        """The next message of a conversation about pictures."""
        return await answer_chat(service, request, asked)

    @app.post("/v1/completions", response_model=Completion, responses={**TROUBLE, 200: STREAM}, tags=["answers"])
    async def completions(request: Request, asked: CompletionRequest) -> Completion | EventStream:
        """How a text goes on."""
        return await answer_completion(service, request, asked)

    @app.post("/v1/grounding", responses=TROUBLE, tags=["answers"])
    async def grounding(request: Request, asked: GroundingRequest) -> Grounding:
        """Where a phrase is in a picture, in its pixels."""
        return await answer_grounding(service, request, asked)


def _add_facts(app: FastAPI, service: Service) -> None:
    model = Model(id=service.name, created=int(time.time()))

    @app.get("/v1/models", responses={401: TROUBLE[401]}, tags=["facts"])
    async def models() -> Models:
        """What is served."""
        return Models(data=[model])

    @app.get("/v1/models/{name:path}", responses={401: TROUBLE[401], 404: TROUBLE[404]}, tags=["facts"])
    async def one_model(name: str) -> Model:
        """One of the models."""
        check_model(service, name)
        return model

    @app.get("/health", responses={503: TROUBLE[503]}, tags=["facts"])
    async def health() -> dict[str, str]:
        """Whether the process is alive: if not, restart it."""
        if service.failure is not None:
            raise Refused(503, "the model has stopped working")
        return {"status": "ok"}

    @app.get("/ready", responses={503: TROUBLE[503]}, tags=["facts"])
    async def ready() -> dict[str, str]:
        """Whether requests may be sent here now."""
        if not service.ready:
            raise Refused(503, "not ready: starting or stopping")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, tags=["facts"])
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_methods(app: FastAPI) -> None:
    """HEAD where there is GET, and 405 for what a path does not know: a page mounted at "/" would be asked for it."""
    for route in [route for route in app.routes if isinstance(route, APIRoute)]:
        methods = set(route.methods or ())
        methods |= {"HEAD"} if "GET" in methods else set()
        refuse = partial(_not_allowed, ", ".join(sorted(methods)))
        if "GET" in methods:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
        app.add_api_route(route.path, refuse, methods=sorted(METHODS - methods), include_in_schema=False)


async def _not_allowed(allowed: str) -> Response:
    raise Refused(405, "Method Not Allowed", headers={"Allow": allowed})


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the answer to mistakes that FastAPI gives where nobody says otherwise."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong has OpenAI's form, and says nothing of how the server is made."""

    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response

    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return Refused(error.status_code, str(error.detail), headers=error.headers).response

    async def mistaken(_: Request, error: QwenVLError) -> JSONResponse:
        return mistake(error).response

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda found: len(found["loc"]))  # of several forms, the one that was meant
        if first["type"] == "json_invalid":
            return Refused(
                400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}"
            ).response
        where = ".".join(_steps(first["loc"][1:], error.body))
        return Refused(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None).response

    app.add_exception_handler(Refused, refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    for kind in (PromptError, ImageError, ConfigError):
        app.add_exception_handler(kind, mistaken)  # type: ignore[arg-type]


def _steps(place: Sequence[str | int], body: Any) -> Iterator[str]:  # noqa: ANN401 - JSON
    """Where in a body a mistake is, without the names of the types that were tried on the way."""
    for at, step in enumerate(place, 1):
        try:
            body = body[step]
        except (LookupError, TypeError):  # the name of a type; or, at the end, of what is missing
            if at < len(place) or not isinstance(body, dict):
                continue
        yield str(step)
