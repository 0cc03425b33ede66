"""A call in progress: its items are read as earlier ones end, and their outcomes come back."""

import asyncio
import contextvars
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, Literal, Self

from ..errors import BatchError, BatchInterrupted, ConfigError, DeadlineExceeded, ItemError, ItemLost, TransportError
from ..messages import ResponseOutput
from .dispatcher import Dispatcher
from .items import Items, ItemSource
from .pieces import Call, Item, Outcome, size_of
from .progress import bar
from .results import Results

MAX_READ_AHEAD = 1 << 16
"""Maximum number of items of a call that are read and not yet handed to the caller.
If the servers have room for more than half of it, twice their room applies instead."""
MAX_READ_AHEAD_SIZE = 64 << 20, 8 << 10
"""Maximum size of the items of a call that are read and have not ended, in bytes.
The first number holds in total, the second for each item that the servers have room for. The larger limit applies."""
MAX_STEP_ITEMS = 1 << 12
"""Maximum number of items that are read in one step."""
MAX_LIST_SIZE = 1 << 20
"""Size of outcomes from which on they are not joined with later ones, in bytes. The caller may take one at a time."""
MAX_STEP_SECONDS = 0.05
"""Maximum time of one step on a list or tuple, in seconds."""
ROOM_CHECK_SECONDS = 1.0
"""Maximum time between two checks of the reader for room, in seconds."""
CLOSED_CHECK_SECONDS = 1.0
"""Time between two checks whether the dispatcher is closed, in seconds, while the source gives nothing."""

type OnError = Literal["raise", "return"]
type ValueOf = Callable[[list[ResponseOutput]], Any]
"""Returns the result of an item, as the caller gets it, from its outputs: `texts_of` or `unfolded`, for example."""


