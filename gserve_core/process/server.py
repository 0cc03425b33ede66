"""A server: it runs an engine and serves it over a transport. A lease connects it to its owner, if it has one."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from typing import Any

from .. import lease
from ..config import LLMConfig
from ..errors import GserveError, ItemError, LaunchError, RemoteError
from ..host import gpu_locks, gpus, tokens
from ..host.ports import port_holder
from ..host.redaction import redact
from ..interfaces import Address, Engine, RunningEngine, Transport
from ..schema import Event, Failure, Group, Health, Heartbeat, ResponseOutput, Result, RunRequest, unfolded
from .requests import Piece, cancelled_item, prepared_items, result_of

DRAIN_SECONDS = 30.0
"""Default drain time, in seconds, unless the owner gives one. Requests in flight may finish within it."""
ENGINE_STOP_SECONDS = 10.0
"""Maximum time for an engine to stop, in seconds. Then its processes are killed."""
FLUSH_SECONDS = 1.0
"""Maximum wait of a server that ends until its owner has its last messages, in seconds."""
DEATH_SECONDS = 1.0
"""Maximum time from the failure of an item to the report that the engine died, in seconds."""
ADMISSION = 16
"""Maximum number of admitted items, as a multiple of the engine's capacity. Beyond it, requests are refused as busy."""
MOST_ITEMS = 1 << 17
"""A request may always have this many items, however small the engine's capacity is."""
AHEAD = 2
"""Maximum number of items in the engine, as a multiple of its capacity, so that it never runs dry."""
EARLY = 256
"""Number of requests with kept early cancellations. A cancellation is early if it arrives before its request."""
BUSY_SECONDS = 1.0
"""Retry delay for a client that is refused because the server is busy, in seconds."""
RESERVED_SECONDS = 5.0
"""After a request that must run alone is refused, no other request is begun for this time, in seconds.

Its client retries sooner than that.
"""
YOUNG = 10_000
"""Number of new objects that starts a garbage collection.

An item in flight has about 20 objects, and none of them is garbage. With Python's default of 700, a server may spend a
third of its time on collections.
"""
LOOK_SECONDS = 1.0
"""Interval between two checks of the engine's progress, in seconds. It is shorter if `stall_timeout` is short."""
logger = logging.getLogger("gserve.serving")


