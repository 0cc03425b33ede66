"""A server's requests: how items are cancelled, and what a client that does not read may cost."""

import asyncio
import concurrent.futures
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import psutil
import pytest

from gserve import LLMConfig, RemoteError, VLLMServer
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_core.interfaces import Access, Connection
from gserve_core.messages import Failure, Group, Heartbeat, Result, RunRequest
from gserve_transports import HttpTransport

LLM = LLMConfig("m", max_model_len=100_000)
LONG: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 1}


@pytest.fixture(scope="module")
def slow() -> Iterator[VLLMServer]:
    """Return a server with 4 places, which takes 0.05 s for a token."""
    with VLLMServer(LLM, engine=EchoEngine(latency=0.05, capacity=4)) as server:
        yield server


@asynccontextmanager
async def connected(server: VLLMServer) -> AsyncGenerator[Connection]:
    record = server.record()
    access = Access(token=record.token, instance=record.instance, timeout=20.0)
    connection = HttpTransport().connect(record.address, access)
    try:
        yield connection
    finally:
        await connection.close()


async def ends(connection: Connection, request: RunRequest) -> dict[int, Result | Failure]:
    """Return how each item has ended, by its index."""
    found: dict[int, Result | Failure] = {}
    async with aclosing(connection.run(request)) as stream:
        async for events in stream:
            for event in events:
                if not isinstance(event, Heartbeat):
                    assert event.index not in found
                    found[event.index] = event
    return found


async def until_begun(connection: Connection, request: RunRequest) -> "asyncio.Task[dict[int, Result | Failure]]":
    """Begin a request, and return its task once the server has it."""
    task = asyncio.create_task(ends(connection, request))
    await asyncio.sleep(0.5)
    assert not task.done()
    return task


def test_cancelled_items_leave_the_engine_and_end_as_failures_while_the_others_go_on(slow: VLLMServer) -> None:
    async def run() -> None:
        async with connected(slow) as connection:
            groups = [Group(["long"] * 3, LONG), Group(["last " * 40], {"max_tokens": 40})]
            task = await until_begun(connection, RunRequest(groups, id="one"))
            began = time.monotonic()
            await connection.cancel("one", [0, 1, 2, 77, -1])
            next_one = await ends(connection, RunRequest([Group(["a", "b", "c"], SHORT)]))
            assert time.monotonic() - began < 20, "the engine has places again"
            assert all(isinstance(event, Result) for event in next_one.values())
            found = await task
            assert [found[index] for index in range(3)] == [Failure(it, "cancelled", invalid=False) for it in range(3)]
            assert isinstance(found[3], Result)

    asyncio.run(run())


def test_cancelled_items_that_wait_in_the_server_end_at_once(slow: VLLMServer) -> None:
    async def run() -> None:
        async with connected(slow) as connection:
            task = await until_begun(connection, RunRequest([Group(["long"] * 50, LONG)], id="many"))
            began = time.monotonic()
            await connection.cancel("many", list(range(25, 50)))
            await connection.cancel("many", list(range(50)))
            found = await asyncio.wait_for(task, 30)
            assert time.monotonic() - began < 20
            assert len(found) == 50
            assert all(isinstance(event, Failure) for event in found.values())

    asyncio.run(run())


def test_items_that_are_cancelled_before_their_request_comes_are_not_begun(slow: VLLMServer) -> None:
    """Both travel by connections of their own."""

    async def run() -> None:
        async with connected(slow) as connection:
            await connection.cancel("late", [0, 2])
            await connection.cancel("late", [1])
            groups = [Group(["long"] * 3, LONG), Group(["last"], SHORT)]
            found = await asyncio.wait_for(ends(connection, RunRequest(groups, id="late")), 30)
            assert [found[index] for index in range(3)] == [Failure(it, "cancelled", invalid=False) for it in range(3)]
            assert isinstance(found[3], Result)

    asyncio.run(run())


def test_a_request_that_is_to_be_alone_waits_for_the_others_and_they_for_it(slow: VLLMServer) -> None:
    async def run() -> None:
        async with connected(slow) as connection:
            other = await until_begun(connection, RunRequest([Group(["other " * 90], {"max_tokens": 90})]))
            alone = RunRequest([Group(["alone " * 60], {"max_tokens": 60})], alone=True)
            small = RunRequest([Group(["small"], SHORT)])
            for refused in (alone, small):
                with pytest.raises(RemoteError, match="runs one request alone") as caught:
                    await ends(connection, refused)
                assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
            await other
            task = await until_begun(connection, alone)
            with pytest.raises(RemoteError, match="runs one request alone"):
                await ends(connection, small)
            assert isinstance((await task)[0], Result)
            assert isinstance((await ends(connection, small))[0], Result)

    asyncio.run(run())


def test_to_cancel_what_is_not_there_does_nothing(slow: VLLMServer) -> None:
    async def run() -> None:
        async with connected(slow) as connection:
            await connection.cancel("nobody", [0, 1])
            nameless = await until_begun(connection, RunRequest([Group(["one " * 40], {"max_tokens": 40})]))
            await connection.cancel("", [0])
            assert isinstance((await nameless)[0], Result)

    asyncio.run(run())


def test_a_request_of_too_many_items_is_refused_with_what_to_do(slow: VLLMServer) -> None:
    async def run() -> None:
        async with connected(slow) as connection:
            with pytest.raises(RemoteError, match=r"1000000 items.*at most 131072.*split the request") as refused:
                await ends(connection, RunRequest([Group([""] * 1_000_000)]))
            assert refused.value.status == 413

    asyncio.run(run())


def test_a_request_without_an_id_looks_as_before() -> None:
    assert msgspec.to_builtins(RunRequest([])) == {"groups": []}


def memory(server: VLLMServer) -> int:
    """Return how many bytes of memory the server's own process has."""
    (found,) = [
        process
        for pid in processes.processes_of(server.record().instance)
        if "--lease" in (process := psutil.Process(pid)).cmdline()
    ]
    return int(found.memory_info().rss)


def test_clients_that_do_not_read_cost_little_memory() -> None:
    """Together they ask for answers of 400 MB."""
    request = msgspec.msgpack.encode(RunRequest([Group(["word " * 6000] * 40, {"max_tokens": 6000})]))
    with (
        VLLMServer(LLM, engine=EchoEngine(capacity=64)) as server,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        record = server.record()
        head = (
            f"POST /run HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {record.token}\r\n"
            f"Content-Length: {len(request)}\r\n\r\n"
        )
        before = memory(server)
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(24):
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", record.address.port))
                clients.append(client)
            list(threads.map(lambda client: client.sendall(head.encode() + request), clients))
            highest = 0
            for _ in range(16):
                time.sleep(0.25)
                highest = max(highest, memory(server) - before)
            assert highest < 150 << 20, highest >> 20
        with server.client() as other:
            assert other.generate(["a"]) == [["a"]]