class Batch:
    """A call in progress.

    The caller's thread repeats these steps: call `feed`, wait at most `max_wait` seconds for outcomes, pass them to
    `count`.

    `feed` itself reads a list or tuple. Any other iterable may block, or wait for an earlier outcome of this call. A
    separate thread reads such an iterable, and submits each item at once.

    `deliver`: receives outcomes. It is called from any thread and must not block.
    `finishes`: whether items that were already sent end before an error of reading or sending is raised. Otherwise each
    item of a list has an outcome, even if all is closed before all of them are sent.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        items: ItemSource,
        deadline: float | None,
        deliver: Callable[[list[tuple[int, Outcome]]], object],
        *,
        finishes: bool = False,
    ) -> None:
        self._finishes = finishes
        self._dispatcher = dispatcher
        self._items = items
        self._deliver = deliver
        self._call = Call(deliver)
        self._source = items.read(self._call)
        self._deadline = deadline
        self._deadline_at = None if deadline is None else time.monotonic() + deadline
        self._unfinished: set[int] | None = None if deadline is None else set()
        self._reader: threading.Thread | None = None
        self._reading = threading.Lock()
        """Held while an item is submitted, so that no item is submitted after the deadline."""
        self._failure: BaseException | None = None
        self._room = threading.Event()
        self._read = 0
        self._read_size = 0
        self._counted = 0
        self._is_read = False

    def feed(self) -> bool:
        """Submit some items if there is room. Return whether more outcomes will come.

        After the deadline, it cancels all unfinished items, even while outcomes wait. The caller takes those outcomes,
        then calls `expire`.

        Raises what the source raises.
        Raises TransportError: the dispatcher was closed.
        """
        if self.is_late:
            if not self._call.is_cancelled:
                self.cancel()
        elif self._items.is_at_hand:
            if not self._is_full:
                try:
                    self._read_some()
                except Exception as error:
                    self._failure = error
        elif self._reader is None:
            run = contextvars.copy_context().run
            self._reader = threading.Thread(target=run, args=(self._read_all,), name="gserve-reader", daemon=True)
            self._reader.start()
        if self._failure is not None and not (self._finishes and self._counted < self._read):
            raise self._failure
        if self._reader is not None and self._counted >= self._read and not self._is_read:
            self._dispatcher.check()  # the source may give nothing for any length of time
        return self._counted < self._read or not self._is_read

    def _read_some(self) -> None:
        """Read and submit items while there is room, in one step."""
        good: list[Item] = []
        bad: list[tuple[int, Outcome]] = []
        now = time.monotonic
        enough = now() + MAX_STEP_SECONDS
        room = before = self._size_room
        count = min(MAX_STEP_ITEMS, self._item_room)
        for item in islice(self._source, count):
            if isinstance(item, ItemError):
                bad.append((item.index, item))
            else:
                good.append(item)
                room -= item.size
            if room < 0 or now() > enough:
                break
        else:
            self._is_read = len(good) + len(bad) < count
        if good:
            try:
                self._dispatcher.check()
            except TransportError as error:  # all is closed: the results so far are not to be lost with the rest
                if self._finishes or not self._read:
                    raise
                bad += [(item.index, ItemLost(str(error), index=item.index, invalid=False)) for item in good]
                good, room = [], before
            else:
                self._dispatcher.submit(good)
        if bad:
            self._deliver(bad)
        self._read += len(good) + len(bad)
        self._read_size += before - room
        if self._unfinished is not None:
            self._unfinished.update([item.index for item in good], [index for index, _ in bad])

    def _read_all(self) -> None:
        """Submit each item as soon as it is read, and wait while there is no room. This is the reader's thread."""
        try:
            while not self._is_read and not self._call.is_cancelled:
                if self._is_full:
                    self._room.wait(ROOM_CHECK_SECONDS)
                    self._room.clear()
                else:
                    self._is_read = self._submit_one_by_one(self._size_room)
        except BaseException as error:
            self._failure = error
        finally:
            self._deliver([])

    def _submit_one_by_one(self, room: int) -> bool:
        """Submit up to `MAX_STEP_ITEMS` items, or about `room` bytes, each as soon as it is read.

        Return whether all items have been read.
        """
        call, before = self._call, room
        submit = self._submit if self._unfinished is None else self._submit_in_time
        count = min(MAX_STEP_ITEMS, self._item_room)
        last = self._read + count
        try:
            for item in islice(self._source, count):
                room -= submit(item)
                if room < 0 or call.is_cancelled:
                    return False
        finally:
            self._read_size += before - room
        return self._read < last

    def _submit(self, item: Item | ItemError) -> int:
        """Submit an item, or deliver its error. Return its size in bytes."""
        self._read += 1
        if isinstance(item, ItemError):
            self._deliver([(item.index, item)])
            return 0
        try:
            self._dispatcher.submit((item,))
        except BaseException:  # no outcome will come for it
            self._read -= 1
            raise
        return item.size

    def _submit_in_time(self, item: Item | ItemError) -> int:
        """Submit an item as `_submit` does, unless the deadline has come."""
        assert self._unfinished is not None
        with self._reading:
            if self._call.is_cancelled:
                return 0
            self._unfinished.add(item.index)
            return self._submit(item)

    @property
    def _is_full(self) -> bool:
        if self._is_read or self._failure is not None or self._call.is_cancelled:
            return True
        return self._item_room < max(1, min(MAX_STEP_ITEMS, self._max_ahead // 4)) or self._size_room <= 0

    @property
    def _max_ahead(self) -> int:
        """Maximum number of items that are read and not yet handed to the caller."""
        return max(MAX_READ_AHEAD, 2 * self._dispatcher.room)

    @property
    def _item_room(self) -> int:
        """Number of items that may be read now."""
        return max(0, self._max_ahead - (self._read - self._counted))

    @property
    def _size_room(self) -> int:
        """Number of bytes that may be read now."""
        most = max(MAX_READ_AHEAD_SIZE[0], MAX_READ_AHEAD_SIZE[1] * self._dispatcher.room)
        return most - (self._read_size - self._call.ended_size)

    @property
    def max_wait(self) -> float | None:
        """Maximum time to wait for outcomes before the next `feed`, in seconds; None: no limit."""
        if self._reader is None and not self._is_full:
            return 0.0
        most = CLOSED_CHECK_SECONDS if self._reader is not None and not self._is_read else None
        if self._deadline_at is None:
            return most
        remaining = max(0.0, self._deadline_at - time.monotonic())
        return remaining if most is None else min(remaining, most)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has come."""
        return self._deadline_at is not None and time.monotonic() >= self._deadline_at

    def count(self, outcomes: list[tuple[int, Outcome]]) -> list[tuple[int, Outcome]]:
        """Count outcomes that have come, and return them."""
        self._counted += len(outcomes)
        self._call.taken_size += size_of(outcomes)
        if self._call.is_paused:
            self._dispatcher.resume(self._call)
        self._room.set()
        if self._unfinished is not None:
            self._unfinished.difference_update([index for index, _ in outcomes])
        return outcomes

    def expire(self) -> Iterator[list[tuple[int, Outcome]]]:
        """End the call at its deadline. Yield an error for each unfinished item.

        For an iterator, these are the items that have been read, and one more error, since its length is unknown. A
        source that may block is not read any further.

        Raises what the source raised.
        """
        with self._reading:
            self.cancel()
            late = sorted(self._unfinished or ())

        def error(index: int, what: str = "this was finished") -> DeadlineExceeded:
            message = f"the deadline of {self._deadline:g} s came before {what}"
            return DeadlineExceeded(message, index=index, invalid=False)

        yield [(index, error(index)) for index in late]
        if self._failure is not None:
            raise self._failure
        if self._items.is_at_hand:
            while rest := [*islice(self._source, MAX_STEP_ITEMS)]:
                yield [(it.index, it if isinstance(it, ItemError) else error(it.index)) for it in rest]
        elif self._items.size is not None:
            yield [(index, error(index)) for index in range(self._read, self._items.size)]
        elif not self._is_read:
            yield [(self._read, error(self._read, "all items had been read"))]

    def cancel(self) -> None:
        """Cancel all unfinished items, including items in flight."""
        self._call.is_cancelled = True
        self._room.set()
        with suppress(Exception):
            self._dispatcher.cancel(self._call)


def outcome_lists(
    dispatcher: Dispatcher, items: ItemSource, deadline: float | None, *, finishes: bool = True
) -> Iterator[list[tuple[int, Outcome]]]:
    """Yield the outcomes of all items as they come, in lists. Nothing is sent before the first list is requested.

    If a deadline ends the reading of an iterator, the last outcome is an error that says so.

    `finishes`: see `Batch`.
    """
    incoming: queue.SimpleQueue[list[tuple[int, Outcome]]] = queue.SimpleQueue()
    batch = Batch(dispatcher, items, deadline, incoming.put, finishes=finishes)
    try:
        while batch.feed():
            try:
                outcomes = incoming.get(timeout=batch.max_wait)
            except queue.Empty:
                if batch.is_late:
                    yield from batch.expire()
                    return
                continue
            size, outcomes = size_of(outcomes), batch.count(outcomes)
            while len(outcomes) < MAX_STEP_ITEMS and size < MAX_LIST_SIZE and not incoming.empty():
                more = incoming.get()  # the caller is slow: fewer, longer lists
                size += size_of(more)
                outcomes = outcomes + batch.count(more)
            yield outcomes
    except BaseException:  # Ctrl-C, or the caller stops early: the servers need not continue
        batch.cancel()
        raise


def in_order[T](outcomes: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """Yield outcomes in the order of their indexes. Those that come early are kept until it is their turn."""
    waiting: dict[int, T] = {}
    turn = 0
    for index, outcome in outcomes:
        waiting[index] = outcome
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn += 1


async def collect_async(
    dispatcher: Dispatcher,
    items: Items,
    deadline: float | None,
    value_of: ValueOf,
    on_error: OnError,
    use_tqdm: Any = None,
) -> Results[Any]:
    """Return the same as `collect`, without blocking the event loop. Raises BatchError."""
    with _Found(items, value_of, on_error, use_tqdm) as found:
        await _find_async(dispatcher, items, deadline, found)
    return found.all()


async def _find_async(dispatcher: Dispatcher, items: Items, deadline: float | None, found: "_Found") -> None:
    """Add all outcomes to `found`."""
    loop = asyncio.get_running_loop()
    incoming: asyncio.Queue[list[tuple[int, Outcome]]] = asyncio.Queue()

    def deliver(outcomes: list[tuple[int, Outcome]]) -> None:
        with suppress(RuntimeError):  # the caller's event loop is closed
            loop.call_soon_threadsafe(incoming.put_nowait, outcomes)

    batch = Batch(dispatcher, items, deadline, deliver)
    try:
        while batch.feed():
            try:
                async with asyncio.timeout(batch.max_wait):
                    outcomes = await incoming.get()
            except TimeoutError:
                if batch.is_late:
                    for outcomes in batch.expire():
                        found.add(outcomes)
                    break
                continue
            found.add(batch.count(outcomes))
    except BaseException:
        batch.cancel()
        raise


def collect(
    dispatcher: Dispatcher,
    items: Items,
    deadline: float | None,
    value_of: ValueOf,
    on_error: OnError,
    use_tqdm: Any = None,
) -> Results[Any]:
    """Return the results of all items in the order of the call. `use_tqdm`: see `progress.bar`.

    Raises BatchError: some items failed, and `on_error` is "raise".
    Raises BatchInterrupted: Ctrl-C.
    """
    with _Found(items, value_of, on_error, use_tqdm) as found:
        try:
            for outcomes in outcome_lists(dispatcher, items, deadline, finishes=False):
                found.add(outcomes)
        except KeyboardInterrupt as interrupt:
            raise BatchInterrupted(found.so_far) from interrupt
    return found.all()


class _Found:
    """The outcomes of a call so far, in its order. Items without an outcome have None.

    A context manager, for the progress bar.
    """

    def __init__(self, items: Items, value_of: ValueOf, on_error: OnError, use_tqdm: Any) -> None:
        if on_error not in ("raise", "return"):
            raise ConfigError(f"expected on_error as 'raise' or 'return', got {on_error!r}")
        self.so_far: Results[Any] = Results([None] * (items.size or 0))
        self._bar = bar(items.size, use_tqdm)
        self._value_of = value_of
        self._raises = on_error == "raise"
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, outcomes: list[tuple[int, Outcome]]) -> None:
        if self._bar is not None:
            self._bar.update(len(outcomes))
        for index, outcome in outcomes:
            if index >= len(self.so_far):
                self.so_far += [None] * (index + 1 - len(self.so_far))
            if isinstance(outcome, ItemError):
                self._failed = True
                self.so_far[index] = outcome
            else:
                self.so_far.usage.add(outcome)
                self.so_far[index] = self._value_of(outcome)

    def all(self) -> Results[Any]:
        if self._failed and self._raises:
            raise BatchError(self.so_far)
        return self.so_far


def texts_of(outputs: list[ResponseOutput]) -> list[str]:
    """Return the texts of completions."""
    return [output.text for output in outputs]


def outcomes[T](
    dispatcher: Dispatcher, items: ItemSource, deadline: float | None, value_of: Callable[[list[ResponseOutput]], T]
) -> Generator[tuple[int, T | ItemError]]:
    """Yield the index and the result, or the error, of each item as they come. Nothing is sent before the first one."""
    for found in outcome_lists(dispatcher, items, deadline):
        for index, outcome in found:
            yield index, outcome if isinstance(outcome, ItemError) else value_of(outcome)


def check_deadline(deadline: float | None) -> float | None:
    """Return the deadline of a call. Raises ConfigError: it is no time above 0."""
    if deadline is not None and not (isinstance(deadline, (int, float)) and 0 < deadline < math.inf):
        raise ConfigError(f"expected a deadline in seconds above 0, or None, got {deadline!r}")
    return deadline
