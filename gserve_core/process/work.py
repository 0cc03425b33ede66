"""The work of a server: requests are admitted, their items take turns in the engine, and their events go back."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any

from msgspec import structs

from ..errors import GserveError, ItemError, RemoteError, sentence_of
from ..host.redaction import redact
from ..interfaces import RunningEngine
from ..messages import Event, Failure, Group, Heartbeat, ResponseOutput, Result, RunRequest, unfolded
from ..overview import Counters
from ..pauses import InFlight
from ..run_requests import MOST_ITEMS, EarlyCancellations, cancelled_item, check_count, count_items, result_of
from ..weights import FIRST
from .requests import Piece, prepare, prepared_items

DEATH_SECONDS = 1.0
"""Maximum time from the failure of an item to the report that the engine died, in seconds."""
ADMISSION = 16
"""Maximum number of admitted items, as a multiple of the engine's capacity. Beyond it, requests are refused as busy."""
AHEAD = 2
"""Maximum number of items in the engine, as a multiple of its capacity, so that it never runs dry."""
BUSY_SECONDS = 1.0
"""Retry delay for a client that is refused because the server is busy, in seconds."""
RESERVED_SECONDS = 5.0
"""After a request that must run alone is refused, no other request is begun for this time, in seconds.

Its client retries sooner than that.
"""
PAUSE_STEP = 0.01
"""Time between two looks whether the engine is empty, in seconds."""

logger = logging.getLogger("gserve.serving")


