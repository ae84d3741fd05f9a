"""What stands before every route: who may come in, and how much may be sent for how long.

Guard   an ASGI middleware
"""

from __future__ import annotations

import hmac
import time
import uuid
from typing import TYPE_CHECKING

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import Refused
from .settings import Settings

if TYPE_CHECKING:
    from .metrics import Metrics

PROTECTED = "/v1"  # what API keys are for
KNOWN = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/grounding", "/health", "/ready", "/metrics")


class Guard:
    """Checks keys, counts a body's bytes and seconds as they come, and notes how each request ended.

    A body is refused as soon as it passes the settings' limits, whatever its Content-Length has announced. Errors that
    nobody has caught become OpenAI's JSON without a word of what they were.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-Request-Id"] = uuid.uuid4().hex
                path = scope["path"] if scope["path"] in KNOWN else "other"
                self.metrics.answered(path, message["status"])
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._bounded(receive), reply)
        except Refused as refused:
            if begun:
                raise
            await refused.response(scope, receive, reply)
        except Exception:
            if not begun:
                await Refused(500, "the server failed; its log says why").response(scope, receive, reply)
            raise

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._keys and (scope["path"] + "/").startswith(PROTECTED + "/") and scope["method"] != "OPTIONS":
            kind, _, text = headers.get("authorization", "").partition(" ")
            given = text.strip().encode("latin-1")  # as headers are decoded
            same = [hmac.compare_digest(given, key) for key in self._keys]  # all of them: no early way out
            if kind.lower() != "bearer" or not any(same):
                raise Refused(
                    401,
                    "this server asks for an API key: Authorization: Bearer ...",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        announced = headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:20]) > self.settings.max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, which refuses what is too much or comes too slowly."""
        count, deadline, whole = 0, time.monotonic() + self.settings.body_timeout, False

        async def bounded() -> Message:
            nonlocal count, whole
            if whole:  # from here on, it waits for the client to leave
                return await receive()
            try:
                with anyio.fail_after(max(deadline - time.monotonic(), 0)):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    408,
                    f"the body did not arrive in {self.settings.body_timeout:g} seconds",
                    headers={"Connection": "close"},
                ) from None
            count += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if count > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> Refused:
        return Refused(
            413,
            f"a request may have {self.settings.max_body_bytes} bytes: send smaller or fewer pictures",
            code="too_large",
            headers={"Connection": "close"},
        )
