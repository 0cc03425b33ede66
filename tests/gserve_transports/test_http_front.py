"""How an answer reaches a client: in as few packets as it needs, and no later than it is sent."""

import asyncio
import socket
import sys

import uvloop
from starlette.types import Message, Receive, Scope, Send

from gserve_transports.http_front import listen

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
