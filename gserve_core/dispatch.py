"""The queue of items, and who gets what next.

Calls from any thread put items in; each server takes as many as keep it busy, in pieces that shrink towards the end of
the queue, so that no server idles while another has a tail. Results come back one by one. What a server that is lost
had not finished goes back to the head of the queue. All state lives in one event loop, in a thread of its own.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from .errors import ItemError, RemoteError, StallTimeout, TransportError
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

logger = logging.getLogger("gserve.dispatch")

type Outcome = list[ResponseOutput] | ItemError


class Call:
    """The items of one call: what the caller waits on. Its outcomes come in batches, in the order they happen."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self._news: queue.SimpleQueue[list[tuple[int, Outcome]]] = queue.SimpleQueue()
        self._size = size
        self.cancelled = False

    def deliver(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Hand outcomes to the caller. From any thread."""
        self._news.put(outcomes)

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        """Yield the index and the outcome of every item, as they come."""
        left = self._size
        while left:
            batch = self._news.get()
            left -= len(batch)
            yield from batch


class _Item:
    """An item on its way."""

    __slots__ = ("call", "index", "losses", "params", "prompt")

    def __init__(self, call: Call, index: int, prompt: Prompt, params: Params | None) -> None:
        self.call = call
        self.index = index
        self.prompt = prompt
        self.params = params
        self.losses = 0

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

    def __init__(self, key: str, connection: Connection, capacity: int, timeout: float | None) -> None:
        self.key = key
        self.connection = connection
        self.window = 2 * capacity
        self.piece_text = MAX_PIECE_TEXT
        self.heartbeat = HEARTBEAT if timeout is None else min(HEARTBEAT, timeout / 3)
        self.in_flight = 0
        self.lost = False
        self.is_reserved = False
        self.probe: asyncio.Task[None] | None = None
        self.pieces: dict[asyncio.Task[None], list[_Item | None]] = {}


class Dispatcher:
    """One queue of items and the servers that empty it. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._queue: deque[_Item] = deque()
        self._suspects: deque[_Item] = deque()
        self._no_server = "there is no server"
        self._numbers = itertools.count()
        self._workers: dict[str, _Worker] = {}
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._closing: asyncio.Future[None] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gserve-dispatch", daemon=True)
        self._thread.start()

    def add(self, key: str, connection: Connection, capacity: int, timeout: float | None) -> None:
        """Add a server that works on `capacity` items at once."""
        self._soon(self._add, _Worker(key, connection, capacity, timeout))

    def remove(self, key: str) -> None:
        """Take a server out; its unfinished items go to the others."""
        self._soon(self._remove, key)

    def submit(self, items: Sequence[tuple[int, Prompt, Params | None]], size: int) -> Call:
        """Put the items (index, prompt, parameters) of a call of `size` items into the queue.

        Outcomes of the other indexes are the caller's to deliver.
        """
        call = Call(next(self._numbers), size)
        self._soon(self._put, [_Item(call, *item) for item in items])
        return call

    def cancel(self, call: Call) -> None:
        """Drop what is left of a call, also on the servers that are at it."""
        call.cancelled = True
        self._soon(self._cancel, call)

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
        with self._lock:
            if self._closed:
                raise TransportError("this service or client is closed: start it again")
            self._loop.call_soon_threadsafe(function, *arguments)

    # --------------------------------------------------------------------------------- from here on: in the event loop

    def _add(self, worker: _Worker) -> None:
        self._workers[worker.key] = worker
        self._pump()

    def _remove(self, key: str) -> None:
        worker = self._workers.pop(key, None)
        if worker is not None:
            worker.lost = True
            for task in worker.pieces:
                task.cancel()
            if worker.probe is not None:
                worker.probe.cancel()
            if not worker.pieces:
                self._closing = asyncio.ensure_future(worker.connection.close())
            self._pump()

    def _put(self, items: list[_Item]) -> None:
        for worker in self._workers.values():
            if worker.lost and worker.probe is None:  # it may be there again
                worker.probe = asyncio.ensure_future(self._look_for(worker))
        self._queue.extend(items)
        self._pump()

    async def _look_for(self, worker: _Worker) -> None:
        """Find out whether a server that broke off is there all the same. Nothing is sent to it meanwhile."""
        try:
            worker.lost = (await worker.connection.health()).status != "ok"
        except TransportError:
            pass
        except Exception:
            logger.exception("cannot ask %s for its state", worker.key)
        worker.probe = None
        if worker.lost:
            logger.warning("lost %s: %s", worker.key, self._no_server)
        self._pump()

    def _cancel(self, call: Call) -> None:
        self._queue = deque(item for item in self._queue if item.call is not call)
        self._suspects = deque(item for item in self._suspects if item.call is not call)
        for worker in self._workers.values():
            for task, piece in worker.pieces.items():
                if all(item is None or item.call.cancelled for item in piece):
                    task.cancel()

    def _pump(self) -> None:
        """Give every server as much of the queue as it should have now."""
        workers = [worker for worker in self._workers.values() if not worker.lost]
        if not workers:
            if all(worker.probe is None for worker in self._workers.values()):
                self._fail([*self._queue, *self._suspects], self._no_server)
                self._queue.clear()
                self._suspects.clear()
            return
        free = [worker for worker in workers if not worker.is_reserved]
        while self._queue and free:
            if self._suspects and self._suspects[0].call.number < self._queue[0].call.number:
                break  # it is their turn: they come last in their call, since they may cost a server
            worker = min(free, key=lambda it: it.in_flight / it.window)
            outstanding = len(self._queue) + sum(it.in_flight for it in free)
            limit = min(worker.window, -(-outstanding // len(free)))
            room = limit - worker.in_flight
            if room < min(len(self._queue), max(1, limit // 4)):  # a few at a time are not worth a request
                return
            self._begin(worker, list(self._take(min(room, MAX_PIECE_ITEMS), worker.piece_text)))
        for worker in free:
            if self._suspects and not worker.in_flight:
                worker.is_reserved = True
                self._begin(worker, [self._suspects.popleft()])
                if self._queue and not self._suspects:
                    self._pump()
                    return

    def _begin(self, worker: _Worker, piece: list[_Item]) -> None:
        worker.in_flight += len(piece)
        task = asyncio.ensure_future(self._send(worker, piece))
        worker.pieces[task] = [*piece]
        task.add_done_callback(worker.pieces.pop)

    def _take(self, count: int, most: int) -> Iterator[_Item]:
        text = 0
        while self._queue and count:
            text += self._queue[0].text
            if text > most and text > self._queue[0].text:
                return
            yield self._queue.popleft()
            count -= 1

    async def _send(self, worker: _Worker, piece: list[_Item]) -> None:
        """Have a server work on a piece; deliver what it says, and put back what it leaves undone."""
        task = asyncio.current_task()
        assert task is not None
        left: list[_Item | None] = worker.pieces[task]
        groups = [
            Group([item.prompt for item in group], params)
            for params, group in (
                (members[0].params, members)
                for members in (list(it) for _, it in itertools.groupby(piece, key=lambda item: id(item.params)))
            )
        ]
        error = TransportError("the server left items out")
        try:
            stream = worker.connection.run(RunRequest(groups, worker.heartbeat))
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
        if worker.key not in self._workers and not worker.in_flight:
            await worker.connection.close()
        self._pump()

    def _deliver(self, worker: _Worker, left: list[_Item | None], events: Sequence[Any]) -> None:
        outcomes: dict[Call, list[tuple[int, Outcome]]] = {}
        for event in events:
            if not isinstance(event, (Result, Failure)):
                continue
            item = left[event.index] if 0 <= event.index < len(left) else None
            if item is None:
                continue  # said twice
            left[event.index] = None
            worker.in_flight -= 1
            outcome: Outcome = (
                event.outputs
                if isinstance(event, Result)
                else ItemError(event.message, index=item.index, invalid=event.invalid)
            )
            outcomes.setdefault(item.call, []).append((item.index, outcome))
        for call, batch in outcomes.items():
            call.deliver(batch)
        if self._queue and outcomes:
            self._pump()

    def _unfinished(self, worker: _Worker, items: list[_Item], error: TransportError) -> None:
        """Put items back, or give them up; doubt the server that left them."""
        if isinstance(error, RemoteError) and error.status == 413 and len(items) > 1:
            worker.piece_text = max(1, min(worker.piece_text, sum(item.text for item in items)) // 2)
            self._queue.extendleft(reversed(items))
            return
        if isinstance(error, RemoteError) and 400 <= error.status < 500 and error.status != 429:
            self._fail(items, str(error), invalid=error.status in (400, 413, 422))
            return
        if worker.key in self._workers and not worker.lost:
            worker.lost = True
            self._no_server = f"no server is left: {error}"
            if isinstance(error, StallTimeout):  # its event loop may well answer
                logger.warning("lost %s: %s", worker.key, error)
            else:
                worker.probe = asyncio.ensure_future(self._look_for(worker))
        for item in items:
            item.losses += 1
        self._fail([item for item in items if item.losses >= MAX_LOSSES], str(error))
        self._suspects.extend(item for item in items if item.is_suspect)
        self._queue.extendleft(item for item in reversed(items) if item.losses < MAX_LOSSES - 1)

    def _fail(self, items: list[_Item], message: str, *, invalid: bool = False) -> None:
        for item in items:
            item.call.deliver([(item.index, ItemError(message, index=item.index, invalid=invalid))])

    async def _close(self) -> None:
        self._no_server = "the service was closed"
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
        self._workers.clear()
