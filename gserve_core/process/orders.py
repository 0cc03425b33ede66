"""The orders of a server's owner: other adapters, other weights, and pauses of the items."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Any

from .. import lease
from ..errors import sentence_of
from ..host.redaction import redact
from ..interfaces import RunningEngine
from ..pauses import OPEN, Gate
from ..weights import Weights
from .work import Work

logger = logging.getLogger("gserve.serving")


class Orders:
    """Follows orders one after another, once there is an engine. A pause begins and ends at once.

    `send`: sends the answers to the owner.
    `secrets`: values that no message may contain.
    """

    def __init__(self, send: Callable[[lease.Up], object], secrets: Collection[str]) -> None:
        self._send = send
        self._secrets = secrets
        self._waiting: asyncio.Queue[lease.Order] = asyncio.Queue()
        self._engine: RunningEngine
        self._work: Work | None = None
        self._pausing: asyncio.Task[None] | None = None
        """The pause in progress."""
        self._turn = asyncio.Lock()
        """Held by a pause that is in progress, and by its end."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_unsound = False
        """Whether weights are being loaded, or could not be loaded."""
        self._gate = OPEN

    def add(self, order: lease.Order | lease.Resume) -> None:
        """Add an order of the owner."""
        match order:
            case lease.Pause() if self._work is not None:
                self._pausing = self._begin(self._in_turn(order.number, partial(self._work.pause, order.in_flight)))
            case lease.Resume() if self._work is not None:
                self._end_pause()
                self._begin(self._resume(self._work))
            case lease.SetGate(number, gate) if self._work is not None:
                if gate.is_open:
                    self._end_pause()
                moving = self._begin(self._in_turn(number, partial(self._move, gate, self._work)))
                self._pausing = self._pausing if gate.is_open else moving
            case lease.Resume():
                pass  # nothing is paused yet
            case _:
                self._waiting.put_nowait(order)

    def _end_pause(self) -> None:
        """End the pause in progress, if there is one."""
        if self._pausing is not None:
            self._pausing.cancel()

    def _begin(self, doing: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Return a task that is kept until it has ended."""
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def begin(
        self, engine: RunningEngine, work: Work, weights: Weights, gate: Gate, adapters: Mapping[str, str]
    ) -> None:
        """Give the engine these weights, gate and adapters, then what was ordered so far.

        Raises any exception: the weights cannot be loaded, or the engine cannot sleep.
        """
        self._engine, self._work = engine, work
        async with self._turn:  # the gate of orders that come meanwhile counts more than this one
            if weights.path:
                await self._load(weights)
            self._weights = weights
            if adapters:
                await self._set_adapters(lease.SetAdapters(0, dict(adapters)))
            await self._move(gate, work)
            await self._answer(0)
            while not self._waiting.empty():
                order = self._waiting.get_nowait()
                if isinstance(order, lease.LoadWeights):
                    await self._load(order.weights)  # a server that cannot have them does not become ready
                await self._follow(order, work)

    async def follow(self) -> None:
        """Follow orders, until it is cancelled."""
        assert self._work is not None
        while True:
            await self._follow(await self._waiting.get(), self._work)

    async def _follow(self, order: lease.Order, work: Work) -> None:
        match order:
            case lease.SetAdapters():
                await self._set_adapters(order)
            case lease.CheckWeights(number, path):
                await self._answer(number, self._engine.check_weights(path))
            case lease.LoadWeights(number, weights):
                await self._answer(number, self._load_paused(weights))
            case lease.ResetCache(number):
                await self._answer(number, self._engine.reset_cache())
            case lease.SetGate(number, gate):
                await self._answer(number, self._move(gate, work))
            case lease.Transfer(number):
                await self._answer(number, self._transfer(order))
            case lease.Pause(number):
                await self._answer(number)  # it came before any item

    async def _in_turn(self, number: int, act: Callable[[], Awaitable[object]]) -> None:
        """Answer an order that begins or ends a pause, once those before it have ended."""
        async with self._turn:
            await self._answer(number, act())

    async def _resume(self, work: Work) -> None:
        async with self._turn:
            await self._resume_unless(self._gate, work)

    async def _move(self, gate: Gate, work: Work) -> None:
        """Open or close the gate. Raises any exception: the engine cannot do that."""
        if self._gate.sleep and not gate.sleep:
            await self._engine.wake(self._weights)
            if work.is_kept and not gate.is_open:
                await self._engine.pause()
        if not gate.is_open and gate != self._gate:
            await work.pause(gate.in_flight)
            if gate.sleep:
                self._pausing = None  # no order ends it any more
                try:
                    await self._engine.sleep(gate.sleep)
                except Exception:
                    await self._resume_unless(self._gate, work)
                    raise
        await self._resume_unless(gate, work)
        self._gate = gate

    async def _resume_unless(self, gate: Gate, work: Work) -> None:
        """Begin items again if the gate is open."""
        if gate.is_open and not self._is_unsound:  # otherwise its owner ends it
            await work.resume()

    async def _load_paused(self, weights: Weights) -> None:
        if weights.version != self._version:
            await self._ensure_paused()
        await self._load(weights)

    async def _ensure_paused(self) -> None:
        """Pause, unless items are kept: this server may have become ready after the order to pause."""
        assert self._work is not None
        if not self._work.is_kept:
            await self._work.pause("finish")

    async def _transfer(self, order: lease.Transfer) -> None:
        """Take part in a step of a transfer. Raises any exception: that fails."""
        assert self._work is not None
        logger.info("transfer of weights: %s %s", order.step, order.info if order.step == "init" else order.version)
        match order.step:
            case "init":
                await self._engine.init_transfer(order.info)
            case "check":
                await self._engine.check_transfer(order.info)
            case "receive":
                await self._ensure_paused()
                self._is_unsound = True
                await self._engine.receive_weights(order.info)
            case "finish":
                await self._engine.finish_transfer(order.version)
                await self._engine.check_loaded()
                self._work.weight_version = order.version
                self._weights = Weights(order.version)
                self._is_unsound = False

    async def _load(self, weights: Weights) -> None:
        """Load weights, unless they are loaded, and check them. Raises any exception: that fails."""
        assert self._work is not None
        if weights.version == self._version:
            return
        logger.info("loading the weights of version %s", weights.version)
        self._is_unsound = True
        await self._engine.load_weights(weights)
        await self._engine.check_loaded()
        self._work.weight_version = weights.version
        self._weights = weights
        self._is_unsound = False

    @property
    def _version(self) -> str:
        assert self._work is not None
        return self._work.weight_version

    async def _answer(self, number: int, doing: Awaitable[object] | None = None) -> None:
        """Wait for `doing`, and report that it is done, or why it is not."""
        fault = ""
        try:
            if doing is not None:
                await doing
        except Exception as error:
            logger.warning("an order failed", exc_info=error)
            fault = redact(sentence_of(error), self._secrets)
        self._send(lease.Answered(number, fault, self._version, self._gate.name))

    async def _set_adapters(self, order: lease.SetAdapters) -> None:
        """Change the adapters, and report that it is done."""
        try:
            faults = dict(await self._engine.set_adapters(order.adapters))
        except Exception as error:
            logger.exception("cannot change the adapters")
            faults = dict.fromkeys(order.adapters, sentence_of(error))
        faults = {name: redact(fault, self._secrets) for name, fault in faults.items()}
        self._send(lease.AdaptersSet(order.number, faults))
