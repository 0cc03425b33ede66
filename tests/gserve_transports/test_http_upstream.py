"""The gateway's connections to servers: requests end with them, and none stays open that nobody needs."""

import asyncio
import itertools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from gserve_core.interfaces import Address
from gserve_transports.http_front import listen
from gserve_transports.http_upstream import Gone, Upstream
from tests.gserve_transports.noted import left_open

MOMENTS = 30
"""Number of turns of the event loop after which a request is disturbed. It takes a third of them, with TLS too."""


@asynccontextmanager
async def server(may_answer: asyncio.Event, certificate: Path | None) -> AsyncIterator[Callable[[], Upstream]]:
    """Listen, and answer once that is allowed. Yields what returns a new way to this server."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    file = None if certificate is None else str(certificate)
    async with listen(app, "127.0.0.1", 0, certfile=file, keyfile=file) as address:
        yield lambda: Upstream(address, None if certificate is None else accept_any())


def accept_any() -> ssl.SSLContext:
    """Return a client's TLS that accepts any certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls


async def ask(upstream: Upstream) -> bytes | None:
    """Return the body of the answer to a request."""
    answer = await upstream.request("GET", b"/", [], b"")
    try:
        return await answer.part()
    finally:
        upstream.finish(answer)


@contextmanager
def prompt_server(certificate: Path | None) -> Iterator[Address]:
    """Listen in a thread, and answer one request on each connection. Yields the address."""
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)

    def answer(listening: socket.socket) -> None:
        while True:
            line, _ = listening.accept()
            with line, suppress(OSError), line if tls is None else tls.wrap_socket(line, server_side=True) as line:
                if line.recv(1 << 16):
                    line.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        answering = threads.submit(answer, listening)
        yield Address(["127.0.0.1"], listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
        assert isinstance(answering.exception(60), OSError)


@pytest.mark.parametrize("by_tls", [False, True])
def test_a_request_that_is_cancelled_at_any_moment_leaves_no_connection_open(by_tls: bool, certificate: Path) -> None:
    problems: list[dict[str, Any]] = []

    async def cancel(address: Address) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        for turns in itertools.count():
            upstream = Upstream(address, accept_any() if by_tls else None)
            asking = asyncio.create_task(ask(upstream))
            for _ in range(turns):
                await asyncio.sleep(0)
                time.sleep(0.005)  # holds the loop, so that the server's part arrives within this turn
            asking.cancel()
            await asyncio.wait([asking])
            upstream.close()
            if turns >= MOMENTS - 1 and not asking.cancelled():  # the server's thread may be late
                break
        assert asking.result() == b"ok"

    with prompt_server(certificate if by_tls else None) as address:
        assert left_open(cancel(address)) == []
    assert problems == []


@pytest.mark.parametrize("by_tls", [False, True])
def test_a_request_ends_with_its_connection_at_any_moment(by_tls: bool, certificate: Path) -> None:
    async def close() -> None:
        may_answer = asyncio.Event()
        async with server(may_answer, certificate if by_tls else None) as connect:
            for turns in range(MOMENTS):
                upstream = connect()
                asking = asyncio.create_task(ask(upstream))
                for _ in range(turns):
                    await asyncio.sleep(0)
                upstream.close()
                await asyncio.wait([asking], timeout=30)
                assert isinstance(asking.exception(), OSError | Gone)
            may_answer.set()

    assert left_open(close()) == []


def test_a_connection_is_used_again_until_its_upstream_is_closed() -> None:
    async def use() -> None:
        may_answer = asyncio.Event()
        may_answer.set()
        async with server(may_answer, None) as connect:
            upstream = connect()
            assert [await ask(upstream) for _ in range(3)] == [b"ok"] * 3
            upstream.close()
            with pytest.raises(OSError, match="were closed"):
                await ask(upstream)

    assert left_open(use()) == []
