"""The dispatcher: the thread that sends the items of a queue to servers, over their connections."""

import asyncio
import contextlib
import functools
import itertools
import logging
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import anyio
import anyio._backends._asyncio
import msgspec
import uvloop

from ..errors import GserveError, StallTimeout, TransportError
from ..host.environment import check_not_patched, open_missing_descriptors
from ..host.forks import call_in_child
from ..host.logs import keep_logging_from_waiting
from ..interfaces import Connection
from ..messages import Group, Prompt, RunRequest
from .item_queue import ItemQueue
from .pieces import Call, Item, Piece, Server

IMPORTED = anyio._backends._asyncio
"""A module that anyio imports only with its first scope.
If the process were forked during that import, the child would wait for it forever."""
HEARTBEAT_SECONDS = 5.0
"""Time between two heartbeats of a server that works, in seconds. It is shorter if `client_timeout` is short."""
PROBE_SECONDS = 1.0
"""Time between two health requests to a server whose connection broke, in seconds."""
UNRESPONSIVE_SECONDS = 10.0
"""Time until an unresponsive server is given up, in seconds, in addition to twice its stall timeout.
By then its owner would have ended a hung server, so this one is alive but unreachable."""
DEFAULT_STALL_TIMEOUT = 60.0
"""Stall timeout, in seconds, that is assumed if the owner does not end hung servers."""
MAX_SILENCE = 6.0
"""Maximum time counted for one health request without an answer, in seconds.
This process may have been suspended during the request."""
CLOSE_SECONDS = 10.0
"""Maximum time for closing all connections, in seconds."""

ASK_SECONDS = 10.0
"""Maximum time for a server's answer to one question, in seconds."""

CLOSED = "this service or client is closed: start the service again, or create a new client"

logger = logging.getLogger("gserve.batch")


@dataclass(frozen=True)
class _Known:
    """The data that a forked process needs to use a server too."""

    connect: Callable[[], Connection]
    capacity: int
    timeout: float | None
    is_watched: bool
    stall_timeout: float | None
    return_timeout: float | None = None
    has_answered: bool = False
    """Whether the process that forked this one has had an answer from it."""

    @property
    def answer_timeout(self) -> float:
        """Time until a server that does not answer is given up, in seconds."""
        if self.return_timeout is not None:
            return self.return_timeout
        if not self.is_watched and self.timeout is not None:
            return self.timeout
        return UNRESPONSIVE_SECONDS + 2 * (DEFAULT_STALL_TIMEOUT if self.stall_timeout is None else self.stall_timeout)


class _Work:
    """One use of a connection, cancelled by an anyio scope.

    httpx closes its sockets even in a cancelled anyio scope. `Task.cancel` would interrupt the closing, and leave some
    sockets open.
    """

    def __init__(self) -> None:
        self._scope: anyio.CancelScope | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel the use. It may not have begun, or may have ended. Idempotent."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `work`. Returns early if it is cancelled. Raises what `work` raises."""
        with anyio.CancelScope() as self._scope:
            if not self._is_cancelled:
                await work()


class _Link:
    """A server with its connection."""

    def __init__(self, server: Server, connection: Connection, known: _Known) -> None:
        self.server = server
        self.connection = connection
        self.answer_timeout = known.answer_timeout
        self.is_gateway = known.return_timeout is not None
        self.has_answered = known.has_answered
        self.heartbeat = HEARTBEAT_SECONDS if known.timeout is None else min(HEARTBEAT_SECONDS, known.timeout / 3)
        self.is_probed = False
        self.work: dict[asyncio.Task[None], _Work] = {}
        """The current uses of the connection."""


