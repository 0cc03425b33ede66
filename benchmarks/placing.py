"""Placing: how often servers compute the same document, by the queue alone: `python -m benchmarks.placing`.

The servers are made up, and so is the time. A server reads one item after the other. An item of a document that it has
not read before takes `DOCUMENT`, any other `QUESTION`. `ANSWER` later the item is done. The table takes seconds.
"""

import functools
import heapq
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gserve_core.batch.item_queue import ItemQueue
from gserve_core.batch.pieces import Call, Item, Piece, Server
from gserve_core.messages import Result

DOCUMENT, QUESTION, ANSWER = 1.3, 0.35, 5.0
"""Times, in no unit: for the first question to a document on a server, for another one, and from then to its answer."""
DOCUMENTS, QUESTIONS = 64, 16


@dataclass(frozen=True)
class Case:
    """How the questions come, and to which servers.

    `speeds`: that of each server.
    `capacity`: number of items that a server works on at once.
    `at_once`: number of items that come at the same time.
    `every`: the time until the next ones come.
    """

    title: str
    speeds: Sequence[float]
    capacity: int
    at_once: int = DOCUMENTS * QUESTIONS
    every: float = 0.001


CASES = (
    Case("all in one list", [1, 1], 1024),
    Case("all in one list", [1, 1], 256),
    Case("60 at a time", [1, 1], 256, 60),
    Case("60 at a time", [1] * 8, 64, 60),
    Case("60 at a time, speeds 1 and 4", [1, 4], 256, 60),
    Case("all in one list, speeds 1 and 4", [1, 4], 256),
    Case("8 at a time, slowly", [1, 1], 64, 8, 2.0),
)


@dataclass
class _Simulated:
    """A server. `read`: its documents. `reads`: whether it reads an item now."""

    speed: float
    waiting: deque[tuple[Piece, int]] = field(default_factory=deque)
    read: set[int] = field(default_factory=set)
    running: int = 0
    reads: bool = False


class _World:
    """The queue of one pool with made-up servers, and the questions of one call."""

    def __init__(self, case: Case, *, is_on: bool) -> None:
        self._case = case
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._queue = ItemQueue(
            start=self._start, stop=lambda piece: None, cancel=lambda piece, indexes: None, probe=lambda server: None,
            wake=lambda time: self._at(time, self._queue.pump), clock=lambda: self._now,
        )  # fmt: skip
        self._queue.set_prefix_affinity(is_on)
        self._servers = {f"server-{number}": _Simulated(speed) for number, speed in enumerate(case.speeds)}
        for name in self._servers:
            self._queue.add(Server(name, case.capacity, is_watched=True))
        self._documents = [number for number in range(DOCUMENTS) for _ in range(QUESTIONS)]
        random.Random(0).shuffle(self._documents)

    def run(self) -> tuple[int, float]:
        """Return how often a server read a document that it had not read before, and the time of the whole."""
        call = Call(lambda outcomes: None)
        items = [
            Item(call, place, f"{document} {'text ' * 1000}question {place}?", None, None, 5000)
            for place, document in enumerate(self._documents)
        ]
        for number, some in enumerate(itertools.batched(items, self._case.at_once)):
            self._at(number * self._case.every, functools.partial(self._submit, some))
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
        assert self._queue.ended_items == len(items)
        return sum(len(server.read) for server in self._servers.values()), self._now

    def _at(self, time: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _submit(self, items: Sequence[Item]) -> None:
        self._queue.submit(items)
        self._queue.pump()

    def _start(self, piece: Piece) -> None:
        assert piece.server is not None
        server = self._servers[piece.server.key]
        server.waiting.extend((piece, place) for place in range(len(piece.sent)))
        self._at(self._now, lambda: self._read(server))

    def _read(self, server: _Simulated) -> None:
        """Have a server read its next item, if it has one and a place for it."""
        if server.reads or not server.waiting or server.running >= self._case.capacity:
            return
        piece, place = server.waiting.popleft()
        document = self._documents[piece.sent[place].index]
        seconds = QUESTION if document in server.read else DOCUMENT
        server.read.add(document)
        server.running += 1
        server.reads = True

        def answer() -> None:
            server.reads = False
            self._at(self._now + ANSWER / server.speed, lambda: self._finish(server, piece, place))
            self._read(server)

        self._at(self._now + seconds / server.speed, answer)

    def _finish(self, server: _Simulated, piece: Piece, place: int) -> None:
        server.running -= 1
        self._queue.handle_events(piece, [Result(place, [])])
        if piece.server is not None and not piece.unfinished:
            self._queue.handle_end(piece, None)
        self._read(server)


def main() -> int:
    """Print the table."""
    print(
        "| how the questions come | servers, items at once on each | read, no affinity | read | time, of no affinity |"
    )
    print("|---|---|---|---|---|")
    for case in CASES:
        read, time = _World(case, is_on=True).run()
        without, time_without = _World(case, is_on=False).run()
        print(
            f"| {case.title} | {len(case.speeds)}, {case.capacity:,} | {without} | {read} | {time / time_without:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
