"""The server's process: it listens, says where, and leaves when it is told to, once what runs has ended.

listen   a socket, before anything that takes long
serve    answer until a signal comes
"""

from __future__ import annotations

import asyncio
import socket
import sys
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import ConfigError
from .service import Service

CONNECTIONS = 1000  # at once; more are told 503
LEAVING = 0.3  # seconds for the last words to reach those who read them


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises ConfigError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}; choose others by --host and --port"
        ) from None
    return listening


def serve(
    app: FastAPI,
    service: Service,
    listening: socket.socket,
    *,
    web: bool = False,
    share: bool = False,
    inbrowser: bool = False,
) -> None:
    """Answer until SIGINT or SIGTERM. Says in one line where to look, and at the end what has become of what ran."""
    host, port = listening.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    url = f"http://{'localhost' if host in ('0.0.0.0', '::') else place}:{port}"

    def started() -> None:
        what = "the page, and its API under /v1" if web else "the API under /v1"
        print(f"{service.name} is at {url}: {what}; Ctrl-C stops it", flush=True)
        if share:
            print(_shared(port), flush=True)
        if inbrowser:
            webbrowser.open(url)

    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(service.settings.grace) + 5,
        server_header=False,
    )
    _Server(config, service, started).run(sockets=[listening])


class _Server(uvicorn.Server):
    """uvicorn, which ends when the service has, however many pages are still open."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._started = service, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            await asyncio.to_thread(self._started)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.refuse_more()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._end())
        await super().shutdown(sockets)
        await ending

    async def _end(self) -> None:
        running = self._service.busy
        await self._service.stop()
        if running:
            print(f"stopped: of {running} answers, {self._service.cut} were cut off", file=sys.stderr, flush=True)
        await asyncio.sleep(LEAVING)
        self.force_exit = True  # an open page's connection would never end


def _shared(port: int) -> str:
    """A public address, by Gradio's tunnel, or why there is none."""
    import secrets

    from gradio.networking import setup_tunnel

    try:
        url = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # whatever the network has against it
        return f"there is no public address: {' '.join(str(error).split()) or type(error).__name__}"
    return f"for everyone, for a week: {url}; without --api-keys, anybody who has this may use it"
