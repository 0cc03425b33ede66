"""An admitted request: its items as the engine prepares them, and its results until they are sent."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from ..errors import ItemError
from ..interfaces import RunningEngine
from ..messages import Event, Group, Prompt, Result, weight
from ..run_requests import prompt_size
from ..tasks import GENERATE, check_task

BACKLOG_BYTES = 1 << 20
"""Maximum size of the results that wait for a client, in bytes. Beyond it, none of its items is begun."""
SLICE, SLICE_BYTES = 1024, 128 << 10
"""Maximum number of items, and their approximate maximum size in bytes, for one turn of the event loop."""


async def prepared_items(engine: RunningEngine, group: Group) -> AsyncIterator[tuple[int, Sequence[Any]]]:
    """Prepare the prompts of a group, some at a time; yield the position of the first one and the prepared items.

    An invalid prompt becomes an ItemError. In between, the event loop serves other requests.
    """
    for part in _slices(group.prompts):
        prompts, seeds = group.prompts[part], group.seeds and group.seeds[part]
        try:
            prepared = await prepare(engine, group, prompts, seeds)
        except ItemError as wrong:
            prepared = [wrong] * len(prompts)
        yield part.start, prepared
        await asyncio.sleep(0)


async def prepare(
    engine: RunningEngine, group: Group, prompts: Sequence[Prompt], seeds: Sequence[int] | None = None
) -> Sequence[Any]:
    """Prepare prompts of a group for its task.

    Raises ItemError: the parameters are wrong, or the model does not have the task.
    """
    check_task(group.task, engine.info.tasks, engine.info.model)
    if group.task == GENERATE:
        return await engine.prepare(prompts, group.params, seeds)
    return await engine.prepare_vectors(group.task, prompts, group.params)


def _slices(prompts: Sequence[Prompt]) -> Iterator[slice]:
    """Yield slices of prompts, limited in number and in total size."""
    start = size = 0
    for place, prompt in enumerate(prompts):
        size += prompt_size(prompt)
        if place - start == SLICE - 1 or size > SLICE_BYTES:
            yield slice(start, place + 1)
            start, size = place + 1, 0
    if start < len(prompts):
        yield slice(start, len(prompts))


class Piece:
    """An admitted request, with the events that its client has not taken.

    `unfinished` of its `size` items have not ended. While its results exceed `BACKLOG_BYTES`, it is full: no more items
    are begun.
    """

    def __init__(self, request_id: str, engine: RunningEngine, size: int) -> None:
        self.id = request_id
        self.engine = engine
        self.size = self.unfinished = size
        self.has_events = asyncio.Event()
        self._taken = asyncio.Event()
        self.is_batch = False
        """Whether its items give way to interactive requests."""
        self.begun = 0
        """Number of items passed to the engine, cancelled ones included. Items are begun in order."""
        self.cancelled: set[int] = set()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        """Tasks of the items in the engine, by index."""
        self._events: list[Event] = []
        self._weighed = self._bytes = 0
        """Number of events weighed, and their weight in bytes. It matters only while items remain to be begun."""

    def put(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        self.has_events.set()

    def take(self) -> list[Event]:
        """Return the events since the last call."""
        batch, self._events, self._weighed, self._bytes = self._events, [], 0, 0
        self.has_events.clear()
        self._taken.set()
        return batch

    @property
    def waiting(self) -> int:
        """Number of items that wait for the engine."""
        return self.size - self.begun - sum(index >= self.begun for index in self.cancelled)

    def is_full(self) -> bool:
        """Return whether the results that wait for the client exceed `BACKLOG_BYTES`."""
        while self._weighed < len(self._events):
            event = self._events[self._weighed]
            self._bytes += weight(event.outputs if isinstance(event, Result) else ())
            self._weighed += 1
        return self._bytes > BACKLOG_BYTES

    async def wait_taken(self) -> None:
        """Wait until the client takes the events."""
        self._taken.clear()
        await self._taken.wait()

    def cancel(self, items: Sequence[int]) -> list[int]:
        """Cancel items; return those not begun. The caller must report their cancellation."""
        new_items = {index for index in items if 0 <= index < self.size} - self.cancelled
        self.cancelled |= new_items
        for index in new_items:
            if index in self.tasks:
                self.tasks[index].cancel()
        return sorted(index for index in new_items if index >= self.begun)
