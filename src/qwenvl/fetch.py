"""What an image may be read from, and the fetch of a URL under those rules.

    ImagePolicy   the limits, as a frozen dataclass; LIBRARY_POLICY and SERVER_POLICY are the two that we use
    fetch         the bytes behind an http(s) URL
    is_public     whether an address belongs to the open internet

A server that fetches URLs for strangers must not become their door to its own network. So every address that a host
name stands for is looked at before we connect, we connect to the very address that was looked at (a second, different
DNS answer has no effect), each redirect starts over, and proxies named in the environment, which would connect on our
behalf and unseen, are not used. One deadline covers the whole: names, connections, redirects, headers and body.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urljoin, urlsplit

from .errors import ImageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 16  # bytes asked for at a time
REDIRECTS = (301, 302, 303, 307, 308)
DEFAULT_PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"[a-z0-9._:-]+")  # names in ASCII, and addresses
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
PROTOCOL_ASSIGNMENTS = ipaddress.IPv4Network("192.0.0.0/24")  # older Pythons call most of it global

Answer = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]  # one answer of getaddrinfo


@dataclass(frozen=True)
class ImagePolicy:
    """What an image may be read from, and how large it may be.

    `allowed_domains`, when given, are the only hosts (and their subdomains) that URLs may name. `max_bytes` bounds what
    is read of a file, a download or a data URL, `max_pixels` width times height, checked in the header before anything
    is decoded. `timeout` is seconds for a whole fetch, redirects included. `formats` are those of `image.FORMATS` that
    are read; None is all of them.
    """

    allow_files: bool = True
    allow_urls: bool = True
    allowed_domains: tuple[str, ...] | None = None
    allow_private_addresses: bool = False
    max_bytes: int = 32 << 20
    max_pixels: int = 89_478_485  # a quarter of a GiB in RGB, which is where Pillow begins to warn
    timeout: float = 20.0
    max_redirects: int = 5
    formats: tuple[str, ...] | None = None


LIBRARY_POLICY = ImagePolicy()
# A server reads what OpenAI's does. Pillow's readers of the others are partly in Python: 16 MB of PPM take minutes.
SERVER_POLICY = ImagePolicy(allow_files=False, allow_urls=False, formats=("GIF", "JPEG", "PNG", "WEBP"))


def shown(text: str, limit: int = 80) -> str:
    """`text` quoted on one line and cut to about `limit` characters: data URLs do not belong in a message."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def read_limited(read: Callable[[int], bytes], limit: int, name: str) -> bytes:
    """Everything that `read` gives until it gives nothing. Raises ImageError as soon as that passes `limit` bytes."""
    data = bytearray()
    while chunk := read(CHUNK):
        data += chunk
        if len(data) > limit:
            raise ImageError(f"{name} is larger than the limit of {limit} bytes: send a smaller picture")
    return bytes(data)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet's, also where IPv6 only wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if wrapped is not None:
            return is_public(str(wrapped))
        if ip.is_site_local:
            return False
    elif ip in PROTOCOL_ASSIGNMENTS:
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def fetch(url: str, policy: ImagePolicy = LIBRARY_POLICY) -> bytes:
    """The body behind `url`, redirects followed, at most `policy.max_bytes` of it.

    Raises ImageError if the policy forbids the URL, its host or an address, and if the fetch fails or takes too long.
    """
    deadline = _Deadline(policy.timeout)
    try:
        for _ in range(policy.max_redirects + 1):
            result = _get(url, policy, deadline)
            if isinstance(result, bytes):
                return result
            url = result
    except TimeoutError:
        raise ImageError(f"{_named(url)} took longer than {policy.timeout:g} seconds") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host name that IDNA refuses
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{_named(url)} cannot be fetched: {' '.join(reason.split())}") from None
    raise ImageError(f"{_named(url)} is one redirect too many: {policy.max_redirects} are followed")


def _named(url: str) -> str:
    """A URL as messages show it: without user name and password."""
    return shown(re.sub(r"//[^/]*@", "//", url))


class _Deadline:
    """A moment by which everything has to be over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, above zero. Raises TimeoutError when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Stream(io.RawIOBase):
    """The bytes that a socket receives before the deadline.

    A socket's own timeout starts anew with each packet, so that a byte now and then would keep us forever.
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self.sock, self.deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self.sock.settimeout(self.deadline.remaining())
        return self.sock.recv_into(buffer)


