"""The ranks of a server on several nodes: one process a node. Each ends when another one does.

Rank 0 is the server. It listens at a port, and tells the owner where. The owner passes that on to all ranks, over the
lease. Every other rank connects to that port, and stays connected until it ends. Then it works for the engine only.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from msgspec import Struct

from .. import lease
from ..config import LLMConfig
from ..errors import GserveError, LaunchError
from ..host import addresses, gpu_locks, gpus
from ..host.forks import call_in_child
from ..interfaces import Engine, Rank, Report, RunningRank

JOIN_SECONDS = 30.0
"""Timeout of a connection to rank 0, and of the message that a rank sends there first, in seconds."""
STOP_SECONDS = 10.0
"""Maximum time for an engine to stop, in seconds. Then its processes are killed."""
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}
"""When a connection counts as cut: after 10 s without data, and 4 questions at intervals of 5 s without an answer."""
ACCEPT_SECONDS = 0.1
"""Time after which a connection that could not be accepted is tried again, in seconds."""
LONGEST = 1 << 12
"""Maximum size of the message that a rank sends first, in bytes."""
logger = logging.getLogger("gserve.serving")


class Joined(Struct, frozen=True):
    """The first message of a rank to rank 0: its number, its node's name, and the server's token."""

    number: int
    node: str
    token: str


class RankLost(GserveError):
    """Another rank has ended, so this one must end too."""


class Others:
    """Rank 0's view of the other ranks. A server on one node has none.

    `rank`: rank 0's own place; None on one node.
    """

    def __init__(self, rank: Rank | None = None) -> None:
        self.rank = rank
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._sockets: list[socket.socket] = []
        call_in_child(self._close)  # an open copy would hide the end of this rank

    async def watch[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. Raises RankLost: another rank ended before. Raises what `work` raises."""
        if self.rank is None:
            return await work
        task = asyncio.create_task(work)
        try:
            ends: list[asyncio.Future[Any]] = [task, self._lost]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.done():
                raise RankLost(self._lost.result())
            return task.result()
        finally:
            task.cancel()

    async def accept(self, listening: socket.socket, token: str) -> None:
        """Let the other ranks connect. Never returns."""
        self._sockets.append(listening)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    line, _ = await asyncio.get_running_loop().sock_accept(listening)
                except OSError:  # too many open files, say
                    await asyncio.sleep(ACCEPT_SECONDS)
                    continue
                self._sockets.append(line)
                group.create_task(self._follow(line, token))

    async def _follow(self, line: socket.socket, token: str) -> None:
        """Wait for the end of a rank. A connection without the token is closed."""
        loop = asyncio.get_running_loop()
        with line:
            data = b""
            with contextlib.suppress(OSError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
                async with asyncio.timeout(JOIN_SECONDS):
                    while not data.endswith(b"\n") and len(data) < LONGEST:
                        if not (chunk := await loop.sock_recv(line, LONGEST)):
                            return
                        data += chunk
                joined = msgspec.json.decode(data, type=Joined)
                if hmac.compare_digest(joined.token.encode(), token.encode()):
                    logger.info("rank %d on %s has joined", joined.number, joined.node)
                    how = await _wait_end(line)
                    if not self._lost.done():
                        self._lost.set_result(f"rank {joined.number} on {joined.node}: {how}")

    def _close(self) -> None:
        for line in self._sockets:
            line.close()

    def close(self) -> None:
        """Close the connections, which makes the other ranks end."""
        self._close()
        self._lost.cancel()


@asynccontextmanager
async def others(owner: lease.ServerEnd | None, host: str) -> AsyncIterator[Others]:
    """Let the other ranks of this server join for the block, if it has some. `host`: where the server listens.

    Raises LaunchError: there is no address at which they could reach this node.
    """
    ranks = None if owner is None else owner.hello.ranks
    if owner is None or ranks is None:
        yield Others()
        return
    if ranks.meeting_variable is not None:
        host = os.environ.get(ranks.meeting_variable, "")
    elif host in ("0.0.0.0", "::"):  # noqa: S104 - it is only compared
        host = addresses.own_address(str(ranks.owner_variable))
    try:
        if not host:
            raise OSError("it has no known address")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
    except OSError as error:
        raise LaunchError(
            f"cannot listen at '{host}' for the ranks on the other nodes: {error}; set {ranks.meeting_option}"
        ) from error
    listening.setblocking(False)
    host = str(listening.getsockname()[0])
    rank = _place(0, ranks, lease.Meeting(host, addresses.free_port(host), 0))
    found = Others(rank)
    accepting = asyncio.create_task(found.accept(listening, owner.hello.token))
    owner.send(lease.Meeting(host, rank.port, listening.getsockname()[1]))
    try:
        yield found
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        found.close()


def _place(number: int, ranks: lease.Ranks, meeting: lease.Meeting) -> Rank:
    """Return the place of this process among the ranks. Raises LaunchError: this node has no way to rank 0's."""
    try:
        address = addresses.address_towards(meeting.host)
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"there is no way from here to rank 0 at {meeting.host}: {error}; set {ranks.meeting_option}"
        ) from error
    interface = addresses.interface_of(address)
    if interface is None:
        raise LaunchError(
            f"no network interface here has {address}, which leads to rank 0 at {meeting.host};"
            f" set {ranks.meeting_option}"
        )
    return Rank(number, ranks.nodes, meeting.host, meeting.port, address, interface)


