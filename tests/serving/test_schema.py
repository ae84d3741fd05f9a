"""What the OpenAPI document says is what the server does: Schemathesis reads the one and tries the other."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers import Running, data_url, picture

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/grounding")
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
MODES = {"as it says": GenerationMode.POSITIVE, "as it forbids": GenerationMode.NEGATIVE}


def attempt(server: Running, route: str, mode: GenerationMode, examples: int) -> dict[int, int]:
    """So many requests, the same each time, as long as the constants of the modules that have been imported are.

    Gives how many were answered with each status.
    """
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: dict[int, int] = {}

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(document[route]["POST"].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = sensible(case.body, server.service.name)
        response = case.call(timeout=30)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        rejects = mode is GenerationMode.NEGATIVE and response.status_code != 413  # which Schemathesis takes for none
        case.validate_response(response, checks=(*CHECKS, negative_data_rejection) if rejects else CHECKS)

    check()
    return statuses


def sensible(body: Any, model: str) -> Any:
    """The same, of the model that is there, with few tokens and pictures that are some: else all of it were refused."""
    body = {**body, "model": model}
    if "image" in body:
        return {**body, "image": data_url(picture("red", (8, 8)))}
    for unanswerable in ("max_completion_tokens", "images", "n", "top_logprobs", "tool_choice"):
        body.pop(unanswerable, None)
    if "messages" in body:
        said = [m for m in body["messages"] if m["role"] == "assistant" and not m.get("tool_calls")]
        body["messages"] = [{"role": "user", "content": "a"}, *said, {"role": "user", "content": "b"}]
    return {**body, "max_tokens": 2}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES)
def test_the_document_is_kept(server: Running, route: str, mode: str) -> None:
    """What it allows is answered or refused in the form it names; what it forbids is refused; nothing is a 5xx."""
    statuses = attempt(server, route, MODES[mode], 15 if MODES[mode] is GenerationMode.POSITIVE else 60)
    assert server.chat(max_tokens=2).status_code == 200
    if MODES[mode] is GenerationMode.POSITIVE:
        assert statuses.get(200, 0) > 2, statuses
    else:
        assert set(statuses) <= {400, 413}, statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("route", ROUTES)
def test_the_document_is_kept_at_length(server: Running, route: str, mode: str) -> None:
    """The same, with more attempts."""
    attempt(server, route, MODES[mode], 1000)
    assert server.chat(max_tokens=2).status_code == 200
