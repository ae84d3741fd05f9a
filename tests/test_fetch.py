"""qwenvl.fetch: a picture behind a URL arrives within the policy's limits, and nothing of a private network does."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from loopback import Server, png

from qwenvl import fetch as module
from qwenvl.errors import ImageError
from qwenvl.fetch import LIBRARY_POLICY, ImagePolicy, fetch, is_public
from qwenvl.image import open_image

LOCAL = ImagePolicy(allow_private_addresses=True, max_bytes=5000, timeout=5, max_redirects=3)
HASTY = ImagePolicy(allow_private_addresses=True, max_bytes=5000, timeout=0.3)
PUBLIC, PRIVATE = "93.184.216.34", "192.168.1.1"


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


def refused(url: str, policy: ImagePolicy = LIBRARY_POLICY) -> str:
    """The message, always one line."""
    with pytest.raises(ImageError) as caught:
        fetch(url, policy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    return str(caught.value)


def answers(*addresses: str) -> Callable[..., list[Any]]:
    """A resolver with one fixed answer."""
    return lambda _host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]


class FakeSocket:
    """A socket that connects to anything, on paper."""

    connected: list[str]  # set by the test
    peer = PUBLIC

    def __init__(self, *_: object) -> None:
        """Take what a socket takes."""

    def settimeout(self, _: float) -> None:
        """No time passes."""

    def connect(self, address: tuple[str, int]) -> None:
        """Remember it."""
        self.connected.append(address[0])

    def getpeername(self) -> tuple[str, int]:
        """Who is at the other end."""
        return self.peer, 80

    def sendall(self, _: bytes) -> None:
        """Nothing may be sent in these tests."""
        raise ConnectionResetError("sent")

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> "FakeSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- what arrives


def test_a_picture_arrives_and_is_asked_for_plainly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole or in pieces; no compression is asked for, and a proxy in the environment is not used."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(server.url + "/ok", LOCAL) == png()
    assert fetch(server.url + "/chunked", LOCAL) == png()
    assert open_image(f" {server.url}/ok\n", LOCAL).getpixel((0, 0)) == (255, 0, 0)
    path, headers = server.requests[0]
    assert path == "/ok"
    assert headers["host"] == f"127.0.0.1:{server.server_port}"
    assert headers["accept-encoding"] == "identity"


def test_redirects_are_followed_a_few_times(server: Server) -> None:
    """Absolute and relative ones, but not more than the policy says."""
    assert fetch(f"{server.url}/to//to/{server.url}/ok", LOCAL) == png()
    assert "redirect" in refused(server.url + "/loop", LOCAL)
    assert [path for path, _ in server.requests].count("/loop") == 4
    assert "redirect" in refused(server.url + "/to//ok", ImagePolicy(allow_private_addresses=True, max_redirects=0))


def test_paths_and_queries_are_sent_as_meant(server: Server) -> None:
    """Spaces and other alphabets are escaped, what is escaped already stays, and a line break injects no header."""
    assert fetch(server.url + "/ok/图 片.png?q=狗&a=%20b#part", LOCAL) == png()
    assert server.requests[-1][0] == "/ok/%E5%9B%BE%20%E7%89%87.png?q=%E7%8B%97&a=%20b"
    fetch(server.url + "/ok/a\r\nX-Evil: 1\r\n", LOCAL)
    assert "x-evil" not in server.requests[-1][1]


# ---- limits


def test_oversized_bodies_are_refused(server: Server) -> None:
    """By their announced length before a byte is read, or as soon as the limit is passed."""
    assert "5001 bytes" in refused(server.url + "/announced", LOCAL)
    assert "5000 bytes" in refused(server.url + "/endless", LOCAL)


@pytest.mark.parametrize("path", ["/drip", "/headers", "/wait", "/silent"])
def test_slow_answers_end_at_the_deadline(server: Server, path: str) -> None:
    """Bytes that trickle in do not extend the time, in the body, in the headers or before them."""
    start = time.monotonic()
    assert "0.3 seconds" in refused(server.url + path, HASTY)
    assert time.monotonic() - start < 2


def test_a_slow_resolver_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's resolver has no timeout of its own."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(5))
    start = time.monotonic()
    assert "0.3 seconds" in refused("http://slow.example/", HASTY)
    assert time.monotonic() - start < 2
    over.set()


def test_failures_are_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing page, a broken transfer, no HTTP, no server, no such host, TLS where there is none."""
    assert "404" in refused(server.url + "/nothing", LOCAL)
    assert "broke off 10 bytes" in refused(server.url + "/short", LOCAL)
    refused(server.url + "/garbage", LOCAL)
    refused("http://127.0.0.1:1/", LOCAL)
    refused(server.url.replace("http:", "https:"), LOCAL)
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    assert "not known" in refused("http://no-such-host.example/", LOCAL)


def test_what_is_no_picture_is_told_by_its_url(server: Server) -> None:
    """A body that is no picture is refused like any other bytes."""
    with pytest.raises(ImageError, match="drip"):
        open_image(server.url + "/drip", HASTY)
    with pytest.raises(ImageError, match="404"):
        open_image(server.url + "/x", LOCAL)


