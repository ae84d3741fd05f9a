"""What a client is told when it does not get an answer, in OpenAI's JSON shape.

Refused                                  the exception; routes, middleware and streams all raise it
mistake, stopping, too_late, too_long    some that are told in several places
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from ..errors import QwenVLError, printable

RETRY = {"Retry-After": "2"}  # seconds that a client who comes at a bad time is asked to wait
SHOWN = 500  # characters of a message; it may quote what was sent
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
}


class Refused(HTTPException):
    """No answer, and why: a status, and the message, code and parameter of OpenAI's error object.

    A child of FastAPI's own, which passes it on from wherever it is raised.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, headers=dict(headers or {}))
        self.message, self.code, self.param = message, code, param

    @property
    def response(self) -> JSONResponse:
        """What is sent."""
        return JSONResponse(self.body, self.status_code, self.headers)

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {...}}: one line of text, whatever was quoted in it."""
        kind = KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        shown = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {name: None if text is None else _line(text) for name, text in shown.items()}}


def mistake(error: QwenVLError) -> Refused:
    """A request that cannot be answered."""
    return Refused(400, str(error), code="invalid_value")


def stopping() -> Refused:
    """The server is told to stop."""
    return Refused(503, "the server is stopping: try again", code="stopping", headers=RETRY)


def too_late() -> Refused:
    """The settings' timeout is over."""
    return Refused(504, "the answer took longer than this server allows", code="timeout")


def too_long(context: int, what: str) -> Refused:
    """The prompt has no room in the context."""
    return Refused(
        400,
        f"the model's context is {context} tokens here, and the prompt alone {what}: shorten it",
        code="context_length_exceeded",
    )


def _line(text: str) -> str:
    one = " ".join(printable(text[: 2 * SHOWN]).split())
    return (one if len(one) <= SHOWN else one[: SHOWN - 3] + "...").encode("utf-8", "replace").decode()
