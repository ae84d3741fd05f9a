"""What of Gradio is reachable: the paths that its page needs, and files that it keeps itself.

Page       a gr.Blocks that takes no file from a browser but those that were uploaded to it
Gate       middleware: other paths than the page's own are not there, and the page loads nothing from other hosts
log_in     who may open the page, where the server has API keys

Gradio brings more than a page: it fetches URLs for whoever asks (`file=https://...`, and wherever a browser names a
file), streams, records, lists its functions. A server that is open to strangers does without.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import RETRY, Refused
from .rounds import kept

# What the page's own script asks for; a path that ends in a slash or an equals sign stands for all that begin so.
PATHS = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/login", "/login/", "/logout"),
    *("/assets/", "/static/", "/svelte/"),
    *(
        f"/gradio_api/{name}"
        for name in (
            *("queue/join", "queue/data", "cancel", "reset", "heartbeat/", "startup-events", "upload"),
            *("upload_progress", "file=", "login_check", "info", "app_id", "theme.css"),
        )
    ),
)
# Scripts and styles stand in the page itself; whatever is not ours is not loaded, even if it got in.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
MOST_UPLOADED = 1 << 30  # bytes that are kept of what all visitors upload, for an hour or two
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Page(gr.Blocks):
    """Blocks whose functions get no file but an uploaded one; anything else that a browser names is refused."""

    async def preprocess_data(
        self,
        block_fn: Any,  # noqa: ANN401 - Gradio's, as are the others
        inputs: list[Any],
        state: Any,  # noqa: ANN401
        explicit_call: bool = False,
    ) -> list[Any]:
        """As Gradio's, which would fetch a URL before any function of ours sees it."""
        refuse_foreign_files(inputs)
        processed: list[Any] = await super().preprocess_data(block_fn, inputs, state, explicit_call)
        return processed


def refuse_foreign_files(data: Any) -> None:  # noqa: ANN401 - parsed JSON
    """Raise gr.Error where data from a browser names a file that was not uploaded, or asks for a component."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            foreign = "path" in value and not (isinstance(value["path"], str) and kept(value["path"]))
            if foreign or value.get("type") == "component":
                raise gr.Error("This is not a picture that was uploaded here.", print_exception=False)
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


class Gate:
    """ASGI middleware around Gradio's app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what the page needs, with headers that keep it to itself."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A mounted app's path stands behind the path that it is mounted at.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not is_open(path or "/"):
            await Refused(404, "Not Found").response(scope, receive, send)
            return
        if path == "/gradio_api/upload" and await asyncio.to_thread(uploaded) > MOST_UPLOADED:
            full = Refused(429, "the server keeps as many pictures as it can: try again later", headers=RETRY)
            await full.response(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers)


def uploaded() -> int:
    """Bytes of all that has been uploaded and is still kept."""
    return sum(file.stat().st_size for file in Path(get_upload_folder()).rglob("*") if file.is_file())


def is_open(path: str) -> bool:
    """Whether the page needs this path. Of files, only those that Gradio keeps, which it looks up itself."""
    if path.startswith("/gradio_api/file="):
        return kept(path.removeprefix("/gradio_api/file=")) is not None
    return any(path == known or (known[-1] in "/=" and known != "/" and path.startswith(known)) for known in PATHS)


def log_in(keys: Sequence[str]) -> Callable[[str, str], bool]:
    """A check for Gradio's log-in: any name, and one of the keys as the password."""
    known = [key.encode() for key in keys]

    def check(name: str, password: str) -> bool:  # noqa: ARG001 - Gradio asks for a name
        given = password.encode("utf-8", "surrogatepass")
        return sum(hmac.compare_digest(given, key) for key in known) > 0  # all are compared: time tells nothing

    return check