class Work:
    """The requests in flight in an engine.

    `check_ready`: raises RemoteError unless the server takes requests.
    `on_progress`: called after the first item, and after a request that runs alone. The owner must know it at once.
    `on_alone`: called before the items of a request that runs alone are begun; returns when the owner knows of it.
    `secrets`: values that no message may contain.
    """

    def __init__(
        self,
        engine: RunningEngine,
        *,
        check_ready: Callable[[], object],
        on_progress: Callable[[], object],
        on_alone: Callable[[], Awaitable[object]],
        secrets: Collection[str],
    ) -> None:
        self.running = self.ended = self.finished = self.failed = 0
        """Number of items in the engine, of those that have left it, of those that it answered, and of those that
        failed. A cancelled item is neither answered nor failed."""
        self.is_alone = False
        """Whether the request in flight must run alone."""
        self.is_doubtful = False
        """Whether an item was cancelled or failed without a fault of its own. The engine may be broken."""
        self.idle = asyncio.Event()
        """Set while no request is in flight."""
        self.idle.set()
        self._engine = engine
        self._most_running = AHEAD * engine.info.capacity
        self._check_ready = check_ready
        self._on_progress = on_progress
        self._on_alone = on_alone
        self._secrets = secrets
        self._turn, self._waiting = asyncio.Lock(), 0
        """Lock of the request that gets the engine's next free slot, and number of requests that wait for one."""
        self._has_place = asyncio.Event()
        self._over = asyncio.Event()
        self._pieces: set[Piece] = set()
        """The admitted requests."""
        self._reserved_until = 0.0
        """Until this time, no other request is begun, for one that must run alone."""
        self._early = EarlyCancellations()
        self.weight_version = FIRST
        """The version of the engine's weights. What ends from now on was made by it, or has spans."""
        self._opened = asyncio.Event()
        """Cleared during a pause."""
        self._opened.set()
        self._replies = 0
        """Number of requests that the engine's own application answers now."""
        self._checks = 0
        """Number of test requests in the engine."""
        self._put_back: set[asyncio.Task[None]] = set()
        """The items that a pause puts back, until they have left the engine."""
        self._outside: set[asyncio.Task[None]] = set()
        """The items that a pause has put back, or that it has ended before they were begun."""
        self.is_kept = False
        """Whether the engine is paused, and may have items."""

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Run a request; yield its events in batches as they happen. Raises RemoteError: the request is refused."""
        with self._admit_items(request) as piece:
            piece.is_batch = True
            if request.alone:  # its items may crash this server: report that first
                yield [Heartbeat(piece.unfinished)]
                await self._on_alone()
            async with contextlib.aclosing(self._events(piece, request)) as happened:
                async for events in happened:
                    yield events

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        """Run a request; return the outputs of each item, in order.

        Raises RemoteError: the request is refused, an item failed, or the server ended too early.
        """
        with self._admit_items(request) as piece:
            for group in request.groups:
                try:
                    await prepare(piece.engine, group, [])  # invalid params are not an item's fault
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
                raise RemoteError("the server ended before this request was finished", status=503)
            return [found[index] for index in range(piece.size)]

    async def _events(self, piece: Piece, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Run the items of an admitted request; yield their events. If the server ends, some items get no event."""
        feeding = asyncio.create_task(self._feed(piece, request.groups))
        feeding.add_done_callback(lambda _: piece.has_events.set())
        remaining = piece.size
        try:
            while remaining:
                try:
                    async with asyncio.timeout(request.heartbeat):
                        await piece.has_events.wait()
                except TimeoutError:
                    yield [Heartbeat(remaining)]
                    continue
                if feeding.done():
                    feeding.result()
                if batch := piece.take():
                    remaining -= len(batch)
                    yield batch
                if self._over.is_set():
                    return  # the client sees which items are missing, and sends them to another server
        finally:
            unfinished = [feeding, *piece.tasks.values()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _feed(self, piece: Piece, groups: Sequence[Group]) -> None:
        """Pass the items of a piece to the engine, as the engine and the piece's backlog have room."""
        loop, first = asyncio.get_running_loop(), 0
        for group in groups:
            async for start, items in prepared_items(piece.engine, group):
                await self._wait_for_room(piece)
                for index, item in enumerate(items, first + start):
                    if self._waiting or self.running >= self._most_running:
                        await self._wait_for_room(piece)
                    piece.begun = index + 1
                    if index in piece.cancelled:
                        continue
                    adapter = None if group.adapters is None else group.adapters[index - first]
                    work = self._run_item(piece, index, item, adapter, group.return_prompt_token_ids)
                    task = asyncio.Task(work, loop=loop, eager_start=True)
                    if not task.done():
                        piece.tasks[index] = task
            first += len(group.prompts)

    async def _wait_for_room(self, piece: Piece) -> None:
        """Wait until a piece's backlog has room and the engine has a free slot. Requests take turns."""
        while piece.is_full():
            await piece.wait_taken()
        if not self._waiting and self.running < self._most_running:
            return
        self._waiting += 1
        try:
            async with self._turn:
                while self.running >= self._most_running:
                    self._has_place.clear()
                    await self._has_place.wait()
        finally:
            self._waiting -= 1

    async def _run_item(
        self, piece: Piece, index: int, prepared: Any, adapter: str | None, returns_prompt: bool
    ) -> None:
        """Run one item in the engine; add its event to its piece.

        `adapter`: see `Group.adapters`.
        `returns_prompt`: see `Group.return_prompt_token_ids`.
        """
        event: Event
        self.running += 1
        try:
            if isinstance(prepared, ItemError):
                raise prepared
            prepared = piece.engine.with_adapter(prepared, adapter)
            if piece.is_batch:
                prepared = piece.engine.in_background(prepared)
            outputs = await self._outputs(piece.engine, prepared)
            if returns_prompt and (ids := piece.engine.prompt_token_ids(prepared)) is not None:
                ids = [*ids]
                outputs = [structs.replace(output, prompt_token_ids=ids) for output in outputs]
            event = result_of(index, outputs)
            self.finish(1)
        except ItemError as error:
            self.failed += 1
            event = Failure(index, str(error), error.invalid)
        except asyncio.CancelledError:
            self.is_doubtful = True  # it may have been cancelled because no answer came
            if index not in piece.cancelled:
                raise
            event = cancelled_item(index)
        except Exception as error:
            self.is_doubtful = True  # the item is not at fault
            piece.tasks.pop(index, None)  # it is in the engine no more: a pause does not put it back
            if await self.is_ending():
                return
            logger.exception("item %d failed", index)
            self.failed += 1
            event = Failure(index, redact(sentence_of(error), self._secrets), invalid=False)
        finally:
            self.running -= 1
            self.ended += 1
            if self._waiting:
                self._has_place.set()
            piece.unfinished -= 1
            piece.tasks.pop(index, None)
        piece.put(event)

    async def _outputs(self, engine: RunningEngine, prepared: Any) -> list[ResponseOutput]:
        """Run one item in the engine, again if a pause has put it back; return its outputs with their version."""
        while True:
            try:
                outputs = await engine.run(prepared)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                assert task is not None
                if task not in self._put_back:
                    raise
                self._put_back.discard(task)
                if task.uncancel():  # it was cancelled otherwise too
                    raise
                await self._wait_outside()
                continue
            is_empty = all(output.finish_reason == "abort" and not output.token_ids for output in outputs)
            if self.is_paused and outputs and is_empty:
                await self._wait_outside()  # a pause has ended it before it was begun
                continue
            return [self._with_version(output) for output in outputs]

    async def _wait_outside(self) -> None:
        """Wait for the end of a pause, with an item that is not in the engine."""
        task = asyncio.current_task()
        assert task is not None
        self._outside.add(task)
        try:
            while self.is_paused:
                await self._opened.wait()
        finally:
            self._outside.discard(task)

    def _with_version(self, output: ResponseOutput) -> ResponseOutput:
        """Return an output with the version, or the versions, of the weights that made it."""
        spans = output.weight_spans
        if not spans:
            version = self.weight_version
            return output if version == FIRST else structs.replace(output, weight_version=version)
        return structs.replace(
            output, weight_version=spans[-1][0], weight_spans=spans if len(spans) > 1 else None
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- a pause

    @property
    def is_paused(self) -> bool:
        """Whether no item is begun."""
        return not self._opened.is_set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in the engine."""
        return self.running == len(self._outside) and not self._replies and not self._checks

    @property
    def is_still(self) -> bool:
        """Whether the engine has nothing to compute, since it is paused."""
        return self.is_paused and (self.is_kept or self.is_empty)

    async def check(self) -> None:
        """Have the engine make one token, or vector. Raises any exception: it does not work."""
        self._checks += 1
        try:
            await self._engine.check()
        finally:
            self._checks -= 1

    async def pause(self, in_flight: InFlight) -> None:
        """Begin no more items, until `resume`. Returns once the engine computes none.

        `in_flight`: what happens to those in the engine. Requests that the engine's own application answers are never
        put back: they finish.

        Raises GserveError: the engine cannot do that, or an earlier pause keeps items that would have to finish.
        """
        if in_flight == "finish" and self.is_kept and not self.is_empty:
            raise GserveError(
                f"a pause keeps {self.running} items in the engine, which cannot finish: resume first, or choose"
                " in_flight 'keep', 'redo' or 'abort'"
            )
        if in_flight in ("redo", "abort") and self.is_kept and self._replies:
            raise GserveError(
                f"a pause keeps {self._replies} requests of OpenAI's API in the engine, which are never put back:"
                " resume first, or choose in_flight 'keep'"
            )
        self._opened.clear()
        self._most_running = 0
        if in_flight == "keep":
            while self._checks:
                await asyncio.sleep(PAUSE_STEP)
            await self._engine.pause()
            self.is_kept = True
            return
        if in_flight == "redo":
            for piece in self._pieces:
                inside = {*piece.tasks.values()} - self._outside
                self._put_back |= {task for task in inside if task.cancel()}
        if in_flight == "abort":
            await self._engine.abort()
        while not self.is_empty:
            await asyncio.sleep(PAUSE_STEP)
            if in_flight == "abort":
                await self._engine.abort()  # again: a request of OpenAI's API may have been on its way

    async def resume(self) -> None:
        """Have the engine compute again, and begin items again."""
        self.is_kept = False  # first: if the engine hangs, its watchdog ends it
        await self._engine.resume()
        self._most_running = AHEAD * self._engine.info.capacity
        self._opened.set()
        self._has_place.set()

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the request with this id. The request may still be on its way, over another connection."""
        if not request_id:
            return
        for piece in self._pieces:
            if piece.id == request_id:
                self._cancel(piece, items)
                return
        self._early.add(request_id, items)

    def _cancel(self, piece: Piece, items: Sequence[int]) -> None:
        for index in piece.cancel(items):
            piece.unfinished -= 1
            piece.put(cancelled_item(index))

    def close(self) -> None:
        """End all requests now, without events for the items that have not ended."""
        self._over.set()
        for piece in self._pieces:
            piece.has_events.set()

    async def wait_over(self) -> None:
        """Wait until `close`."""
        await self._over.wait()

    def finish(self, items: int) -> None:
        """Count items that the engine has answered."""
        if not self.finished and items:
            self.finished = items
            self._on_progress()
        else:
            self.finished += items

    def counters(self) -> Counters:
        """Return the counters of this server."""
        prompt_tokens, completion_tokens = self._engine.tokens()
        return Counters(
            running=self.running, waiting=sum(piece.waiting for piece in self._pieces), items=self.finished,
            failed=self.failed, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def hold(self, items: int) -> AsyncIterator[None]:
        """Admit a request that the engine's own application answers, for the block. A pause delays it.

        `items`: number of completions that it asks for. They count like items of other requests.

        Raises RemoteError: the request is refused, or the server ends during a pause.
        """
        with self._admit(items) as piece:
            while not self._opened.is_set():
                await self._wait_opened()
            self.running += items
            self._replies += 1
            piece.begun = items
            try:
                yield
            finally:
                piece.unfinished = 0
                self._replies -= 1
                self.running -= items
                self.ended += items
                if self._waiting:
                    self._has_place.set()

    async def _wait_opened(self) -> None:
        """Wait for the end of a pause. Raises RemoteError: the server ends first."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._opened, self._over)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._over.is_set():
            raise RemoteError("the server ended before this request was begun: send it again", status=503)

    @contextlib.contextmanager
    def _admit_items(self, request: RunRequest) -> Iterator[Piece]:
        """Admit a request with items for the block; yield its piece. Raises RemoteError: the request is refused."""
        with self._admit(count_items(request), request_id=request.id, alone=request.alone) as piece:
            yield piece

    @contextlib.contextmanager
    def _admit(self, size: int, *, request_id: str = "", alone: bool = False) -> Iterator[Piece]:
        """Admit a request of `size` items for the block; yield its piece. Raises RemoteError: the request is refused.

        `alone`: see `RunRequest`.
        """
        self._check_ready()  # again: the state may have changed since the request came
        most = ADMISSION * self._engine.info.capacity
        check_count(size, max(MOST_ITEMS, most))
        self._check_turn(alone)
        items = sum(piece.unfinished for piece in self._pieces)
        if items and items + size > most:  # a single request may be larger, or it could never be served
            raise RemoteError(
                f"the server has {items} items in flight and accepts at most {most}: retry later",
                status=429, retry_after=BUSY_SECONDS,
            )  # fmt: skip
        piece = Piece(request_id, self._engine, size)
        self._pieces.add(piece)
        self._cancel(piece, self._early.take(request_id))
        self.is_alone = alone
        self.idle.clear()
        try:
            yield piece
        finally:
            self._pieces.discard(piece)
            if alone:
                self.is_alone = False
                if not self._over.is_set():  # otherwise its items may be why the server ends
                    self._on_progress()
            if not self._pieces:
                self.idle.set()

    def _check_turn(self, alone: bool) -> None:
        """Refuse a request that must run alone while others are in flight, and others while it is in flight.

        After each refusal of such a request, no other request is begun for `RESERVED_SECONDS`.
        Raises RemoteError: the request must wait.
        """
        now = time.monotonic()
        if alone:
            self._reserved_until = now + RESERVED_SECONDS if self._pieces else 0.0
        if self.is_alone or (self._pieces if alone else now < self._reserved_until):
            raise RemoteError(
                "the server runs one request alone, since an item of it may crash servers: retry later",
                status=429, retry_after=BUSY_SECONDS,
            )  # fmt: skip

    async def is_ending(self) -> bool:
        """Return whether this server ends now or within `DEATH_SECONDS`, as when its engine dies.

        If so, a failure is not the item's fault.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), DEATH_SECONDS)
        return self._over.is_set()
