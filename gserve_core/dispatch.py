"""The queue of items, and who gets what next.

Calls from any thread put items in; each server takes as many as keep it busy, in pieces that shrink towards the end of
the queue, so that no server idles while another has a tail. Results come back one by one. What a server that is lost
had not finished goes back to the head of the queue, and waits there while a server is on its way. All state lives in
one event loop, in a thread of its own.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import uvloop
from msgspec import Struct

from .errors import GserveError, ItemError, ItemLost, RemoteError, StallTimeout, TransportError
from .interfaces import Connection
from .schema import Failure, Group, Params, Prompt, ResponseOutput, Result, RunRequest

MAX_PIECE_ITEMS = 256
MAX_PIECE_TEXT = 4 << 20
"""How many characters (or token ids) a piece may hold, unless it is a single item."""
MAX_LOSSES = 3
"""How many times an item may be in flight when a server is lost; after that it is taken for the reason.

For its last try it is alone on a server, so that no other item is taken for it.
"""
HEARTBEAT = 5.0
"""Seconds between two signs of life of a server at work; less where `client_timeout` is short."""
PROBE = 1.0
"""Seconds between two questions to a server that broke off, whether it is there all the same."""
BUSY = 1.0
"""Seconds until a server that has enough to do is asked again, where it does not say."""
AHEAD = 1.25
"""How many times its capacity a server has at least, where there is as much: while it works it never waits for more."""

logger = logging.getLogger("gserve.dispatch")

type Outcome = list[ResponseOutput] | ItemError


class Call:
    """What the items of one call share. `deliver` is given their outcomes in batches, in the order they happen.

    It is called from the dispatcher's thread.
    """

    def __init__(self, number: int, deliver: Callable[[list[tuple[int, Outcome]]], object]) -> None:
        self.number = number
        self.deliver = deliver
        self.cancelled = False


class Item(Struct, eq=False, gc=False):
    """An item on its way. `seed`: for its sampling, where its parameters name none."""

    call: Call
    index: int
    prompt: Prompt
    params: Params | None
    seed: int | None
    losses: int = 0

    @property
    def text(self) -> int:
        """Roughly how much there is to send."""
        if isinstance(self.prompt, (str, list)):
            return 1 + len(self.prompt)
        return 1 + sum(len(message.content) for message in self.prompt.messages)

    @property
    def is_suspect(self) -> bool:
        """Say whether the item is to be alone on a server, since it may be what servers die of."""
        return self.losses == MAX_LOSSES - 1


class _Worker:
    """A server, as the queue sees it."""

    def __init__(
        self, key: str, connection: Connection, capacity: int, timeout: float | None, is_watched: bool
    ) -> None:
        self.key = key
        self.connection = connection
        self.is_watched = is_watched
        self.least = int(AHEAD * capacity)
        self.window = 2 * capacity
        self.piece_text = MAX_PIECE_TEXT
        self.heartbeat = HEARTBEAT if timeout is None else min(HEARTBEAT, timeout / 3)
        self.in_flight = 0
        self.finished = 0
        self.lost = False
        self.is_busy = False
        self.is_reserved = False
        self.probe: asyncio.Task[None] | None = None
        self.pieces: dict[asyncio.Task[None], list[Item | None]] = {}

    @property
    def may_return(self) -> bool:
        """Say whether a server that is lost may be there all the same."""
        return self.probe is not None

    def limit(self, outstanding: int, servers: int) -> int:
        """Return how many items it may have, of all that so many servers have and shall have.

        That is its share while it can work on that at once. Of a larger one it has no more than the half ahead: another
        may turn out to be faster, or its items to be shorter.
        """
        share = -(-outstanding // servers)
        return min(share, self.window, max(share // min(servers, 2), self.least))


class Dispatcher:
    """One queue of items and the servers that empty it. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._queue: deque[Item] = deque()
        self._suspects: deque[Item] = deque()
        self._coming: set[str] = set()
        self._no_server = "there is no server"
        self._ending: str | None = None
        self._numbers = itertools.count()
        self._workers: dict[str, _Worker] = {}
        self._loop = uvloop.new_event_loop()
        self._closed = False
        self._has_news = False
        self._closing: set[asyncio.Task[None]] = set()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gserve-dispatch", daemon=True)
        self._thread.start()

    @property
    def is_foreign(self) -> bool:
        """Say whether this process was forked from the one that made the dispatcher: its thread is not here."""
        return self._pid != os.getpid()

    @property
    def room(self) -> int:
        """How many items all servers together hold at once, when they have enough."""
        return sum(worker.window for worker in list(self._workers.values()))

    def expect(self, key: str) -> None:
        """Hold items, where there is no other server, for one that is on its way."""
        self._soon(self._coming.add, key)

    def add(
        self, key: str, connection: Connection, capacity: int, timeout: float | None, *, is_watched: bool = False
    ) -> None:
        """Add a server that works on `capacity` items at once.

        One that `is_watched` will be removed when it is dead: until then a broken line may mend.
        """
        self._soon(self._add, _Worker(key, connection, capacity, timeout, is_watched))

    def remove(self, key: str, why: str, *, returns: bool = False, died: bool = True) -> None:
        """Take a server out; its unfinished items go to the others, or wait for it where it `returns`.

        died: whether the items that it was working on may be the reason. Only that counts as a loss of theirs.
        """
        self._soon(self._remove, key, why, returns)

    def drain(self, why: str) -> None:
        """Send nothing any more: what the servers have goes on, all else is lost because of `why`, now and later."""
        self._soon(self._drain, why)

    def finished(self, key: str) -> int:
        """Return how many items a server has finished since it was added."""
        worker = self._workers.get(key)
        return worker.finished if worker is not None else 0

    def is_narrowing(self, key: str) -> bool:
        """Return whether a server works on nothing but items of which one may kill servers."""
        worker = self._workers.get(key)
        return worker is not None and worker.is_reserved

    def open(self, deliver: Callable[[list[tuple[int, Outcome]]], object]) -> Call:
        """Begin a call. `deliver` must not block."""
        return Call(next(self._numbers), deliver)

    def submit(self, items: list[Item]) -> None:
        """Put items into the queue."""
        self._soon(self._put, items)

    def cancel(self, call: Call) -> None:
        """Drop what is left of a call, also on the servers that are at it."""
        call.cancelled = True
        self._soon(self._cancel)

    def ask[T](self, question: Coroutine[Any, Any, T], timeout: float = 10.0) -> T:
        """Run a coroutine (of a connection) in the event loop, and return what it returns. Raises what it raises."""
        future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return future.result(timeout)
        except TimeoutError as error:
            future.cancel()
            raise StallTimeout(f"no answer within {timeout:g} s") from error

    def close(self) -> None:
        """End every call that is left with errors, close all connections, and end the thread. Idempotent."""
        if self.is_foreign:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(TimeoutError, RuntimeError):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        if not self._thread.is_alive():
            self._loop.close()

    def _soon(self, function: Any, *arguments: Any) -> None:
        if self.is_foreign:
            raise GserveError("this process was forked from the one that made this client: make a new one here")
        with self._lock:
            if self._closed:
                raise TransportError("this service or client is closed: start it again")
            self._loop.call_soon_threadsafe(function, *arguments)

    # --------------------------------------------------------------------------------- from here on: in the event loop

    def _add(self, worker: _Worker) -> None:
        self._workers[worker.key] = worker
        self._coming.discard(worker.key)
        self._pump()

    def _remove(self, key: str, why: str, returns: bool) -> None:
        (self._coming.add if returns else self._coming.discard)(key)
        self._no_server = f"no server is left: {why}"
        worker = self._workers.pop(key, None)
        if worker is not None:
            worker.lost = True
            if worker.probe is not None:
                worker.probe.cancel()
                worker.probe = None
            for task in worker.pieces:
                task.cancel()
            if not worker.pieces:
                self._let_go(worker)
        self._pump()

    def _drain(self, why: str) -> None:
        self._ending = why
        self._pump()

    def _let_go(self, worker: _Worker) -> None:
        closing = asyncio.ensure_future(worker.connection.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _put(self, items: list[Item]) -> None:
        for worker in self._workers.values():
            if worker.lost and worker.probe is None:  # it may be there again
                worker.probe = asyncio.ensure_future(self._look_for(worker))
        self._queue.extend(items)
        if not self._has_news:  # once for all calls that come at the same time: each would be a request of its own
            self._has_news = True
            self._loop.call_soon(self._pump)

    async def _look_for(self, worker: _Worker) -> None:
        """Find out whether a server that broke off is there all the same. Nothing is sent to it meanwhile."""
        while worker.lost:
            try:
                worker.lost = (await worker.connection.health()).status != "ok"
            except TransportError:
                pass
            except Exception:
                logger.exception("cannot ask %s for its state", worker.key)
            if not worker.is_watched:
                break
            if worker.lost:
                await asyncio.sleep(PROBE)
        worker.probe = None
        if worker.lost:
            logger.warning("lost %s: %s", worker.key, self._no_server)
        self._pump()

    def _cancel(self) -> None:
        self._queue = deque(item for item in self._queue if not item.call.cancelled)
        self._suspects = deque(item for item in self._suspects if not item.call.cancelled)
        for worker in self._workers.values():
            for task, piece in worker.pieces.items():
                if all(item is None or item.call.cancelled for item in piece):
                    task.cancel()

    def _pump(self) -> None:
        """Give every server as much of the queue as it should have now."""
        self._has_news = False
        if self._ending is not None:
            self._lose_all(self._ending)
            return
        workers = [worker for worker in self._workers.values() if not worker.lost]
        if not workers:
            if not self._coming and not any(worker.may_return for worker in self._workers.values()):
                self._lose_all(self._no_server)
            return
        free = [worker for worker in workers if not worker.is_reserved and not worker.is_busy]
        while self._queue and free:
            if self._suspects and self._suspects[0].call.number < self._queue[0].call.number:
                break  # it is their turn: they come last in their call, since they may cost a server
            worker = min(free, key=lambda it: it.in_flight / it.window)
            outstanding = len(self._queue) + sum(it.in_flight for it in free)
            limit = worker.limit(outstanding, len(free))
            room = limit - worker.in_flight
            if room < min(len(self._queue), max(1, limit // 4)):  # a few at a time are not worth a request
                return
            self._begin(worker, self._take(min(room, MAX_PIECE_ITEMS), worker.piece_text))
        for worker in free:
            if self._suspects and not worker.in_flight:
                worker.is_reserved = True
                self._begin(worker, [self._suspects.popleft()])
                if self._queue and not self._suspects:
                    self._pump()
                    return

    def _begin(self, worker: _Worker, piece: list[Item]) -> None:
        worker.in_flight += len(piece)
        task = asyncio.ensure_future(self._send(worker, piece))
        worker.pieces[task] = [*piece]
        task.add_done_callback(worker.pieces.pop)

    def _take(self, count: int, most: int) -> list[Item]:
        """Take up to `count` items from the queue, with no more text than `most`, unless one alone has more."""
        taken: list[Item] = []
        text = 0
        while self._queue and len(taken) < count:
            text += self._queue[0].text
            if text > most and taken:
                break
            taken.append(self._queue.popleft())
        return taken

    async def _send(self, worker: _Worker, piece: list[Item]) -> None:
        """Have a server work on a piece; deliver what it says, and put back what it leaves undone."""
        task = asyncio.current_task()
        assert task is not None
        left: list[Item | None] = worker.pieces[task]
        error = TransportError("the server left items out")
        try:
            stream = worker.connection.run(RunRequest(_groups(piece), worker.heartbeat))
            async with contextlib.aclosing(stream):
                async for events in stream:
                    self._deliver(worker, left, events)
        except TransportError as raised:
            error = raised
        except asyncio.CancelledError:
            error = TransportError("the server was taken out of service")
        except Exception as raised:
            logger.exception("a piece of work failed")
            error = TransportError(f"{type(raised).__name__}: {raised}")
        unfinished = [item for item in left if item is not None and not item.call.cancelled]
        worker.in_flight -= sum(item is not None for item in left)
        left.clear()
        worker.is_reserved = False
        if unfinished:
            self._unfinished(worker, unfinished, error)
        if self._workers.get(worker.key) is not worker and not worker.in_flight:
            self._let_go(worker)
        self._pump()

    def _deliver(self, worker: _Worker, left: list[Item | None], events: Sequence[Any]) -> None:
        outcomes: defaultdict[Call, list[tuple[int, Outcome]]] = defaultdict(list)
        for event in events:
            if not isinstance(event, (Result, Failure)):
                continue
            item = left[event.index] if 0 <= event.index < len(left) else None
            if item is None:
                continue  # said twice
            left[event.index] = None
            worker.in_flight -= 1
            worker.finished += 1
            outcome: Outcome = (
                event.outputs
                if isinstance(event, Result)
                else ItemError(event.message, index=item.index, invalid=event.invalid)
            )
            outcomes[item.call].append((item.index, outcome))
        for call, batch in outcomes.items():
            call.deliver(batch)
        if self._queue and outcomes:
            self._pump()

    def _unfinished(self, worker: _Worker, items: list[Item], error: TransportError) -> None:
        """Put items back, or give them up; doubt the server that left them."""
        if isinstance(error, RemoteError) and error.status == 413 and len(items) > 1:
            worker.piece_text = max(1, min(worker.piece_text, sum(item.text for item in items)) // 2)
            self._queue.extendleft(reversed(items))
            return
        if isinstance(error, RemoteError) and error.status == 429:
            worker.is_busy = True
            asyncio.get_running_loop().call_later(error.retry_after or BUSY, self._ask_again, worker)
            self._queue.extendleft(reversed(items))
            return
        if isinstance(error, RemoteError) and 400 <= error.status < 500:
            invalid = error.status in (400, 413, 422)
            for item in items:
                item.call.deliver([(item.index, ItemError(str(error), index=item.index, invalid=invalid))])
            return
        if self._workers.get(worker.key) is worker and not worker.lost:
            worker.lost = True
            self._no_server = f"no server is left: {error}"
            if isinstance(error, StallTimeout) and not worker.is_watched:  # its event loop may well answer
                logger.warning("lost %s: %s", worker.key, error)
            else:
                worker.probe = asyncio.ensure_future(self._look_for(worker))
        for item in items:
            item.losses += 1
        self._lose(
            [item for item in items if item.losses >= MAX_LOSSES],
            f"a server was lost {MAX_LOSSES} times while it worked on this, the last time on nothing else: {error}",
        )
        self._suspects.extend(item for item in items if item.is_suspect)
        self._queue.extendleft(item for item in reversed(items) if item.losses < MAX_LOSSES - 1)

    def _ask_again(self, worker: _Worker) -> None:
        worker.is_busy = False
        self._pump()

    def _lose_all(self, message: str) -> None:
        self._lose([*self._queue, *self._suspects], message)
        self._queue.clear()
        self._suspects.clear()

    def _lose(self, items: list[Item], message: str) -> None:
        for item in items:
            item.call.deliver([(item.index, ItemLost(message, index=item.index, invalid=False))])

    async def _close(self) -> None:
        self._no_server = "the service was closed"
        self._coming.clear()
        tasks = [task for worker in self._workers.values() for task in worker.pieces]
        tasks += [worker.probe for worker in self._workers.values() if worker.probe is not None]
        for worker in self._workers.values():
            worker.lost, worker.probe = True, None
        self._pump()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._workers.values():
            await worker.connection.close()
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._workers.clear()


def _groups(items: list[Item]) -> list[Group]:
    """Return the items of a piece as they travel: those that share their parameters together."""
    encoded: dict[int, bytes] = {}

    def kind(item: Item) -> tuple[bytes, bool]:
        """Return what the items of a group share. Of equal parameters each call has an object of its own."""
        if (params := id(item.params)) not in encoded:
            encoded[params] = msgspec.msgpack.encode(item.params)
        return encoded[params], item.seed is None

    groups = []
    for _, it in itertools.groupby(items, kind):
        members = list(it)
        seeds = [item.seed for item in members if item.seed is not None]
        groups.append(Group([item.prompt for item in members], members[0].params, seeds or None))
    return groups