async def start(
    engine: Engine, llm: LLMConfig, report: Report, rank: Rank | None, *, share_gpu: bool
) -> tuple[RunningRank, gpu_locks.Hold]:
    """Start an engine, or its part on this node, and lock its GPUs first. Raises any exception."""
    nodes = 1 if rank is None else rank.nodes
    wanted = llm.gpus_per_server // nodes if engine.uses_gpus else 0
    seen = await asyncio.to_thread(gpus.visible, os.environ, wanted) if wanted else []
    locks = gpu_locks.hold(seen, share=share_gpu)
    await locks.turn(report, shared=not engine.starts_alone(llm))
    return await (engine.start(llm, report) if rank is None else engine.start_rank(llm, report, rank)), locks


# ------------------------------------------------------------------------------------------------- the ranks above 0


async def run_rank(engine: Engine, llm: LLMConfig, owner: lease.ServerEnd) -> int:
    """Run a rank above 0 until it must end: by its owner, or since rank 0 has ended. Return the exit code.

    Raises any exception: it failed.
    """
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    meeting: asyncio.Future[lease.Meeting] = loop.create_future()

    def handle(message: lease.Down) -> None:
        match message:
            case lease.Stop():
                end.set()
            case lease.Meeting() if not meeting.done():
                meeting.set_result(message)

    owner.watch(
        on_message=lambda message: loop.call_soon_threadsafe(handle, message),
        on_lost=lambda: loop.call_soon_threadsafe(end.set),
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets the signal too, and decides
    work = asyncio.create_task(_work(engine, llm, owner, meeting, end))
    await asyncio.wait([work, ending := asyncio.create_task(end.wait())], return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if work.done():
        work.result()
    work.cancel()
    with contextlib.suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(STOP_SECONDS):
            await work
    return 0


async def _work(
    engine: Engine, llm: LLMConfig, owner: lease.ServerEnd, meeting: "asyncio.Future[lease.Meeting]", end: asyncio.Event
) -> None:
    """Join rank 0, and run the engine's part on this node. Raises any exception: it failed."""
    ranks = owner.hello.ranks
    assert ranks is not None
    logger.info("waiting for rank 0")
    met = await meeting
    rank = _place(owner.rank, ranks, met)
    with await _joined(met, owner.rank, owner.hello.token, ranks.meeting_option) as line:
        call_in_child(line.close)  # an open copy would hide the end of this rank
        watching = asyncio.create_task(_end_with(line, end))
        running, _ = await start(engine, llm, lambda text: logger.info("%s", text), rank, share_gpu=False)
        try:
            logger.info("rank %d has started", owner.rank)
            raise GserveError(f"the engine died: {await running.died()}")
        finally:
            watching.cancel()
            await running.stop()


async def _joined(meeting: lease.Meeting, number: int, token: str, option: str) -> socket.socket:
    """Return a connection to rank 0, which knows this rank then. Raises LaunchError: it cannot be reached."""
    try:
        line = await asyncio.to_thread(socket.create_connection, (meeting.host, meeting.open_port), JOIN_SECONDS)
    except OSError as error:
        raise LaunchError(
            f"cannot reach rank 0 at port {meeting.open_port} of {meeting.host}: {error}; set {option} to an address"
            " that the nodes reach, and open the ports between them"
        ) from error
    line.sendall(msgspec.json.encode(Joined(number, socket.gethostname(), token)) + b"\n")
    line.setblocking(False)
    return line


async def _end_with(line: socket.socket, end: asyncio.Event) -> None:
    logger.warning("ending, since rank 0 has ended: %s", await _wait_end(line))
    end.set()


async def _wait_end(line: socket.socket) -> str:
    """Wait until the other end of a connection is gone, or the connection is cut. Return which."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        line.setsockopt(socket.IPPROTO_TCP, option, value)
    try:
        while await asyncio.get_running_loop().sock_recv(line, LONGEST):
            pass
    except ConnectionResetError:
        pass
    except OSError as error:
        return f"the connection to it was cut: {error.strerror}"
    return "its process ended"
