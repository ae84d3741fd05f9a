"""What stands before every route: who may come in, and how much may be sent for how long.

Guard   an ASGI middleware

Two things here keep pages in a browser on this machine from asking a server that has no keys. JSON alone is taken, and
announced as JSON: a browser asks first whether it may send that, and is told no, but to the settings' `cors_origins`.
And a name that a page's owner has resolve to this machine (DNS rebinding) is none of the settings' `hosts`.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
import uuid
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import RETRY, Refused
from .settings import Settings

if TYPE_CHECKING:
    from .metrics import Metrics

PROTECTED = "/v1"  # what API keys are for
JSON_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/grounding")
KNOWN = (*JSON_ROUTES, "/v1/models", "/health", "/ready", "/metrics")
BODIES = 16  # of the largest size, that may be held at once; each is kept until its request is answered
# Values in a request's JSON: each but the first stands behind one of these marks. They take Python microseconds each,
# on the event loop; as text, no context has room for as many.
MARKS, VALUES = b",[{", 50_000


class Guard:
    """Checks keys, counts a body's bytes and seconds as they come, and notes how each request ended.

    A body is refused as soon as it passes the settings' limits, whatever its Content-Length has announced; all bodies
    together are bounded, too. Errors that nobody has caught become OpenAI's JSON without a word of what they were.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._keys = [key.encode() for key in settings.api_keys]
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, body = False, _Body(self, scope, receive)

        async def reply(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = uuid.uuid4().hex
                if not body.whole:  # nobody is going to read the rest
                    headers["Connection"] = "close"
                path = scope["path"] if scope["path"] in KNOWN else "other"
                self.metrics.answered(path, message["status"])
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, body.receive, reply)
        except Refused as refused:
            if begun:
                raise
            await refused.response(scope, receive, reply)
        except Exception:
            if not begun:
                await Refused(500, "the server failed; its log says why").response(scope, receive, reply)
            raise
        finally:
            self._held -= body.count

    def hold(self, count: int) -> None:
        """So many bytes more. Raises Refused where there are too many."""
        self._held += count
        if self._held > BODIES * self.settings.max_body_bytes:
            raise Refused(
                429, "the server holds as many requests as it can: try again", code="queue_full", headers=RETRY
            )

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        if self._keys and (scope["path"] + "/").startswith(PROTECTED + "/"):
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
        announced = headers.get("content-length")
        if announced is not None and "transfer-encoding" in headers:
            raise Refused(400, "a request has a Content-Length or a Transfer-Encoding, not both")
        if announced and announced.isascii() and announced.isdigit() and int(announced[:20]) > self._most:
            raise self.too_large()
        if scope["method"] == "POST" and scope["path"] in JSON_ROUTES:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" or headers.get("content-encoding", "identity") != "identity":
                raise Refused(415, "send JSON, not compressed: Content-Type: application/json")

    def _check_host(self, given: str) -> None:
        """Numbers are no names: whoever gives them has the right machine."""
        if not self.settings.hosts or not given:
            return
        try:
            name = urlsplit(f"//{given}").hostname or ""
            if name in self.settings.hosts:
                return
            ipaddress.ip_address(name)
        except ValueError:
            raise Refused(
                421, f"this server does not answer to {given!r}; if it should, start it with --allow-host"
            ) from None

    @property
    def _most(self) -> int:
        return self.settings.max_body_bytes

    def too_large(self) -> Refused:
        """For a body beyond the limit."""
        return Refused(
            413,
            f"a request may have {self._most} bytes: send smaller or fewer pictures",
            code="too_large",
        )


class _Body:
    """A request's body on its way in, which is refused where it is too much or comes too slowly.

    Attributes:
        count: bytes that have come.
        whole: all of it has, or there is none.
    """

    def __init__(self, guard: Guard, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        self.count, self._values = 0, 0
        self.whole = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self._guard, self._receive = guard, receive
        self._is_json = scope["path"] in JSON_ROUTES
        self._deadline = time.monotonic() + guard.settings.body_timeout

    async def receive(self) -> Message:
        """The next piece, counted; when there are no more, this waits for the client to leave."""
        if self.whole:
            return await self._receive()
        try:
            with anyio.fail_after(max(self._deadline - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            raise Refused(408, f"the body did not arrive in {self._guard.settings.body_timeout:g} seconds") from None
        piece = message.get("body", b"")
        self.count += len(piece)
        self._guard.hold(len(piece))
        self.whole = not message.get("more_body", False)
        if self.count > self._guard.settings.max_body_bytes:
            raise self._guard.too_large()
        if self._is_json:
            self._values += sum(map(piece.count, MARKS))
            if self._values > VALUES:
                raise Refused(413, f"a request may hold {VALUES} values", code="too_large")
        return message
