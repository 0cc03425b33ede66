"""A server: it runs an engine and serves it over a transport. A lease connects it to its owner, if it has one."""

import asyncio
import contextlib
import errno
import gc
import logging
import math
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from typing import Any

from .. import lease
from ..config import LLMConfig
from ..errors import GserveError, LaunchError, RemoteError, sentence_of
from ..host import tokens
from ..host.ports import port_holder
from ..host.redaction import redact
from ..interfaces import Address, ASGIApp, ASGIMessage, ASGIReceive, ASGISend, Engine, RunningEngine, Transport
from ..messages import Event, Health, ResponseOutput, RunRequest
from ..tasks import GENERATE
from ..weights import ORIGINAL, Weights
from . import openai_face, ranks
from .engine_watchdog import wait_hung
from .orders import Orders
from .work import Work

DRAIN_SECONDS = 30.0
"""Default drain time, in seconds, unless the owner gives one. Requests in flight may finish within it."""
ENGINE_STOP_SECONDS = 10.0
"""Maximum time for an engine to stop, in seconds. Then its processes are killed."""
FLUSH_SECONDS = 1.0
"""Maximum wait of a server that ends until its owner has its last messages, in seconds."""
RETRY_SECONDS = 1.0
"""Retry delay for a client of a server that is not ready, in seconds."""
GC_THRESHOLD = 10_000
"""Number of new objects that starts a garbage collection.

An item in flight has about 20 objects, and none of them is garbage. With Python's default of 700, a server may spend a
third of its time on collections.
"""
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
        self._work: Work | None = None
        """The requests in flight, once the engine is ready."""
        self._openai: ASGIApp | None = None
        """The engine's own application for OpenAI's API, if it has one."""
        self._drain = asyncio.Event()
        self._drain_ends = math.inf
        self._drain_changed = asyncio.Event()
        self._is_drain_a_signal = False
        """Whether the lease ordered the drain because of a signal. The same signal may reach this process too."""
        self._stop = asyncio.Event()
        self._lease: lease.ServerEnd | None = None
        self._others: ranks.Others
        self._address: Address | None = None
        self._orders = Orders(self._send, secrets)

    # ----------------------------------------------------------------------------------------- the methods of ServerApi

    def health(self) -> Health:
        """Return the current state."""
        return Health("ok") if self._state == "ready" else Health(self._state, self._phase)

    @property
    def weight_version(self) -> str | None:
        """The version of the engine's weights; None before it is ready."""
        return None if self._work is None or self._state == "starting" else self._work.weight_version

    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Run a request; return its events in batches as they happen.

        Raises RemoteError: the server is not ready, or refuses the request. The first event may raise it too.
        """
        return self._ready_work().run(request)

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        """Run a request; return the outputs of each item, in order.

        Raises RemoteError: the request is refused, an item failed, or the server ended too early.
        """
        return await self._ready_work().run_whole(request)

    def _ready_work(self) -> Work:
        """Return the work of a ready server. Raises RemoteError: it is not ready."""
        self._check_ready()
        assert self._work is not None
        return self._work

    def _check_ready(self) -> None:
        """Raise RemoteError unless the server is ready."""
        if self._state != "ready":
            phase = f" ({self._phase})" if self._phase else ""
            raise RemoteError(f"the server is {self._state}{phase}", status=503, retry_after=RETRY_SECONDS)

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the request with this id. The request may still be on its way, over another connection."""
        if self._work is not None:
            self._work.cancel(request_id, items)

    async def answer_openai(self, scope: ASGIMessage, receive: ASGIReceive, send: ASGISend, *, max_body: int) -> None:
        """Answer an HTTP request on one of OpenAI's routes."""
        try:
            work = self._ready_work()
            if self._openai is None:
                raise RemoteError("this server does not offer OpenAI's API", status=404)
            await openai_face.answer(
                self._openai, work, scope, receive, send, max_body=max_body, secrets=self._secrets
            )  # fmt: skip
        except RemoteError as error:
            await openai_face.refuse(error, send)

    def metrics(self) -> bytes:
        """Return the engine's own series; none before it is ready."""
        return b"" if self._work is None or self._engine is None else self._engine.metrics()

    def shut_down(self) -> None:
        """Start to drain: finish the admitted requests, accept no more."""
        self._begin_drain(DRAIN_SECONDS)

    def _begin_drain(self, seconds: float) -> None:
        self._drain_ends = time.monotonic() + seconds
        self._drain.set()
        self._drain_changed.set()

    # ------------------------------------------------------------------------------------------------ from start to end

    async def run_to_end(
        self, engine: Engine, transport: Transport, llm: LLMConfig, host: str, port: int, owner: lease.ServerEnd | None
    ) -> int:
        """Run the server to its end; return the exit code.

        Raises any exception from before the server had an address.
        """
        loop = asyncio.get_running_loop()
        self._lease = owner
        weights = ORIGINAL if owner is None else owner.hello.weights
        if owner is not None:
            owner.watch(
                on_message=lambda message: loop.call_soon_threadsafe(self._handle_message, message),
                on_lost=lambda: loop.call_soon_threadsafe(self._on_lost),
            )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        async with _listening(transport, self, host, port) as address, ranks.others(owner, host) as self._others:
            logger.info("listening on %s", address)
            self._address = address
            self._send(lease.Listening(address))
            starting, code = asyncio.create_task(self._others.watch(self._start(engine, llm, weights))), 0
            try:
                if await self._wait_first(starting):
                    await self._until_end()
            except Exception as error:
                code = fail(error, owner, self._secrets)  # report now: an engine that hangs is slow to stop
            finally:
                self._state = "draining"
                starting.cancel()
                if self._work is not None:
                    self._send_pulse()  # with the last counters
                    self._work.close()
                if self._engine is not None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ENGINE_STOP_SECONDS):
                            await self._engine.stop()
        self._state = "stopped"
        return code

    async def _start(self, engine: Engine, llm: LLMConfig, weights: Weights) -> None:
        loop, ours = asyncio.get_running_loop(), threading.get_ident()

        def report(text: str) -> None:
            if threading.get_ident() == ours:  # report now: a later report might come after "ready"
                self._report(text)
            else:
                loop.call_soon_threadsafe(self._report, text)

        running, locks = await ranks.start(engine, llm, report, self._others.rank, share_gpu=self._share_gpu)
        assert isinstance(running, RunningEngine)
        self._engine = running
        self._work = Work(
            running,
            check_ready=self._check_ready,
            on_progress=self._send_pulse,
            on_alone=self._report_alone,
            secrets=self._secrets,
        )
        self._openai = await running.http()
        gc.collect()
        gc.freeze()  # a full collection of the objects of torch and transformers takes a third of a second
        gc.set_threshold(GC_THRESHOLD)
        self._report("generating the first token" if GENERATE in running.info.tasks else "making the first vector")
        await running.check()
        locks.started()
        if weights.path:
            self._report(f"loading the weights of version {weights.version}")
        await self._orders.begin(running, self._work, weights, llm.all_adapters)
        self._state, self._phase = "ready", None
        logger.info("ready: %s", running.info.model)
        self._send(lease.Ready(running.info))

    async def _wait_first(self, task: "asyncio.Task[Any]") -> bool:
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
        assert self._work is not None
        died = asyncio.create_task(self._others.watch(self._wait_lost(self._engine, self._work)))
        changing = asyncio.create_task(self._orders.follow())
        try:
            if await self._wait_first(died):
                raise GserveError(died.result())
        finally:
            changing.cancel()
        self._state = "draining"
        ends = [died, *(asyncio.create_task(event.wait()) for event in (self._work.idle, self._stop))]
        while (remaining := self._drain_ends - time.monotonic()) > 0 and not any(end.done() for end in ends):
            self._drain_changed.clear()
            changed = asyncio.create_task(self._drain_changed.wait())
            await asyncio.wait([*ends, changed], timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        for end in ends:
            end.cancel()

    async def _wait_lost(self, engine: RunningEngine, work: Work) -> str:
        """Wait until the engine dies or hangs; return the reason."""
        died = asyncio.create_task(engine.died())
        watches = [died]
        if self._stall_timeout is not None:
            watches.append(asyncio.create_task(wait_hung(engine, work, self._stall_timeout)))
        if self._lease is not None:
            watches.append(asyncio.create_task(self._send_pulses()))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return f"the engine died: {died.result()}" if died in done else done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _send_pulses(self) -> str:
        """Send the owner a regular sign that this event loop runs."""
        while True:
            self._send_pulse()
            await asyncio.sleep(min(lease.PULSE_SECONDS, (self._stall_timeout or math.inf) / 4))

    def _handle_message(self, message: lease.Down) -> None:
        match message:
            case lease.Stop():
                self._stop.set()
            case lease.Drain(seconds):
                self._is_drain_a_signal = True
                self._begin_drain(DRAIN_SECONDS if seconds is None else seconds)
            case (
                lease.SetAdapters()
                | lease.CheckWeights()
                | lease.Pause()
                | lease.LoadWeights()
                | lease.Transfer()
                | lease.Resume()
            ):
                self._orders.add(message)

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
        self._send(lease.Phase(text))

    def _send_pulse(self) -> None:
        if self._work is not None:
            self._send(lease.Pulse(self._work.finished, self._work.is_alone, self._work.counters()))

    async def _report_alone(self) -> None:
        """Report that an item which may crash this server is about to begin; wait until the owner has the report."""
        self._send_pulse()
        if self._lease is not None:
            await asyncio.to_thread(self._lease.flush, FLUSH_SECONDS)

    def _send(self, message: lease.Up) -> None:
        if self._lease is not None:
            self._lease.send(message)


@contextlib.asynccontextmanager
async def _listening(transport: Transport, server: Server, host: str, port: int) -> AsyncIterator[Address]:
    """Serve `server` over `transport` for the block; yield its address. Raises LaunchError: it cannot listen."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            address = await stack.enter_async_context(transport.serve(server, host, port))
        except OSError as error:
            holder = port_holder(port) if error.errno == errno.EADDRINUSE else None
            raise LaunchError(f"{error.strerror or error}{f': {holder} uses it' if holder else ''}") from error
        yield address


def fail(error: BaseException, owner: lease.ServerEnd | None, secrets: Collection[str]) -> int:
    """Report why the server ends, to the log and the owner; return the exit code."""
    cause = redact(sentence_of(error), secrets)
    logger.error("failed: %s", cause, exc_info=None if isinstance(error, GserveError) else error)
    if owner is not None:
        owner.send(lease.Failed(cause, follows=isinstance(error, ranks.RankLost)))
    return 1