class _TimedSocket:
    """As much of a socket as http.client uses, every wait bounded by the deadline. Its maker closes the socket."""

    def __init__(self, sock: socket.socket, deadline: _Deadline) -> None:
        self.sock, self.deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(self.deadline.remaining())
        self.sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self.sock, self.deadline))

    def close(self) -> None:
        pass


def _get(url: str, policy: ImagePolicy, deadline: _Deadline) -> bytes | str:
    """One request: the body, or the absolute URL that it redirects to."""
    scheme, host, port, target = _split(url, policy)
    with _connect(host, port, policy, deadline) as plain, _secured(plain, scheme, host, deadline) as sock:
        connection = http.client.HTTPConnection(host, port)
        connection.default_port = DEFAULT_PORTS[scheme]  # which the Host header leaves out
        connection.sock = cast(socket.socket, _TimedSocket(sock, deadline))
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "qwenvl", "Connection": "close"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in REDIRECTS and location:
            return urljoin(url, location)
        if response.status != 200:
            raise ImageError(f"{_named(url)} answers {response.status} {response.reason[:80]!r} in place of a picture")
        if (response.length or 0) > policy.max_bytes:
            raise ImageError(f"{_named(url)} is {response.length} bytes, over the limit of {policy.max_bytes}")
        body = read_limited(response.read, policy.max_bytes, _named(url))
        if response.length:  # what was announced and did not come
            raise ImageError(f"{_named(url)} broke off {response.length} bytes before its end: try again")
        return body


def _split(url: str, policy: ImagePolicy) -> tuple[str, str, int, str]:
    """Scheme, host in ASCII, port and request target of a URL that the policy allows."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise ImageError(f"{_named(url)} is not a URL: {error}") from None
    if parts.scheme not in DEFAULT_PORTS:
        raise ImageError(f"{_named(url)} is not an http or https URL; a file is given by its path")
    if not policy.allow_urls:
        raise ImageError("URLs are not fetched here: send the picture itself, as bytes or as a data URL")
    if not HOST.fullmatch(host) or "@" in parts.netloc:
        raise ImageError("a picture's URL needs a plain host name, and no user name or password")
    if policy.allowed_domains is not None and not any(
        host == domain or host.endswith("." + domain) for domain in map(str.lower, policy.allowed_domains)
    ):
        raise ImageError(f"{shown(host)} is not one of the hosts that pictures may come from")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
        "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?") if parts.query else ""
    )
    return parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], target


def _connect(host: str, port: int, policy: ImagePolicy, deadline: _Deadline) -> socket.socket:
    """A socket connected to the first address of `host` that takes us, once all of them have been found allowed."""
    answers = _resolve(host, port, deadline)
    if not policy.allow_private_addresses:
        for answer in answers:
            _require_public(answer[4][0], host)
    failure: OSError | None = None
    for tried, (family, kind, protocol, _, address) in enumerate(answers):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(deadline.remaining() / (len(answers) - tried))  # a silent address leaves time for the next
            sock.connect(address)
            if not policy.allow_private_addresses:
                _require_public(sock.getpeername()[0], host)
        except OSError as error:
            sock.close()
            failure = error
        except ImageError:
            sock.close()
            raise
        else:
            return sock
    raise failure or OSError("its host has no address")


def _require_public(address: str, host: str) -> None:
    if not is_public(address):
        raise ImageError(f"{shown(host)} is at {address}, not a public address: pictures are not fetched from there")


def _resolve(host: str, port: int, deadline: _Deadline) -> Sequence[Answer]:
    """Every address of `host`. The system's resolver knows no timeout, so it runs in a thread that we may leave."""
    results: queue.SimpleQueue[Sequence[Answer] | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except BaseException as error:  # to be raised below, where someone waits for it
            results.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        result = results.get(timeout=deadline.remaining())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, BaseException):
        raise result
    return result


def _secured(sock: socket.socket, scheme: str, host: str, deadline: _Deadline) -> socket.socket:
    """The socket itself for http; for https, inside TLS with the certificate and its host name verified."""
    if scheme == "http":
        return sock
    sock.settimeout(deadline.remaining())  # of the whole handshake
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
