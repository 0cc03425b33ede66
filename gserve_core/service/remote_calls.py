"""The batches that clients send to a gateway. Their items go through the service's own queue, as those of local calls.

So the owner of the servers keeps its promises for them: it sends the items of a dead server again, narrows down what
kills servers, and is fair to all calls. A client sees one server that never dies of an item.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec

from ..batch.dispatcher import Dispatcher
from ..batch.pieces import Call, Item, Outcome, size_of
from ..errors import ItemError, ItemLost, RemoteError, TransportError
from ..messages import Event, Failure, Group, Heartbeat, Params, RunRequest
from ..run_requests import EarlyCancellations, cancelled_item, check_count, count_items, prompt_size, result_of

STEP_ITEMS = 1024
"""Maximum number of items that are submitted in one turn of the event loop."""
STEP_BYTES = 1 << 20
"""Size of the results that are sent in one turn of the event loop, in bytes. Then other requests have their turn."""
BUSY_SECONDS = 1.0
"""Retry delay for a client of a service that is closing, in seconds."""


class RemoteCalls:
    """The requests in flight at a gateway. All methods run in the gateway's event loop.

    `dispatcher`: the queue of the service.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._clients: dict[str, _Client] = {}
        self._requests: dict[str, _Request] = {}
        """The requests that have an id, by it."""
        self._early = EarlyCancellations()

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Work on a request; yield its events as they happen. If the service closes, some items get no event.

        `request.alone` is ignored: the owner itself finds out which item kills servers.

        Raises RemoteError: the request is wrong (400, 413), or the service is closed (503).
        """
        size = count_items(request)
        check_count(size)
        groups = [(group, _params_size(group.params)) for group in request.groups]
        with self._opened(request.id, size) as mine:
            try:
                await mine.submit(groups)
            except TransportError as error:
                raise RemoteError(f"the service is closed: {error}", status=503, retry_after=BUSY_SECONDS) from error
            remaining = size
            while remaining:
                try:
                    async with asyncio.timeout(request.heartbeat):
                        await mine.has_events.wait()
                except TimeoutError:
                    yield [Heartbeat(remaining)]
                    continue
                events, taken = mine.take()
                if not events:
                    return  # the client sees which items are missing, and waits for the service to return
                remaining -= len(events)
                yield events
                mine.count_taken(taken)

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the request with this id. The request may still be on its way, over another connection."""
        if not request_id:
            return
        if (mine := self._requests.get(request_id)) is not None:
            mine.cancel(items)
        else:
            self._early.add(request_id, items)

    @contextmanager
    def _opened(self, request_id: str, size: int) -> "Iterator[_Request]":
        """Record a request of `size` items for the block. Afterwards, its unfinished items are cancelled."""
        name = request_id.rpartition("-")[0] or request_id
        client = self._clients.get(name) if name else None
        if client is None:
            client = _Client(self._dispatcher)
            if name:
                self._clients[name] = client
        mine = client.open(size)
        if request_id:
            self._requests[request_id] = mine
            mine.cancel(self._early.take(request_id))
        try:
            yield mine
        finally:
            if self._requests.get(request_id) is mine:
                del self._requests[request_id]
            client.close(mine)
            if client.is_idle and self._clients.get(name) is client:
                del self._clients[name]


class _Client:
    """The requests of one client. All their items belong to one call, so they have the share of one call together."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.call = Call(self._deliver)
        self.unfinished: dict[int, _Request] = {}
        """The requests of the unfinished items, by the item's index in the call."""
        self._requests: set[_Request] = set()
        self._loop = asyncio.get_running_loop()
        self._next = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight."""
        return not self._requests

    def open(self, size: int) -> "_Request":
        """Record a request of `size` items."""
        request = _Request(self, range(self._next, self._next + size))
        self._next += size
        self._requests.add(request)
        self.unfinished.update(dict.fromkeys(request.indexes, request))
        return request

    def close(self, request: "_Request") -> None:
        """Forget a request, and cancel its unfinished items."""
        self._requests.discard(request)
        self.cancel(request, request.indexes)
        request.count_taken(request.untaken)

    def cancel(self, request: "_Request", indexes: Sequence[int]) -> list[int]:
        """Cancel items by their indexes in the call. Return those that had not ended."""
        found = [index for index in dict.fromkeys(indexes) if self.unfinished.get(index) is request]
        for index in found:
            del self.unfinished[index]
        if found:
            with suppress(TransportError):  # the service is closed
                self.dispatcher.cancel(self.call, frozenset(found))
        return found

    def count_taken(self, size: int) -> None:
        """Let the items of a paused call go on if enough results have been taken."""
        self.call.taken_size += size
        if self.call.is_paused:
            self.dispatcher.resume(self.call)

    def _deliver(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Receive outcomes. This runs in any thread."""
        is_closing = self.dispatcher.is_closing
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._add, outcomes, is_closing)

    def _add(self, outcomes: list[tuple[int, Outcome]], is_closing: bool) -> None:
        each = size_of(outcomes) // max(1, len(outcomes))
        for index, outcome in outcomes:
            request = self.unfinished.pop(index, None)
            if request is None:  # it was cancelled
                self.count_taken(each)
            elif is_closing and isinstance(outcome, ItemLost):  # another start of the service may finish it
                request.break_off()
            else:
                request.add(_event(index - request.indexes.start, outcome), each)


