"""What an attacker sends, and what must not come of it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image
from servers import Running

TELLTALES = ("Traceback", 'File "', "site-packages", ".py", ", line ", " at 0x", "object at", "qwenvl.", "root:")


def refused(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error object of a request that was refused, in OpenAI's form and in one line, which gives nothing away."""
    assert answer.status_code in (statuses or (400,)), (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert 0 < len(message) <= 500
    assert message.isprintable()
    assert not any(telltale in answer.text for telltale in TELLTALES), answer.text
    return body["error"]


def well(server: Running) -> None:
    """It is alive, nothing is left behind, and the next to ask is answered."""
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
    assert server.chat(max_tokens=2).status_code == 200
    end = time.monotonic() + 10
    while server.service.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert server.service.busy == 0


# ---- what it does behind our back


@dataclass
class Seen:
    """What threads other than the test's own have opened, resolved, connected to and started."""

    by: int = field(default_factory=threading.get_ident)
    files: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)


_watching: list[Seen] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or threading.get_ident() == _watching[0].by:
        return
    seen = _watching[0]
    if event in ("open", "os.listdir", "os.scandir"):
        seen.files.append(str(arguments[0]))
    elif event == "socket.getaddrinfo":
        seen.names.append(str(arguments[0]))
    elif event == "socket.connect":
        seen.peers.append(str(arguments[1][0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.programs.append(str(arguments))


sys.addaudithook(_note)  # for good: there is no way to remove one


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """What happens in the block."""
    _watching.append(Seen())
    try:
        yield _watching[0]
    finally:
        _watching.clear()


# ---- raw connections


@contextlib.contextmanager
def connected(server: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection that has sent this."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(sent)
        yield sock


def dribble(sock: socket.socket, piece: bytes) -> None:
    """A piece now and then, for as long as the server listens."""
    with contextlib.suppress(OSError):
        for _ in range(15):
            sock.sendall(piece)
            time.sleep(0.02)


def pour(sock: socket.socket, piece: bytes, limit: int = 100 << 20) -> int:
    """A piece after the other, as fast as they go, to the limit or until the server closes. Gives how much went."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < limit:
            sent += sock.send(piece)
    return sent


def received(sock: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 16):
            said += piece
    return said


def head(length: int | str | None = None, *lines: str, path: str = "/v1/chat/completions") -> bytes:
    """Of a POST."""
    told = [] if length is None else [f"Content-Length: {length}"]
    fixed = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *told, *lines, "", ""]).encode()


def question(server: Running, **more: Any) -> bytes:
    """A body that is answered."""
    messages = [{"role": "user", "content": "hello"}]
    return json.dumps({"model": server.service.name, "messages": messages, "max_tokens": 2, **more}).encode()


# ---- pictures


def file_of(image: Image.Image, kind: str, **more: Any) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def url_of(data: bytes, kind: str = "image/png") -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that says it is so large, whatever it holds; `extra` stands before its pixels."""
    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(b"\0" * (height * (3 * width + 1) if width * height < 1e6 else 100)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", start) + extra + pixels + _chunk(b"IEND", b"")


def hostile_pictures() -> dict[str, bytes]:
    """Files that no server may choke on: all of them are refused."""
    small = Image.new("RGB", (8, 8), "red")
    jpeg, gif = file_of(small, "JPEG"), file_of(small.convert("P"), "GIF")
    progressive = file_of(small, "JPEG", progressive=True)
    scan, end = progressive.rindex(b"\xff\xda"), progressive.rindex(b"\xff\xd9")
    scans = progressive[scan:end]
    colours = 13 + 3 * (2 << (gif[10] & 7))  # where a GIF's first block begins
    bomb = zlib.compress(b"\0" * (4 << 20))
    return {
        "10,000 x 10,000": png_of(10_000, 10_000),
        "65,535 x 65,535": png_of(65_535, 65_535),
        "two billion squared": png_of(2**31 - 1, 2**31 - 1),
        "forty million in a row": png_of(40_000_000, 1),
        "forty million in a column": png_of(1, 40_000_000),
        "no pixels": png_of(0, 0),
        "a text that inflates": png_of(4, 4, _chunk(b"zTXt", b"a\0\0" + bomb)),
        "a profile that inflates": png_of(4, 4, _chunk(b"iCCP", b"a\0\0" + bomb)),
        "many texts that inflate": png_of(4, 4, _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 1_000_000)) * 80),
        "many chunks": png_of(4, 4, _chunk(b"tEXt", b"a\0") * 9000),
        "many empty pieces": png_of(4, 4, _chunk(b"IDAT", b"") * 9000),
        "a GIF's comments": gif[:colours] + b"!\xfe\x01a\0" * 9000 + gif[colours:],
        "a GIF's comment in pieces": gif[:colours] + b"!\xfe" + b"\x01a" * 9000 + b"\0" + gif[colours:],
        "EXIF data in pieces": jpeg[:2] + b"\xff\xe1\x00\x09Exif\0\0a" * 9000 + jpeg[2:],
        "a JPEG's scans": progressive[:end] + scans * 99 + progressive[end:],
        "scans behind a false end": progressive[:end] + b"\xff\xfe\0\x04\xff\xd9" + scans * 99 + progressive[end:],
        "half a PNG": file_of(Image.effect_noise((64, 64), 90), "PNG")[:-2000],
        "half a JPEG's head": jpeg[:300],
        "nothing but a signature": b"\x89PNG\r\n\x1a\n",
        "BMP": file_of(small, "BMP"),
        "TIFF": file_of(small, "TIFF"),
        "PPM": file_of(small, "PPM"),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch/F(/bin/sh)>>>>endobj\n%%EOF",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "an entity": b"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg>&e;</svg>",
        "HTML": b"<html><script>alert(1)</script></html>",
        "ZIP": b"PK\x03\x04" + b"\0" * 100,
        "a GIF's script": b"GIF89a/*\0\0\0\0*/=1;alert(1)//" + b"\0" * 40,
        "a program": b"\x7fELF" + b"\0" * 100,
        "a pickle": b"cos\nsystem\n(S'true'\ntR.",
    }


def odd_pictures() -> dict[str, bytes]:
    """Files that are pictures, whatever else they are."""
    small = Image.new("RGB", (8, 8), "red")
    frames = [Image.new("P", (8, 8), number) for number in range(1, 200)]
    return {
        "an animation": file_of(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "JPEG and ZIP": file_of(small, "JPEG") + b"PK\x03\x04" + b"\0" * 1000,
        "PNG and HTML": file_of(small, "PNG") + b"<script>alert(1)</script>",
        "a script in the comment": file_of(small, "JPEG", comment=b"<?php system($_GET['c']); ?>"),
        "progressive": file_of(Image.effect_noise((99, 99), 90), "JPEG", progressive=True),
        "a large profile": png_of(4, 4, _chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 900_000))),
    }
