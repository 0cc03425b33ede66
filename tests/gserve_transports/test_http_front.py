"""How an answer reaches a client: in few packets, and no later than it is sent. How connections end with listening."""

import asyncio
import contextlib
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gserve_transports import http_front
from gserve_transports.http_front import SEND_WHOLE, listen
from tests.gserve_transports.noted import left_open

REQUEST = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
STREAM: Message = {"type": "http.response.start", "status": 200, "headers": []}


SEGMENTS = 152
"""Place of the number of received segments with data in Linux's `struct tcp_info`."""


def read(path: bytes, *, reads: int) -> tuple[list[bytes], int]:
    """Return what an answer brings at each of some reads, and the number of packets that brought it.

    The application ends its answer after the first read.
    """
    has_read = asyncio.Event()

    async def application(scope: Scope, _: Receive, send: Send) -> None:
        await send(STREAM if scope["path"] == "/stream" else HEAD)
        if scope["path"] == "/later":
            await has_read.wait()
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await has_read.wait()
        await send({"type": "http.response.body", "body": b"last"})

    async def ask() -> tuple[list[bytes], int]:
        found = []
        async with listen(application, "127.0.0.1", 0) as address:
            line = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", address.port), 60)
            with line:
                line.sendall(REQUEST % path)
                for _ in range(reads):
                    found.append(await asyncio.to_thread(line.recv, 1 << 16))
                    has_read.set()
                info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SEGMENTS + 4)
        return found, int.from_bytes(info[SEGMENTS:], sys.byteorder)

    return uvloop.run(ask())


def test_a_whole_answer_comes_in_one_packet() -> None:
    assert read(b"/whole", reads=1) == ([b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlast"], 1)


def test_the_head_of_a_stream_comes_with_its_first_part() -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert read(b"/stream", reads=2) == ([head + b"3\r\none\r\n", b"4\r\nlast\r\n0\r\n\r\n"], 2)


def test_a_head_whose_body_takes_longer_comes_at_once() -> None:
    assert read(b"/later", reads=2) == ([b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"last"], 2)


# -------------------------------------------------------------------------------------------- answers sent in one piece


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer in one piece, at `/twice` after an answer has begun."""
    if scope["path"] == "/twice":
        await send(STREAM)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
    await scope["extensions"][SEND_WHOLE](200, [(b"a", b"b")], scope["path"].encode())


def answers(request: bytes, app: ASGIApp = whole) -> bytes:
    """Return what comes to a client that sends `request` at once, and reads until its connection is closed."""

    def exchange(port: int) -> bytes:
        with plain(port) as line:
            line.sendall(request)
            return b"".join(iter(lambda: line.recv(1 << 16), b""))

    async def ask() -> bytes:
        async with listen(app, "127.0.0.1", 0) as address:
            return await asyncio.to_thread(exchange, address.port)

    return uvloop.run(ask())


@pytest.mark.parametrize(("method", "body"), [(b"GET", b"/x"), (b"HEAD", b"")])
def test_a_client_that_asks_for_it_gets_its_connection_closed(method: bytes, body: bytes) -> None:
    request = method + b" /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\na: b\r\ncontent-length: 2\r\nconnection: close\r\n\r\n"
    assert answers(request) == head + body


def test_requests_that_come_at_once_are_answered_in_their_order() -> None:
    requests = b"".join(REQUEST % path for path in (b"/1", b"/2", b"/3"))
    last = b"GET /4 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    found = answers(requests + last)
    assert [found.find(b"\r\n\r\n/%d" % number) > 0 for number in (1, 2, 3, 4)] == [True] * 4
    assert found.count(b"HTTP/1.1 200 OK") == 4
    assert found.index(b"/1") < found.index(b"/2") < found.index(b"/3") < found.index(b"/4")


def test_an_answer_that_has_begun_is_cut_and_gets_no_second_head() -> None:
    found = answers(REQUEST % b"/twice")
    assert found == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n"


@pytest.mark.parametrize("patience", [1.5, 20.0])  # the request must arrive in this time too
def test_a_connection_without_a_next_request_is_closed(monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
    monkeypatch.setattr(http_front, "PATIENCE", patience)
    monkeypatch.setattr(http_front, "IDLE_SECONDS", 2)
    assert answers(REQUEST % b"/x").endswith(b"\r\n\r\n/x")


def test_a_request_that_is_malformed_reaches_no_application() -> None:
    reached = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])
        await whole(scope, receive, send)

    wrong = b"POST /x HTTP/1.1\r\nHost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno number\r\n"
    assert answers(wrong, application).startswith(b"HTTP/1.1 400 ")
    assert reached == []


# ---------------------------------------------------------------------------------------------- at the end of listening


async def vast(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with more than anybody reads."""
    await send(STREAM)
    for _ in range(1000):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})


async def empty(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def plain(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def encrypted(port: int) -> socket.socket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain(port))


def half_encrypted(port: int) -> socket.socket:
    line = plain(port)
    line.sendall(b"\x16\x03\x01\x02\x00\x01")
    return line


def asking(connect: Callable[[int], socket.socket]) -> Callable[[int], socket.socket]:
    """Return a client that has read the beginning of an answer, and reads no more."""

    def ask(port: int) -> socket.socket:
        line = connect(port)
        line.sendall(REQUEST % b"/")
        assert line.recv(12) == b"HTTP/1.1 200"
        return line

    return ask


@pytest.mark.parametrize(
    ("app", "by_tls", "connect", "seconds"),
    [
        (empty, False, plain, 4.5), (empty, True, plain, 4.5), (empty, True, half_encrypted, 4.5),
        (empty, True, encrypted, 4.5), (empty, False, asking(plain), 4.5), (empty, True, asking(encrypted), 4.5),
        (vast, False, asking(plain), 20.0),
    ],
    ids=["silent", "silent-tls", "half-tls", "new-tls", "idle", "idle-tls", "unread"],
)  # fmt: skip
def test_a_connection_ends_with_the_listening_whatever_its_client_does(
    app: ASGIApp, by_tls: bool, connect: Callable[[int], socket.socket], seconds: float, certificate: Path
) -> None:
    file = str(certificate) if by_tls else None
    took = []

    async def serve(stack: contextlib.ExitStack) -> None:
        async with listen(app, "127.0.0.1", 0, certfile=file, keyfile=file) as address:
            stack.enter_context(await asyncio.to_thread(connect, address.port))
            with await asyncio.to_thread(asking(encrypted if by_tls else plain), address.port):
                pass  # so the first one has been accepted, too
            began = time.monotonic()
        took.append(time.monotonic() - began)

    with contextlib.ExitStack() as stack:
        assert left_open(serve(stack)) == []
    assert took[0] < seconds


def test_tls_handshakes_count_as_connections(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_front, "connection_limit", lambda: 4)

    async def serve(stack: contextlib.ExitStack) -> None:
        async with listen(empty, "127.0.0.1", 0, certfile=str(certificate), keyfile=str(certificate)) as address:
            lines = [stack.enter_context(await asyncio.to_thread(plain, address.port)) for _ in range(5)]
            assert await asyncio.to_thread(lines[-1].recv, 1) == b"", "it is closed"
            lines[0].close()
            while True:
                with contextlib.suppress(OSError):
                    stack.enter_context(await asyncio.to_thread(asking(encrypted), address.port))
                    break

    with contextlib.ExitStack() as stack:
        assert left_open(serve(stack)) == []