class Server:
    """A server: an engine behind a transport, from start to end. Implements `interfaces.ServerApi`."""

    def __init__(
        self,
        instance: str,
        token: str | None,
        control: str | None = None,
        *,
        stall_timeout: float | None = None,
        share_gpu: bool = False,
        secrets: Collection[str] = (),
    ) -> None:
        self.instance = instance
        self.token = token
        self.control = control
        self._stall_timeout = stall_timeout
        self._share_gpu = share_gpu
        self._secrets = secrets
        self._state = "starting"
        self._phase: str | None = None
        self._engine: RunningEngine | None = None
        self._running = self._most_running = 0
        """Number of items in the engine, and its maximum."""
        self._ended = self._finished = 0
        """Number of items that have left the engine, and number of those that it answered."""
        self._turn, self._waiting = asyncio.Lock(), 0
        """Lock of the request that gets the engine's next free slot, and number of requests that wait for one."""
        self._has_place = asyncio.Event()
        self._over = asyncio.Event()
        self._pieces: set[Piece] = set()
        """The admitted requests."""
        self._is_alone = False
        """Whether the request in flight must run alone."""
        self._reserved_until = 0.0
        """Until this time, no other request is begun, for one that must run alone."""
        self._is_doubtful = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain = asyncio.Event()
        self._drain_ends = math.inf
        self._drain_changed = asyncio.Event()
        self._is_drain_a_signal = False
        """Whether the lease ordered the drain because of a signal. The same signal may reach this process too."""
        self._early: OrderedDict[str, list[int]] = OrderedDict()
        """Items cancelled before their requests arrived, by request id. Only the latest `EARLY` requests are kept."""
        self._stop = asyncio.Event()
        self._lease: lease.ServerEnd | None = None
        self._address: Address | None = None

    # ----------------------------------------------------------------------------------------- the methods of ServerApi

    def health(self) -> Health:
        """Return the current state."""
        return Health("ok") if self._state == "ready" else Health(self._state, self._phase)

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Run a request; yield its events in batches as they happen. Raises RemoteError: the request is refused."""
        with self._admit(request) as piece:
            if request.alone:  # its items may crash this server: report that first
                yield [Heartbeat(piece.left)]
                self._tell_pulse()
                if self._lease is not None:
                    await asyncio.to_thread(self._lease.flush, FLUSH_SECONDS)
            async with contextlib.aclosing(self._events(piece, request)) as happened:
                async for events in happened:
                    yield events

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        """Run a request; return the outputs of each item, in order.

        Raises RemoteError: the request is refused, an item failed, or the server ended too early.
        """
        with self._admit(request) as piece:
            for group in request.groups:
                try:
                    await piece.engine.prepare([], group.params)  # invalid params are not an item's fault
                except ItemError as error:
                    raise RemoteError(str(error), status=400) from error
            found: dict[int, list[ResponseOutput]] = {}
            async with contextlib.aclosing(self._events(piece, request)) as happened:
                async for events in happened:
                    for event in events:
                        if isinstance(event, Failure):
                            status = 400 if event.invalid else 500
                            raise RemoteError(f"item {event.index}: {event.message}", status=status)
                        if isinstance(event, Result):
                            found[event.index] = unfolded(event.outputs)
            if len(found) < piece.size:
                raise RemoteError("the server ended before this was done", status=503)
            return [found[index] for index in range(piece.size)]

    async def _events(self, piece: "Piece", request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Run the items of an admitted request; yield their events. If the server ends, some items get no event."""
        feeding = asyncio.create_task(self._feed(piece, request.groups))
        feeding.add_done_callback(lambda _: piece.news.set())
        left = piece.size
        try:
            while left:
                try:
                    async with asyncio.timeout(request.heartbeat):
                        await piece.news.wait()
                except TimeoutError:
                    yield [Heartbeat(left)]
                    continue
                if feeding.done():
                    feeding.result()
                if batch := piece.take():
                    left -= len(batch)
                    yield batch
                if self._over.is_set():
                    return  # the client sees which items are missing, and sends them to another server
        finally:
            unfinished = [feeding, *piece.tasks.values()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _feed(self, piece: "Piece", groups: Sequence[Group]) -> None:
        """Pass the items of a piece to the engine, as the engine and the piece's backlog have room."""
        loop, first = asyncio.get_running_loop(), 0
        for group in groups:
            async for start, items in prepared_items(piece.engine, group):
                await self._wait_for_room(piece)
                for index, item in enumerate(items, first + start):
                    if self._waiting or self._running >= self._most_running:
                        await self._wait_for_room(piece)
                    piece.begun = index + 1
                    if index in piece.cancelled:
                        continue
                    task = asyncio.Task(self._work(piece, index, item), loop=loop, eager_start=True)
                    if not task.done():
                        piece.tasks[index] = task
            first += len(group.prompts)

    async def _wait_for_room(self, piece: "Piece") -> None:
        """Wait until a piece's backlog has room and the engine has a free slot. Requests take turns."""
        while piece.is_full():
            await piece.wait_taken()
        if not self._waiting and self._running < self._most_running:
            return
        self._waiting += 1
        try:
            async with self._turn:
                while self._running >= self._most_running:
                    self._has_place.clear()
                    await self._has_place.wait()
        finally:
            self._waiting -= 1

    async def _work(self, piece: "Piece", index: int, prepared: Any) -> None:
        """Run one item in the engine; add its event to its piece."""
        event: Event
        self._running += 1
        try:
            if isinstance(prepared, ItemError):
                raise prepared
            event = result_of(index, await piece.engine.run(prepared))
            self._finished += 1
            if self._finished == 1:
                self._tell_pulse()
        except ItemError as error:
            event = Failure(index, str(error), error.invalid)
        except asyncio.CancelledError:
            self._is_doubtful = True  # it may have been cancelled because no answer came
            if index not in piece.cancelled:
                raise
            event = cancelled_item(index)
        except Exception as error:
            self._is_doubtful = True  # the item is not at fault
            if await self._is_over():
                return
            logger.exception("item %d failed", index)
            event = Failure(index, redact(sentence_of(error), self._secrets), invalid=False)
        finally:
            self._running -= 1
            self._ended += 1
            if self._waiting:
                self._has_place.set()
            piece.left -= 1
            piece.tasks.pop(index, None)
        piece.put(event)

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the request with this id. The request may still be on its way, over another connection."""
        if not request_id:
            return
        for piece in self._pieces:
            if piece.id == request_id:
                self._cancel(piece, items)
                return
        self._early.setdefault(request_id, []).extend(items)
        if len(self._early) > EARLY:
            self._early.popitem(last=False)

    def _cancel(self, piece: "Piece", items: Sequence[int]) -> None:
        for index in piece.cancel(items):
            piece.left -= 1
            piece.put(cancelled_item(index))

    def shut_down(self) -> None:
        """Start to drain: finish the admitted requests, accept no more."""
        self._begin_drain(DRAIN_SECONDS)

    def _begin_drain(self, seconds: float) -> None:
        self._drain_ends = time.monotonic() + seconds
        self._drain.set()
        self._drain_changed.set()

    @contextlib.contextmanager
    def _admit(self, request: RunRequest) -> Iterator["Piece"]:
        """Admit a request for the block; yield its piece. Raises RemoteError: the request is refused."""
        if self._state != "ready" or self._engine is None:
            phase = f" ({self._phase})" if self._phase else ""
            raise RemoteError(f"the server is {self._state}{phase}", status=503)
        if any(group.seeds is not None and len(group.seeds) != len(group.prompts) for group in request.groups):
            raise RemoteError("expected a seed for each prompt", status=400)
        size, most = sum(len(group.prompts) for group in request.groups), ADMISSION * self._engine.info.capacity
        if size > (limit := max(MOST_ITEMS, most)):
            raise RemoteError(
                f"the request has {size} items, and a server takes at most {limit} at once: send it in pieces",
                status=413,
            )
        self._check_turn(request)
        items = sum(piece.left for piece in self._pieces)
        if items and items + size > most:  # a single request may be larger, or it could never be served
            raise RemoteError(
                f"the server has {items} items to do and takes {most} at a time: ask again in a moment",
                status=429, retry_after=BUSY_SECONDS,
            )  # fmt: skip
        piece = Piece(request.id, self._engine, size)
        self._pieces.add(piece)
        self._cancel(piece, self._early.pop(request.id, ()))
        self._is_alone = request.alone
        self._idle.clear()
        try:
            yield piece
        finally:
            self._pieces.discard(piece)
            if request.alone:
                self._is_alone = False
                if not self._over.is_set():  # otherwise its items may be why the server ends
                    self._tell_pulse()
            if not self._pieces:
                self._idle.set()

    def _check_turn(self, request: RunRequest) -> None:
        """Refuse a request that must run alone while others are in flight, and others while it is in flight.

        After each refusal of such a request, no other request is begun for `RESERVED_SECONDS`.
        Raises RemoteError: the request must wait.
        """
        now = time.monotonic()
        if request.alone:
            self._reserved_until = now + RESERVED_SECONDS if self._pieces else 0.0
        if self._is_alone or (self._pieces if request.alone else now < self._reserved_until):
            raise RemoteError(
                "the server is to work on one request alone, as an item of it may kill servers: ask again in a moment",
                status=429, retry_after=BUSY_SECONDS,
            )  # fmt: skip

    async def _is_over(self) -> bool:
        """Return whether this server ends now or within `DEATH_SECONDS`, as when its engine dies.

        If so, a failure is not the item's fault.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), DEATH_SECONDS)
        return self._over.is_set()

    # ------------------------------------------------------------------------------------------------ from start to end

    async def live(
        self, engine: Engine, transport: Transport, llm: LLMConfig, host: str, port: int, line: lease.ServerEnd | None
    ) -> int:
        """Run the server to its end; return the exit code.

        Raises any exception from before the server had an address.
        """
        loop = asyncio.get_running_loop()
        self._lease = line
        if line is not None:
            line.watch(
                on_message=lambda message: loop.call_soon_threadsafe(self._obey, message),
                on_lost=lambda: loop.call_soon_threadsafe(self._on_lost),
            )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        async with _listening(transport, self, host, port) as address:
            logger.info("listening on %s", address)
            self._address = address
            self._tell(lease.Listening(address))
            starting, code = asyncio.create_task(self._start(engine, llm)), 0
            try:
                if await self._first(starting):
                    await self._until_end()
            except Exception as error:
                code = fail(error, line, self._secrets)  # report now: an engine that hangs is slow to stop
            finally:
                self._state = "draining"
                starting.cancel()
                self._over.set()
                for piece in self._pieces:
                    piece.news.set()
                if self._engine is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ENGINE_STOP_SECONDS):
                            await self._engine.stop()
        self._state = "stopped"
        return code

    async def _start(self, engine: Engine, llm: LLMConfig) -> None:
        loop, ours = asyncio.get_running_loop(), threading.get_ident()

        def report(text: str) -> None:
            if threading.get_ident() == ours:  # report now: a later report might come after "ready"
                self._report(text)
            else:
                loop.call_soon_threadsafe(self._report, text)

        wanted = llm.gpus_per_server if engine.uses_gpus else 0
        seen = await asyncio.to_thread(gpus.visible, os.environ, wanted) if wanted else []
        held = gpu_locks.hold(seen, share=self._share_gpu)
        await held.turn(self._report)
        running = await engine.start(llm, report)
        self._engine = running
        self._most_running = AHEAD * running.info.capacity
        gc.collect()
        gc.freeze()  # a full collection of the objects of torch and transformers takes a third of a second
        gc.set_threshold(YOUNG)
        self._report("making the first token")
        await running.check()
        held.started()
        self._state, self._phase = "ready", None
        logger.info("ready: %s", running.info.model)
        self._tell(lease.Ready(running.info))

    async def _first(self, task: "asyncio.Task[Any]") -> bool:
        """Wait for `task`; return False if the server must stop or drain first. Raises the task's exception."""
        ends = [asyncio.create_task(event.wait()) for event in (self._stop, self._drain)]
        await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if task.done():
            task.result()
            return True
        return False

    async def _until_end(self) -> None:
        """Serve until the server must stop or drain, then let the admitted requests finish.

        Raises GserveError: the engine died or hangs.
        """
        assert self._engine is not None
        died = asyncio.create_task(self._lost(self._engine))
        if await self._first(died):
            raise GserveError(died.result())
        self._state = "draining"
        ends = [died, *(asyncio.create_task(event.wait()) for event in (self._idle, self._stop))]
        while (remaining := self._drain_ends - time.monotonic()) > 0 and not any(end.done() for end in ends):
            self._drain_changed.clear()
            changed = asyncio.create_task(self._drain_changed.wait())
            await asyncio.wait([*ends, changed], timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        for end in ends:
            end.cancel()

    async def _lost(self, engine: RunningEngine) -> str:
        """Wait until the engine dies or hangs; return the reason."""
        died = asyncio.create_task(engine.died())
        watches = [died]
        if self._stall_timeout is not None:
            watches.append(asyncio.create_task(self._hung(engine, self._stall_timeout)))
        if self._lease is not None:
            watches.append(asyncio.create_task(self._beat()))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return f"the engine died: {died.result()}" if died in done else done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _hung(self, engine: RunningEngine, limit: float) -> str:
        """Wait until the engine hangs; return a description.

        It hangs if it has items and makes no progress for `limit` seconds. An engine that is idle and in doubt is asked
        for one token. It hangs if none comes in that time, and is broken if the check fails.
        """
        pause = min(LOOK_SECONDS, limit / 4)
        seen: object = None
        silence = lease.Silence(pause)
        checking: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(pause)
                if checking is not None and checking.done():
                    if error := checking.exception():
                        return (
                            f"the engine is broken: idle, it was asked for one token, and failed: {sentence_of(error)}"
                        )
                    checking = None
                if (state := (self._ended, engine.progress())) != seen or not (self._running or checking):
                    seen = state
                    silence.end()
                if silence.look() > limit:
                    if self._running:
                        what = f"{self._running} items are at work, and nothing has moved"
                        return f"the engine hangs: {what} for {limit:g} s"
                    return f"the engine hangs: idle, it was asked for one token, which did not come within {limit:g} s"
                if self._is_doubtful and not self._running and checking is None:
                    self._is_doubtful = False
                    checking = asyncio.create_task(engine.check())
                    silence.end()
        finally:
            if checking is not None:
                checking.cancel()

    async def _beat(self) -> str:
        """Send the owner a regular sign that this event loop runs."""
        while True:
            self._tell_pulse()
            await asyncio.sleep(min(lease.PULSE, (self._stall_timeout or math.inf) / 4))

    def _obey(self, message: lease.Down) -> None:
        match message:
            case lease.Stop():
                self._stop.set()
            case lease.Drain(seconds):
                self._is_drain_a_signal = True
                self._begin_drain(DRAIN_SECONDS if seconds is None else seconds)

    def _on_lost(self) -> None:
        logger.warning("the owner is gone: ending")
        self._stop.set()
        if self._address is not None and self.token is not None:
            with contextlib.suppress(GserveError, OSError):
                tokens.remove_token(self._address, self.token)  # the owner wrote it, but cannot remove it

    def _on_signal(self, number: int) -> None:
        is_second = self._drain.is_set() and not self._is_drain_a_signal
        self._is_drain_a_signal = False
        logger.info("%s: ending%s", signal.Signals(number).name, " at once" if is_second else "")
        if is_second:
            self._stop.set()
        elif not self._drain.is_set():
            self._begin_drain(DRAIN_SECONDS)

    def _report(self, text: str) -> None:
        text = redact(text, self._secrets)
        self._phase = text
        logger.info("%s", text)
        self._tell(lease.Phase(text))

    def _tell_pulse(self) -> None:
        self._tell(lease.Pulse(self._finished, self._is_alone))

    def _tell(self, message: lease.Up) -> None:
        if self._lease is not None:
            self._lease.tell(message)


@contextlib.asynccontextmanager
async def _listening(transport: Transport, server: Server, host: str, port: int) -> AsyncIterator[Address]:
    """Serve `server` over `transport` for the block; yield its address. Raises LaunchError: it cannot listen."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            address = await stack.enter_async_context(transport.serve(server, host, port))
        except OSError as error:
            holder = port_holder(port) if error.errno == errno.EADDRINUSE else None
            raise LaunchError(f"{error.strerror or error}{f': {holder} has it' if holder else ''}") from error
        yield address


def fail(error: BaseException, line: lease.ServerEnd | None, secrets: Collection[str]) -> int:
    """Report why the server ends, to the log and the owner; return the exit code."""
    cause = redact(sentence_of(error), secrets)
    logger.error("failed: %s", cause, exc_info=None if isinstance(error, GserveError) else error)
    if line is not None:
        line.tell(lease.Failed(cause))
    return 1


def sentence_of(error: BaseException) -> str:
    """Return the text of an error as one line."""
    text = " ".join(str(error).split())  # some messages of vLLM have many lines
    if isinstance(error, GserveError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