class _Request:
    """A request in flight, with its events that have not been sent. `indexes`: those of its items in the call."""

    def __init__(self, client: _Client, indexes: range) -> None:
        self.client = client
        self.indexes = indexes
        self.untaken = 0
        """Estimated memory of the results that have not been counted as taken, in bytes."""
        self.has_events = asyncio.Event()
        self._events: deque[tuple[Event, int]] = deque()
        self._is_broken_off = False

    async def submit(self, groups: Sequence[tuple[Group, int]]) -> None:
        """Submit the items, some at a time. Each group comes with the size of its parameters, in bytes.

        Raises TransportError: the service is closed.
        """
        for items in itertools.batched(self._items(groups), STEP_ITEMS):
            self.client.dispatcher.submit(items)
            await asyncio.sleep(0)

    def _items(self, groups: Sequence[tuple[Group, int]]) -> Iterator[Item]:
        """Yield the items that have not been cancelled."""
        indexes = iter(self.indexes)
        for group, params_size in groups:
            nothing = itertools.repeat(None)
            each = zip(group.prompts, group.seeds or nothing, group.adapters or nothing, indexes, strict=False)
            for prompt, seed, adapter, index in each:
                if index in self.client.unfinished:
                    size = prompt_size(prompt) + params_size
                    returns_prompt = group.return_prompt_token_ids
                    yield Item(
                        self.client.call, index, prompt, group.params, seed, size, returns_prompt, task=group.task,
                        adapter=adapter,
                    )  # fmt: skip

    def cancel(self, items: Sequence[int]) -> None:
        """Cancel items of the request."""
        first, size = self.indexes.start, len(self.indexes)
        for index in self.client.cancel(self, [first + item for item in items if 0 <= item < size]):
            self.add(cancelled_item(index - first), 0)

    def add(self, event: Event, size: int) -> None:
        """Add an event. `size`: its estimated memory, in bytes."""
        self.untaken += size
        self._events.append((event, size))
        self.has_events.set()

    def take(self) -> tuple[list[Event], int]:
        """Return the oldest events, up to about `STEP_BYTES`, and their size. None are left if the list is empty."""
        events: list[Event] = []
        total = 0
        while self._events and total < STEP_BYTES:
            event, size = self._events.popleft()
            events.append(event)
            total += size
        if not self._events and not self._is_broken_off:
            self.has_events.clear()
        return events, total

    def count_taken(self, size: int) -> None:
        """Count results that have been sent, or will never be. `size`: their estimated memory, in bytes."""
        self.untaken -= size
        self.client.count_taken(size)

    def break_off(self) -> None:
        """End the request after the events that it has. Its other items get none."""
        self._is_broken_off = True
        self.has_events.set()


def _event(index: int, outcome: Outcome) -> Event:
    """Return the event for the outcome of an item."""
    if isinstance(outcome, ItemError):
        return Failure(index, str(outcome), outcome.invalid, isinstance(outcome, ItemLost))
    return result_of(index, outcome)


def _params_size(params: Params | None) -> int:
    """Return the size of sampling parameters, in bytes. Raises RemoteError: they cannot be sent on (400)."""
    try:
        return len(msgspec.msgpack.encode(params))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RemoteError(f"the sampling parameters cannot be read: {error}", status=400) from error
