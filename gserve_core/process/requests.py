"""A request that a server has taken in: its items as the engine prepares them, and its results until they are sent."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from ..errors import ItemError
from ..interfaces import RunningEngine
from ..schema import Conversation, Event, Failure, FlatOutput, FlatResult, Group, Prompt, ResponseOutput, Result, weight

BACKLOG_BYTES = 1 << 20
"""Bytes of results that may wait for a client. While there are more, none of its items is begun."""
SLICE, SLICE_BYTES = 1024, 128 << 10
"""How many items, and about how many bytes of them, are dealt with in one turn of the event loop."""


async def prepared_items(engine: RunningEngine, group: Group) -> AsyncIterator[tuple[int, Sequence[Any]]]:
    """Yield the prompts of a group as the engine prepares them, some at a time, with the place of the first.

    One that is wrong is an ItemError. In between the event loop answers others.
    """
    for part in _slices(group.prompts):
        prompts, seeds = group.prompts[part], group.seeds and group.seeds[part]
        try:
            prepared: Sequence[Any] = await engine.prepare(prompts, group.params, seeds)
        except ItemError as wrong:
            prepared = [wrong] * len(prompts)
        yield part.start, prepared
        await asyncio.sleep(0)


def _slices(prompts: Sequence[Prompt]) -> Iterator[slice]:
    """Yield slices of prompts that are not too many, and not too large together."""
    start = size = 0
    for place, prompt in enumerate(prompts):
        size += len(prompt) if isinstance(prompt, str) else _size(prompt)
        if place - start == SLICE - 1 or size > SLICE_BYTES:
            yield slice(start, place + 1)
            start, size = place + 1, 0
    if start < len(prompts):
        yield slice(start, len(prompts))


def _size(prompt: list[int] | Conversation) -> int:
    """Return about how many bytes a prompt has that is not a text."""
    if isinstance(prompt, list):
        return 4 * len(prompt)
    contents = (message.content for message in prompt.messages)
    return sum(len(it) if isinstance(it, str) else sum(len(part.text) for part in it) for it in contents)


def result_of(index: int, outputs: list[ResponseOutput]) -> Result:
    """Return the event of an item that was answered."""
    for output in outputs:
        if isinstance(output, FlatOutput):
            return FlatResult(index, outputs)  # type: ignore[arg-type]
    return Result(index, outputs)


def cancelled_item(index: int) -> Failure:
    """Return the event of an item that was cancelled."""
    return Failure(index, "cancelled", invalid=False)


class Piece:
    """A request that was taken in: `left` of its `size` items have not ended. It keeps what its client has not taken.

    While that takes more than `BACKLOG_BYTES`, it is full: no more items are begun.
    """

    def __init__(self, request_id: str, engine: RunningEngine, size: int) -> None:
        self.id = request_id
        self.engine = engine
        self.size = self.left = size
        self.news = asyncio.Event()
        self._taken = asyncio.Event()
        self.begun = 0
        """How many items the engine has had, or would have: they are begun in order."""
        self.cancelled: set[int] = set()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        """Of the items that the engine has."""
        self._events: list[Event] = []
        self._weighed = self._bytes = 0
        """How many of the events have been weighed, and their weight. It matters only while items are to be begun."""

    def put(self, event: Event) -> None:
        """Add what has happened."""
        self._events.append(event)
        self.news.set()

    def take(self) -> list[Event]:
        """Return what has happened since the last time."""
        batch, self._events, self._weighed, self._bytes = self._events, [], 0, 0
        self.news.clear()
        self._taken.set()
        return batch

    def is_full(self) -> bool:
        """Return whether the client has not taken more than enough."""
        while self._weighed < len(self._events):
            event = self._events[self._weighed]
            self._bytes += weight(event.outputs if isinstance(event, Result) else ())
            self._weighed += 1
        return self._bytes > BACKLOG_BYTES

    async def wait_taken(self) -> None:
        """Wait until the client takes what has happened."""
        self._taken.clear()
        await self._taken.wait()

    def cancel(self, items: Sequence[int]) -> list[int]:
        """Cancel items; return those of them that have not been begun, for which nobody else says so."""
        fresh = {index for index in items if 0 <= index < self.size} - self.cancelled
        self.cancelled |= fresh
        for index in fresh:
            if index in self.tasks:
                self.tasks[index].cancel()
        return sorted(index for index in fresh if index >= self.begun)
