"""A web server on the loopback that serves a picture and every kind of trouble, for tests of fetching."""

import contextlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


def png() -> bytes:
    """A red picture's file."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return stream.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Pictures and every kind of trouble, each under its own path."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing: tests are quiet."""

    def do_GET(self) -> None:
        """Answer by the path."""
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        name = self.path.split("/")[1].partition("?")[0]
        with contextlib.suppress(OSError):  # of a client that has left, as it should
            getattr(self, f"answer_{name}", self.answer_missing)()
        self.close_connection = True

    def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        """A whole answer; `length` announces another length than the body has."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def answer_missing(self) -> None:
        """No such page."""
        self.reply(b"no", 404)

    def answer_ok(self) -> None:
        """A picture."""
        self.reply(png())

    def answer_chunked(self) -> None:
        """A picture in pieces."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for byte in png():
            self.wfile.write(b"1\r\n%c\r\n" % byte)
        self.wfile.write(b"0\r\n\r\n")

    def answer_to(self) -> None:
        """A redirect to what follows in the path."""
        self.reply(b"", 302, Location=self.path[len("/to/") :])

    def answer_loop(self) -> None:
        """A redirect to itself."""
        self.reply(b"", 301, Location="/loop")

    def answer_announced(self) -> None:
        """More bytes than allowed, by its own word."""
        self.reply(b"x", length=5001)

    def answer_short(self) -> None:
        """Less than it announces."""
        self.reply(png(), length=len(png()) + 10)

    def answer_endless(self) -> None:
        """A body without end, as fast as it goes."""
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 1000)

    def answer_drip(self) -> None:
        """A byte now and then, for ever."""
        self.send_response(200)
        self.end_headers()
        self.drip(b"x")

    def answer_headers(self) -> None:
        """A header now and then, for ever."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self.drip(b"A: b\r\n")

    def answer_wait(self) -> None:
        """Provisional answers, for ever."""
        self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")

    def drip(self, data: bytes) -> None:
        """Send it again and again until the client leaves or the test is over."""
        while not self.server.over.wait(0.02):
            self.wfile.write(data)

    def answer_silent(self) -> None:
        """Nothing at all."""
        self.server.over.wait(5)

    def answer_garbage(self) -> None:
        """Not HTTP."""
        self.wfile.write(b"\xff\xfe\n\n" * 50)


class Server(ThreadingHTTPServer):
    """A server on the loopback that remembers who came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> Any:
        """Count each connection, also one that never asks for anything."""
        self.connections += 1
        return super().get_request()