class Dispatcher:
    """One queue of items, and the servers that work on it.

    Its methods may be called from any thread and from signal handlers.

    A forked process may go on using it. There it has its own thread and connections, to the servers known at the fork.

    `model`: the model that the requests name, for a gateway with several.
    `prefix_affinity`: see `ServeConfig`.
    """

    def __init__(self, model: str | None = None, *, prefix_affinity: bool = True) -> None:
        self._model = model
        self.prefix_affinity = prefix_affinity
        check_not_patched()
        open_missing_descriptors()  # an event loop breaks if one of its descriptors is below 3
        self._known: dict[str, _Known] = {}
        self.room = 0
        """Number of items that all servers have in flight together if there are enough items."""
        self._lock = threading.RLock()
        self._closed = False
        self._is_forked = False
        """Whether this is a forked process that has no thread yet."""
        self._inherited: list[object] = []
        self._start_thread()
        call_in_child(self._on_fork)

    def _start_thread(self) -> None:
        """Start the thread, and add all known servers."""
        self._loop = uvloop.new_event_loop()
        self._links: dict[Server, _Link] = {}
        self._sent: dict[Piece, _Work] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._requests = map("{}-{}".format, itertools.repeat(uuid.uuid4().hex[:12]), itertools.count())
        self._incoming: deque[Item] = deque()
        self._runs = 0
        """Number of runs of `_queue_incoming`."""
        self._scheduled_for = -1
        """Value of `_runs` when `_queue_incoming` was last scheduled. If they are equal, that run has not started."""
        self._is_closing = False
        self._coming: deque[str] = deque(self._known)
        """An entry for each change that is scheduled and has not been made."""
        self._queue = ItemQueue(
            start=self._start, stop=self._stop, cancel=self._cancel_items, probe=self._probe,
            wake=lambda when: self._loop.call_at(when, self._queue.pump), clock=self._loop.time,
        )  # fmt: skip
        self._queue.set_prefix_affinity(self.prefix_affinity)
        self._thread = threading.Thread(target=self._run, name="gserve-dispatch", daemon=True)
        for key, known in self._known.items():
            self._loop.call_soon(self._change, self._add, key, known, known.connect())
        self._thread.start()
        self._is_forked = False

    def _on_fork(self) -> None:
        """Prepare for the first use in a forked process."""
        self._is_forked = True
        self._lock = threading.RLock()  # another thread of the parent may have held the old one
        self._known = {
            key: replace(known, is_watched=known.return_timeout is not None, has_answered=True)
            for key, known in self._known.items()
        }
        self._inherited.append((self._loop, self._queue, self._links, self._sent, self._closing))  # never freed

    # -------------------------------------------------------------------------------------------------- from any thread

    @property
    def waiting(self) -> int:
        """Number of items that wait for a server."""
        return len(self._incoming) + self._queue.waiting

    def in_flight(self, key: str) -> int:
        """Return the number of items in flight on a server; 0 if it is unknown."""
        return self._queue.in_flight_at(key)

    def expect(self, key: str, comes: bool = True) -> None:
        """Keep items waiting for a server that is starting, even if there is no other server.

        `comes`: whether it is still starting. False: stop waiting for it.
        """
        self._call_soon(self._queue.expect if comes else self._queue.expect_no_more, key)

    def add(
        self,
        key: str,
        connect: Callable[[], Connection],
        capacity: int,
        timeout: float | None,
        *,
        is_watched: bool,
        stall_timeout: float | None = 60.0,
        return_timeout: float | None = None,
    ) -> None:
        """Add a server that works on `capacity` items at once.

        `connect`: returns a new connection to it.
        `timeout`: maximum time without a heartbeat or result, in seconds; None: no limit.
        `is_watched`: whether the caller will call `remove` once the server has died. If not, the server counts as dead
        when nothing listens at its port. It is given up if it does not answer for `timeout` seconds.
        `stall_timeout`: time after which the caller calls `remove` for a hung server, in seconds; None: never.
        `return_timeout`: for the gateway of a service: time for which items wait while it does not answer, in seconds.
        It accepts items in any state, and may return after it was gone.
        """
        connection = connect()  # here, so that its imports are complete when the caller forks
        self.check()
        known = self._known[key] = _Known(connect, capacity, timeout, is_watched, stall_timeout, return_timeout)
        self._count_room()
        self._call_soon(self._add, key, known, connection)

    def remove(self, key: str, why: str, *, returns: bool = False, died: bool = True) -> None:
        """Remove a server and return its unfinished items to the queue.

        `returns`: whether the items may wait for its restart. Other servers may take them before.
        `died`: whether it died while it worked, so that one of its items may be the reason.
        """
        self.check()
        self._known.pop(key, None)
        self._count_room()
        self._call_soon(self._remove, key, why, returns, died)

    def retire(self, key: str) -> None:
        """Send a server no more items. Its items in flight go on. Call `remove` once it has ended."""
        self._call_soon(self._queue.retire, key)

    def resize(self, key: str, capacity: int) -> None:
        """Let a server that was added work on `capacity` items at once."""
        self.check()
        self._known[key] = replace(self._known[key], capacity=capacity)
        self._count_room()
        self._call_soon(self._queue.resize, key, capacity)

    def set_prefix_affinity(self, is_on: bool) -> None:
        """Choose whether items that share a long prefix go to the same server. It holds for items to come."""
        self.prefix_affinity = is_on
        self._call_soon(self._queue.set_prefix_affinity, is_on)

    def _count_room(self) -> None:
        self.room = sum(2 * known.capacity for known in list(self._known.values()))

    @property
    def ending(self) -> str | None:
        """Why no more items are accepted; None: they are. May be read in any thread."""
        return None if self._coming else self._queue.ending  # perhaps the first server comes

    def drain(self, why: str) -> None:
        """Send no more items. Items in flight go on; all others, present and future, are lost because of `why`."""
        self._call_soon(lambda: self._queue.drain(why))

    def submit(self, items: Sequence[Item]) -> None:
        """Add items to the queue. Raises GserveError: the dispatcher is closed, or the interpreter is ending."""
        if self._closed or self._is_forked or sys.is_finalizing():  # first: this runs for single items
            self.check()
        self._incoming.extend(items)
        if self._scheduled_for != (runs := self._runs):
            self._schedule(self._queue_incoming)
            self._scheduled_for = runs  # last: a signal handler may raise before any line

    def cancel(self, call: Call, indexes: Collection[int] | None = None) -> None:
        """Cancel unfinished items of a call, including items in flight. They have no outcome.

        `indexes`: the items; None: all, also those that are submitted later.
        """
        if indexes is None:
            call.is_cancelled = True
        self._call_soon(self._queue.cancel, call, indexes)

    def resume(self, call: Call) -> None:
        """Send items of a paused call again. Call this when its caller has taken some results."""
        with contextlib.suppress(TransportError):  # closed: all waiting items have ended
            self._call_soon(self._queue.resume, call)

    def ask[T](self, work: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run a coroutine in the event loop and return its result.

        Raises what the coroutine raises.
        Raises StallTimeout: it takes longer than `timeout` seconds.
        Raises GserveError: the dispatcher is closed, or the interpreter is ending.
        """
        try:
            self.check()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except BaseException as error:
            work.close()
            if isinstance(error, RuntimeError):  # the loop is closed
                raise TransportError(CLOSED) from error
            raise
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            raise StallTimeout(f"no answer within {timeout:g} s") from error

    def ask_server[T](self, key: str, question: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function with the connection to a server and return its result.

        Raises what the coroutine raises, and what `ask` raises.
        Raises TransportError: there is no connection to the server, or it was closed.
        """

        async def ask_link() -> T:
            link = next((link for server, link in self._links.items() if server.key == key), None)
            if link is None:
                raise TransportError(f"there is no connection to {key}")
            answer: list[T] = []

            async def ask() -> None:
                with anyio.fail_after(ASK_SECONDS):
                    answer.append(await question(link.connection))

            await self._use(link, ask)
            if not answer:  # the connection was closed during the question
                raise TransportError(CLOSED)
            return answer[0]

        return self.ask(ask_link(), ASK_SECONDS + 1)

    def close(self) -> None:
        """End every open call with errors, close all connections, and end the thread. Idempotent."""
        if self.ask_to_close() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def ask_to_close(self) -> bool:
        """Begin to close, without waiting. Return whether the thread is about to end. A finalizer may call this too."""
        if sys.is_finalizing() or self._closed:  # the thread has ended, or another call closes this
            return False
        if self._is_forked:  # this process has not used it
            self._closed = True
            return False
        with contextlib.suppress(TransportError):
            self._schedule(self._start_closing)
        self._closed = True  # last: a signal handler may raise before any line
        return True

    @property
    def is_closing(self) -> bool:
        """Whether this is closed, or being closed. Items that have not ended are then lost."""
        return self._closed or self._is_closing

    def _call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        self.check()
        self._coming.append("")
        try:
            self._schedule(self._change, function, *arguments)
        except TransportError:  # it will never be made
            self._coming.pop()
            raise

    def _change(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        finally:
            self._coming.popleft()

    def check(self) -> None:
        """Check that this can be used. In a forked process, start the thread and connections if necessary.

        Raises GserveError: the dispatcher is closed, or the interpreter is ending.
        """
        if sys.is_finalizing():
            raise GserveError(
                "the interpreter is exiting: call the service earlier, not in __del__ or a late exit hook"
            )
        if self._closed:
            raise TransportError(CLOSED)
        if self._is_forked:
            with self._lock:
                if self._is_forked:
                    self._start_thread()

    def _schedule(self, function: Callable[..., object], *arguments: Any) -> None:
        """Schedule a function in the event loop. Takes no lock, so a signal handler may call this at any moment."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError as error:  # the loop is closed
            raise TransportError(CLOSED) from error

    def _run(self) -> None:
        """Run the event loop until it is stopped; this is the thread's function."""
        keep_logging_from_waiting()
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
            self._queue_incoming()  # end items that came after its last run

    # --------------------------------------------------------------------------------- from here on: in the event loop

    def _add(self, key: str, known: _Known, connection: Connection) -> None:
        keep_logging_from_waiting()  # again: the first connection has imported the transport's loggers
        self._remove(key, "it was replaced", True, False)
        server = Server(key, known.capacity, known.is_watched, ends_hung=known.stall_timeout is not None)
        self._links[server] = _Link(server, connection, known)
        self._queue.add(server)

    def _remove(self, key: str, why: str, returns: bool, died: bool) -> None:
        self._queue.remove(key, why, returns=returns, died=died)
        for server in [server for server in self._links if server.key == key]:
            self._close_link(self._links.pop(server))

    def _close_link(self, link: _Link) -> None:
        """Close a connection once nothing uses it."""

        async def close() -> None:
            for work in link.work.values():
                work.cancel()
            await asyncio.gather(*link.work, return_exceptions=True)
            await link.connection.close()

        closing = self._loop.create_task(close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _queue_incoming(self) -> None:
        """Move all new items into the queue. Items that come at the same time travel together."""
        self._runs += 1  # first: a `submit` from now on must schedule another run
        if not self._incoming:
            return
        items = [self._incoming.popleft() for _ in range(len(self._incoming))]
        for _, of_one_call in itertools.groupby(items, attrgetter("call")):
            self._queue.submit([*of_one_call])
        self._queue.pump()

    def _start(self, piece: Piece) -> None:
        assert piece.server is not None
        link = self._links[piece.server]
        piece.request = next(self._requests)
        task = self._use(link, lambda: self._send(piece, link))
        self._sent[piece] = link.work[task]
        task.add_done_callback(functools.partial(self._handle_end, piece))

    def _use(self, link: _Link, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Begin a use of a connection. The connection is closed only after its uses have ended."""
        begun = _Work()
        task = self._loop.create_task(begun.run(work))
        link.work[task] = begun
        task.add_done_callback(link.work.pop)
        return task

    async def _send(self, piece: Piece, link: _Link) -> None:
        """Send a piece, and pass its events to the queue."""
        request = RunRequest(
            _groups(piece.sent), link.heartbeat, piece.request, piece.is_narrowing, model=self._model
        )  # fmt: skip
        async with contextlib.aclosing(link.connection.run(request)) as stream:
            async for events in stream:
                link.has_answered = True
                self._queue.handle_events(piece, events)

    def _handle_end(self, piece: Piece, task: asyncio.Task[None]) -> None:
        """Handle the end of a piece."""
        del self._sent[piece]
        error: Any = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TransportError):
            logger.error("a request failed", exc_info=error)
        self._queue.handle_end(piece, error)

    def _stop(self, piece: Piece) -> None:
        self._sent[piece].cancel()

    def _cancel_items(self, piece: Piece, indexes: list[int]) -> None:
        """Cancel some items of a piece on its server."""
        assert piece.server is not None
        link = self._links[piece.server]

        async def cancel() -> None:
            with contextlib.suppress(TransportError):  # the connection broke, so the server drops the whole piece
                await link.connection.cancel(piece.request, indexes)

        self._use(link, cancel)

    def _probe(self, server: Server) -> None:
        """Start to ask a server whose connection broke whether it answers."""
        link = self._links[server]
        if not link.is_probed:
            link.is_probed = True
            self._use(link, lambda: self._probe_until_answer(link))

    async def _probe_until_answer(self, link: _Link) -> None:
        server, why = link.server, ""
        silence, has_warned = 0.0, False
        while True:
            asked = self._loop.time()
            is_gone = not link.has_answered
            try:
                health = await link.connection.health()
                if health.status == "ok" or link.is_gateway:
                    link.has_answered = True
                    break
                why = f"it is {health.status}"
            except TransportError as error:
                why, is_gone = str(error), is_gone or error.is_gone
            except Exception as error:
                logger.exception("cannot read the health of %s", server.key)
                why = str(error)
            if silence >= link.answer_timeout or (is_gone and not server.is_watched):  # no owner reports this
                if link.is_gateway:
                    why = f"its gateway has not answered for {link.answer_timeout:g} s: {why}"
                logger.warning("lost %s: %s", server.key, why)
                link.is_probed = False
                self._queue.give_up(server, why)
                return
            if silence >= UNRESPONSIVE_SECONDS and not has_warned:
                logger.warning("%s does not answer, and its owner has not reported its end: %s", server.key, why)
                has_warned = True
            await asyncio.sleep(PROBE_SECONDS)
            silence += min(self._loop.time() - asked, MAX_SILENCE)
        link.is_probed = False
        self._queue.handle_answer(server)

    def _start_closing(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            closing = self._loop.create_task(self._close())
            closing.add_done_callback(lambda task: self._loop.stop())

    async def _close(self) -> None:
        """End every item, then close all connections."""
        self._queue_incoming()
        self._queue.close("the service was closed")
        for link in self._links.values():
            self._close_link(link)
        self._links.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS / 2):
                await asyncio.gather(*self._closing, return_exceptions=True)


def _groups(items: Sequence[Item]) -> list[Group]:
    """Return the items of a piece as groups. Neighbours with equal parameters share a group.

    Each item keeps its own adapter, so that items with different adapters share a group too.
    """
    has_adapters = any(item.adapter is not None for item in items)
    encoded: dict[int, bytes] = {}
    groups: list[Group] = []
    last: Item | None = None
    kind: tuple[bytes, bool, bool, str] | None = None
    prompts: list[Prompt] = []
    seeds: list[int] | None = None
    adapters: list[str | None] | None = None
    for item in items:
        params, seed, returns_prompt = item.params, item.seed, item.returns_prompt
        if (
            last is None
            or params is not last.params
            or (seed is None) is not (last.seed is None)
            or returns_prompt is not last.returns_prompt
            or item.task != last.task
        ):
            last = item
            if id(params) not in encoded:  # equal parameters of two calls are separate objects
                encoded[id(params)] = msgspec.msgpack.encode(params)
            if kind != (kind := (encoded[id(params)], seed is None, returns_prompt, item.task)):
                prompts, seeds, adapters = [], None if seed is None else [], [] if has_adapters else None
                groups.append(Group(prompts, params, seeds, returns_prompt, adapters, item.task))
        prompts.append(item.prompt)
        if adapters is not None:
            adapters.append(item.adapter)
        if seeds is not None and seed is not None:
            seeds.append(seed)
    return groups
