"""The server's process: it listens, says where, and leaves when it is told to, once what runs has ended.

listen      a socket, before anything that takes long
serve       answer until a signal comes
config_of   how uvicorn is set up
"""

from __future__ import annotations

import asyncio
import socket
import sys
import webbrowser
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError
from .service import Service

CONNECTIONS = 1000  # at once; more are told 503
HEAD_TIMEOUT = 20.0  # seconds for a request's head to arrive: idle connections are closed then
READ_TIMEOUT = 60.0  # seconds for a client to read some of what waits for it
LEAVING = 0.3  # seconds for the last words to reach those who read them


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises ConfigError where that cannot be."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"a port is a number from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)  # now: two who have only bound the port would both believe that it is theirs
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

    _Server(config_of(app, service), service, started).run(sockets=[listening])


def config_of(app: FastAPI, service: Service) -> uvicorn.Config:
    """How uvicorn is set up."""
    return uvicorn.Config(
        app,
        http=Connection,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(service.settings.grace) + 5,
        server_header=False,
    )


class Connection(H11Protocol):
    """A connection as uvicorn has it, but for no longer than a client keeps it busy.

    Else as many silent clients as there may be connections would shut all others out. Of uvicorn's two parsers this is
    the one that bounds the size of a request's head: to 64 KB.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a head
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEAD_TIMEOUT, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # it has arrived
            _cancel(self._waiting)
            self._waiting = None
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_TIMEOUT, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._waiting, self._stuck)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(READ_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._stuck)
        super().resume_writing()


def _cancel(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()


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