# ---- policy


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "gopher://example.com",
        "//example.com/a.png",
        "http:///a.png",
        "http://user:secret@example.com/a.png",
        "http://user:secret@[::1/a.png",
        "http://user:secret@example.com:x/",
        "http://user@example.com/",
        "http://@example.com/",
        "http://example.com:99999/",
        "http://example.com:port/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://a..b/",
        "http://" + "a" * 70 + ".com/",
        "http://exa mple.com/",
        "http://example.com\\@127.0.0.1/",
    ],
)
def test_urls_that_are_refused_without_asking_anyone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other schemes, credentials and malformed hosts are not even resolved, and no password is shown."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved"))
    assert "secret" not in refused(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0.0.0.0",
        "１２７.0.0.1",
        "127。0。0。1",
    ],
)
def test_private_hosts_are_refused_without_a_connection(server: Server, host: str) -> None:
    """However the loopback is spelt: decimal, hexadecimal, octal, short, in full-width digits."""
    refused(f"http://{host}:{server.server_port}/ok")
    assert server.connections == 0
    assert not server.requests


def test_no_urls_means_not_even_a_name_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy without URLs asks no resolver."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved"))
    assert "data URL" in refused("http://example.com/a.png", ImagePolicy(allow_urls=False))
    only = ImagePolicy(allowed_domains=("Example.com",))
    for host in ("example.org", "notexample.com", "example.com.evil.org", "127.0.0.1"):
        assert "hosts" in refused(f"http://{host}/a.png", only)
    monkeypatch.setattr(socket, "getaddrinfo", answers(PRIVATE))
    for host in ("example.com", "img.EXAMPLE.com"):
        assert "public" in refused(f"http://{host}/a.png", only)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        (PUBLIC, True),
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("192.0.0.192", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("233.252.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("0.0.0.0", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:c0a8:101::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2001:db8::1", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    """Loopback, private, link-local, shared, multicast, reserved, and IPv4 wrapped in IPv6 are told from the rest."""
    assert is_public(address) is public


def test_every_address_of_a_host_has_to_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """One private address among public ones is enough to refuse the host before anything is connected."""
    monkeypatch.setattr(FakeSocket, "connected", [], raising=False)
    monkeypatch.setattr(module.socket, "socket", FakeSocket)
    monkeypatch.setattr(socket, "getaddrinfo", answers(PUBLIC, PRIVATE))
    assert PRIVATE in refused("http://mixed.example/")
    assert FakeSocket.connected == []


def test_a_name_that_changes_its_answer_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the address that was looked at is the one that is connected to, whatever a second answer says."""
    monkeypatch.setattr(FakeSocket, "connected", [], raising=False)
    monkeypatch.setattr(module.socket, "socket", FakeSocket)
    given = iter([answers(PUBLIC), answers("127.0.0.1")])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: next(given)(*a, **k))
    assert "sent" in refused("http://rebind.example/")
    assert FakeSocket.connected == [PUBLIC]


def test_the_peer_is_looked_at_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the connection end somewhere else than its address, no request is made."""
    monkeypatch.setattr(FakeSocket, "connected", [], raising=False)
    monkeypatch.setattr(FakeSocket, "peer", "127.0.0.1")
    monkeypatch.setattr(module.socket, "socket", FakeSocket)
    monkeypatch.setattr(socket, "getaddrinfo", answers(PUBLIC))
    message = refused("http://elsewhere.example/")
    assert "127.0.0.1" in message
    assert "sent" not in message


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.2:{port}/ok", "//127.0.0.2:{port}/ok", "http://[::1]:{port}/ok", "file:///etc/passwd", "data:,x"],
)
def test_each_redirect_is_looked_at_anew(server: Server, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """A public host must not send us into the private network, nor to another scheme."""
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    refused(f"{server.url}/to/{target.format(port=server.server_port)}")
    assert len(server.requests) == server.connections == 1


def test_the_allowed_hosts_hold_for_redirects(server: Server) -> None:
    """An allowed host cannot send us to another."""
    policy = ImagePolicy(allow_private_addresses=True, allowed_domains=("127.0.0.1",))
    assert fetch(f"{server.url}/to//ok", policy) == png()
    assert "hosts" in refused(f"{server.url}/to/http://localhost:{server.server_port}/ok", policy)


def test_the_next_address_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose first address takes no connection is reached at its second."""

    def two(_: str, port: int, **__: object) -> list[Any]:
        return answers("127.0.0.1")("", 1) + answers("127.0.0.1")("", port)

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert fetch(server.url + "/ok", LOCAL) == png()


def test_a_silent_address_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose IPv6 address swallows packets is still reached in time at its IPv4 address."""
    waits: list[float] = []

    def connect(self: FakeSocket, address: tuple[str, int]) -> None:
        self.connected.append(address[0])
        if len(self.connected) == 1:
            raise TimeoutError

    monkeypatch.setattr(FakeSocket, "connected", [], raising=False)
    monkeypatch.setattr(FakeSocket, "connect", connect)
    monkeypatch.setattr(FakeSocket, "settimeout", lambda _, seconds: waits.append(seconds))
    monkeypatch.setattr(module.socket, "socket", FakeSocket)
    monkeypatch.setattr(socket, "getaddrinfo", answers(PUBLIC, "8.8.8.8"))
    assert "sent" in refused("http://two.example/", ImagePolicy(timeout=8))
    assert FakeSocket.connected == [PUBLIC, "8.8.8.8"]
    assert 3 < waits[0] < 4 < waits[1] < 8


def test_certificates_are_verified(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS asks for a certificate and for the host's name in it."""
    seen = []

    def wrap(self: ssl.SSLContext, _: socket.socket, server_hostname: str) -> None:
        seen.append((self.verify_mode, self.check_hostname, server_hostname))
        raise ssl.SSLError(1, "self-signed certificate")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", wrap)
    assert "self-signed" in refused(server.url.replace("http:", "https:"), LOCAL)
    assert seen == [(ssl.CERT_REQUIRED, True, "127.0.0.1")]
