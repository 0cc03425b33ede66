"""The queue of one pool: it records where every item is, and decides which server gets what next.

The queue is plain state without threads, sockets or a clock of its own. The dispatcher drives it, and so do its tests.

Every item is in exactly one place. It waits in its call, waits among the suspects, or is in flight in one piece.
`submitted == waiting + in_flight + ended` holds after every method.

A broken connection is not a loss. Its piece is held until the owner of the servers gives a verdict: the server answers
again, or it has died. Suspects are held until the verdict, other items for at most `VERDICT_SECONDS`. Only a confirmed
death counts as a loss for the items in flight.

`retries` decides what becomes of the items of a lost piece. If a server has not started a group of suspects, its death
is no loss for them: it may have been working on other items.
"""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence

from ..errors import ItemError, ItemLost, RemoteError, StallTimeout, TransportError
from ..messages import Event, Heartbeat, Result
from ..tasks import GENERATE
from . import retries
from .pieces import MAX_PIECE_SIZE, Call, Item, Outcome, Piece, Server, size_of
from .prefixes import MIN_SIZE, Prefixes
from .retries import Resend, Retry
from .waiting import spread

MAX_PIECE_ITEMS = 256
"""Maximum number of items in one request."""
MAX_SIZE_IN_FLIGHT = 64 << 20
"""Maximum size of the items in flight on one server, in bytes. A single piece may be larger."""
GROWTH = 1.1
"""Growth factor of a server's piece size limit after each accepted piece."""
VERDICT_SECONDS = 2.0
"""Maximum time that items of a broken connection wait for a verdict, in seconds. Then other servers get them."""
BUSY_SECONDS = 1.0
"""Retry delay after a server has refused a piece, in seconds. Applies if the server names no delay."""
SETTLE_SECONDS = 2.0
"""Time a server may still spend on cancelled items, in seconds. It gets no suspects during this time."""
AHEAD_BY_PREFIX = 8
"""A server that alone has the prefix of the next items may exceed its limit by this fraction of it."""
RESULTS_SIZE = 64 << 20
"""Maximum memory for the results of a call that wait for its caller, in bytes.
Above it, no more items of the call are sent. The results of its items in flight come on top."""

logger = logging.getLogger("gserve.batch")


class ItemQueue:
    """All items of a pool, and its servers.

    The queue acts through these callbacks:
    `start(piece)`: send it, then call `handle_events` for its events and finally `handle_end`.
    `stop(piece)`: abort it. Its events are ignored from then on.
    `cancel(piece, indexes)`: cancel these items of it.
    `probe(server)`: ask it until it answers, then call `handle_answer`.
    `wake(time)`: call `pump` at this time.
    `clock()`: return the time, in seconds.
    """

    def __init__(
        self,
        *,
        start: Callable[[Piece], object],
        stop: Callable[[Piece], object],
        cancel: Callable[[Piece, list[int]], object],
        probe: Callable[[Server], object],
        wake: Callable[[float], object],
        clock: Callable[[], float],
    ) -> None:
        self._start = start
        self._stop = stop
        self._cancel = cancel
        self._probe = probe
        self._wake = wake
        self._clock = clock
        self._servers: dict[str, Server] = {}
        self._expected: set[str] = set()
        self._calls: deque[Call] = deque()
        """Calls with waiting items, in the order of their turns."""
        self._paused: dict[Call, None] = {}
        self._suspects: deque[list[Item]] = deque()
        self._unresolved: deque[Piece] = deque()
        self._reserved: Server | None = None
        """The server that receives nothing until it is idle and can take the next suspects."""
        self._is_turn_of_calls = False
        """Whether waiting items come before the next suspects."""
        self._no_server = "there is no server"
        self._ending: str | None = None
        self._prefixes: Prefixes | None = Prefixes()
        self._waiting_in_calls = 0
        self.submitted = 0
        self.ended_items = 0

    # --------------------------------------------------------------------------------------------------------- reading

    @property
    def waiting(self) -> int:
        """Number of items that wait, including suspects. May be read from any thread."""
        return (
            self._waiting_in_calls + sum(map(len, self._suspects)) + sum(len(call.waiting) for call in [*self._paused])
        )

    @property
    def in_flight(self) -> int:
        """Number of items in flight, including items of broken connections."""
        return sum(server.in_flight for server in self._servers.values())

    def in_flight_at(self, key: str) -> int:
        """Return the number of items in flight on one server; 0 if it is unknown. May be called from any thread."""
        server = self._servers.get(key)
        return 0 if server is None else server.in_flight

    @property
    def servers(self) -> Iterable[Server]:
        """The servers in use."""
        return self._servers.values()

    # --------------------------------------------------------------------------------------------------------- servers

    def set_prefix_affinity(self, is_on: bool) -> None:
        """Choose whether items that share a long prefix go to the same server. It holds for items to come."""
        if is_on is (self._prefixes is None):
            self._prefixes = Prefixes() if is_on else None

    def expect(self, key: str) -> None:
        """Keep items waiting for a server that is starting, even if there is no other server."""
        self._expected.add(key)

    def expect_no_more(self, key: str) -> None:
        """Stop waiting for an expected server."""
        self._expected.discard(key)
        self.pump()

    def add(self, server: Server) -> None:
        """Add a server. There must be no other server with its key."""
        assert server.key not in self._servers
        self._expected.discard(server.key)
        self._servers[server.key] = server
        self.pump()

    def resize(self, key: str, capacity: int) -> None:
        """Let a server work on `capacity` items at once. Does nothing if it is unknown."""
        if (server := self._servers.get(key)) is not None:
            server.resize(capacity)
            self.pump()

    def remove(self, key: str, why: str, *, returns: bool, died: bool) -> None:
        """Remove a server and return its items in flight to the queue.

        `returns`: whether the items may wait for its restart. Other servers may take them before.
        `died`: whether it died while it worked. Only then do the items in flight count a loss.
        """
        (self._expected.add if returns else self._expected.discard)(key)
        self._no_server = f"no server is available: {why}"
        server = self._servers.pop(key, None)
        if server is None:
            self.pump()
            return
        self._retire(server)
        suspects: list[Item] = []
        if died:
            retries.count_death(server.accused)
        for piece in reversed([*server.pieces]):  # the oldest items return to the head of the queue
            if piece.verdict_by is None:
                self._stop(piece)
            self._is_turn_of_calls = self._is_turn_of_calls or piece.is_narrowing
            if piece.is_narrowing and not piece.is_begun:
                self._return(piece)
                continue
            items = self._detach(piece)
            if not died:
                self._wait_again(piece, [items])
                continue
            retry = retries.after_death(items, is_narrowing=piece.is_narrowing)
            suspects += retry.suspects
            self._apply(retry, why)
        if suspects:
            self._suspects.append(suspects)
        self.pump()

    def retire(self, key: str) -> None:
        """Send a server no more items. Its items in flight go on."""
        if (server := self._servers.get(key)) is not None:
            self._retire(server)
            self.pump()

    def _retire(self, server: Server) -> None:
        server.cache.is_gone = True
        if self._reserved is server:
            self._reserved = None
        for call in (*self._calls, *self._paused):
            call.waiting.release(server.cache)

    def handle_answer(self, server: Server) -> None:
        """Use a server again that answers after a broken connection."""
        server.is_broken = server.is_given_up = False
        server.accused.clear()
        for piece in reversed([piece for piece in server.pieces if piece.verdict_by is not None]):
            self._return(piece)
        self.pump()

    def give_up(self, server: Server, why: str) -> None:
        """Give up a server that does not answer and that no owner ends.

        The next submitted item makes the queue probe it again.
        """
        server.is_given_up = True
        for piece in [piece for piece in server.pieces if piece.verdict_by == math.inf]:
            self._return_without_verdict(piece)
        self._no_server = f"no server is available: {why}"
        self.pump()

    # ----------------------------------------------------------------------------------------------------------- items

    def submit(self, items: Sequence[Item]) -> None:
        """Add items of one call to the queue. The caller must call `pump` afterwards."""
        self.submitted += len(items)
        call = items[0].call
        if call.is_cancelled:
            for item in items:
                self._end(item)
            return
        if self._prefixes is not None and len(self._servers) + len(self._expected) > 1:
            for item in items:
                if item.size >= MIN_SIZE and item.task == GENERATE:
                    item.prefix = self._prefixes.find(item.prompt, item.adapter)
        if not call.is_paused:
            if not call.waiting:
                self._calls.append(call)
            self._waiting_in_calls += len(items)
        call.waiting.extend(items)
        for server in self._servers.values():
            if server.is_given_up:
                server.is_given_up = False
                self._probe(server)

    def cancel(self, call: Call, indexes: Collection[int] | None = None) -> None:
        """End items of a call without outcomes, including items in flight.

        `indexes`: the items; None: all, also those that are submitted later.
        """
        if indexes is None:
            call.is_cancelled = True
            self._unpause(call)

        def is_cancelled(item: Item) -> bool:
            return item.call is call and (indexes is None or item.index in indexes)

        self._cancel_waiting(call, is_cancelled)
        for group in self._suspects:
            for item in group:
                if is_cancelled(item):
                    self._end(item)
        rests = [[item for item in group if not is_cancelled(item)] for group in self._suspects]
        self._suspects = deque(rest for rest in rests if rest)
        for server in self._servers.values():
            for piece in [*server.pieces]:
                theirs = {index: item for index, item in enumerate(piece.items) if item and is_cancelled(item)}
                for index in theirs:
                    piece.items[index] = None
                self._finish(server, [*theirs.values()])
                if theirs:
                    server.settled_at = self._clock() + SETTLE_SECONDS
                    self._wake(server.settled_at)
                if theirs and not piece.unfinished:
                    if piece.verdict_by is None:
                        self._stop(piece)
                    self._detach(piece)
                elif theirs and piece.verdict_by is None:
                    self._cancel(piece, [*theirs])
        self.pump()

    def _cancel_waiting(self, call: Call, is_cancelled: Callable[[Item], bool]) -> None:
        ended = [item for item in call.waiting if is_cancelled(item)]
        if not ended:
            return
        for item in ended:
            self._end(item)
        rest = [item for item in call.waiting if not item.is_over]
        call.waiting.clear()
        call.waiting.extend(rest)
        if not call.is_paused:
            self._waiting_in_calls -= len(ended)
            if not rest:
                self._calls.remove(call)

    @property
    def ending(self) -> str | None:
        """Why waiting items are lost, and no more are accepted; None: they are. May be read from any thread."""
        return self._no_server if self._ending is None and self._has_no_servers() else self._ending

    def drain(self, why: str) -> None:
        """Send no more items. Items in flight go on; all others are lost because of `why`."""
        self._ending = why
        self.pump()

    def close(self, why: str) -> None:
        """End every item with the error `why`."""
        self._ending = why
        for server in self._servers.values():
            for piece in [*server.pieces]:
                if piece.verdict_by is None:
                    self._stop(piece)
                self._lose(self._detach(piece), why)
        self._servers.clear()
        self.pump()

    # ---------------------------------------------------------------------------------------------------------- pieces

    def handle_events(self, piece: Piece, events: Sequence[Event]) -> None:
        """Deliver the outcomes among the events of a piece. Ignores duplicate and late events."""
        server = piece.server
        if server is None:
            return
        piece.is_begun = True
        server.stalled_at = None
        outcomes: defaultdict[Call, list[tuple[int, Outcome]]] = defaultdict(list)
        items = piece.items
        count = len(items)
        finished: list[Item] = []
        for event in events:
            if isinstance(event, Heartbeat):
                continue
            index = event.index
            item = items[index] if 0 <= index < count else None
            if item is None:
                continue
            items[index] = None
            finished.append(item)
            if isinstance(event, Result):
                outcomes[item.call].append((item.index, event.outputs))
            else:
                kind = ItemLost if event.lost else ItemError
                error = kind(event.message, index=item.index, invalid=event.invalid)
                outcomes[item.call].append((item.index, error))
        self._finish(server, finished)
        for call, batch in outcomes.items():
            call.made_size += size_of(batch)
            if call.untaken > RESULTS_SIZE:
                self._pause(call)  # before delivery: the caller checks `is_paused` once it has taken these
            call.deliver(batch)
        is_complete = len(finished) == count  # if so, `handle_end` follows at once
        if finished and not is_complete and (self._waiting_in_calls or self._suspects):
            self.pump()

    def handle_end(self, piece: Piece, error: Exception | None) -> None:
        """Handle the end of a piece: no more events of it will come.

        `error`: the reason it broke off; None if its response ended normally.
        """
        server = piece.server
        if server is None:
            return
        self._is_turn_of_calls = self._is_turn_of_calls or piece.is_narrowing
        items = piece.unfinished
        if not items:
            self._detach(piece)
            server.piece_size = min(MAX_PIECE_SIZE, server.piece_size * GROWTH)
        else:
            error = error or TransportError("the response of the server lacks some items")
            match retries.after_error(error, count=len(piece.sent), is_watched=server.is_watched):
                case Resend.SMALLER:
                    server.piece_size = max(1, min(server.piece_size, piece.size) / 2)
                    self._wait_again(piece, retries.split(self._detach(piece), 2))
                case Resend.LATER:
                    retry_after = error.retry_after if isinstance(error, RemoteError) else None
                    server.busy_until = self._clock() + (retry_after or BUSY_SECONDS)
                    self._wake(server.busy_until)
                    self._wait_again(piece, [self._detach(piece)])
                case Resend.AFTER_VERDICT:
                    self._await_verdict(piece, server, error)
                case ItemLost() as failure:
                    self._lose(self._detach(piece), str(failure))
                case ItemError() as failure:
                    self._fail(piece, str(failure), invalid=failure.invalid)
        self.pump()

    def _await_verdict(self, piece: Piece, server: Server, error: Exception) -> None:
        """Hold the items of a broken connection until the verdict on its server."""
        if not server.is_broken:
            server.is_broken = True
            logger.debug("the connection to %s broke: %s", server.key, error)
            self._no_server = f"no server is available: {error}"
            if isinstance(error, StallTimeout) and not server.ends_hung:
                before, server.stalled_at = server.stalled_at, self._clock()
                server.is_given_up = before is not None and piece.begun_at >= before
            if not server.is_given_up:  # after a first stall, ask: this process itself may have been suspended
                self._probe(server)
        if server.is_watched and piece.is_narrowing and not server.is_given_up:
            piece.verdict_by = math.inf
        elif server.is_watched:
            piece.verdict_by = self._clock() + VERDICT_SECONDS
            self._unresolved.append(piece)
            self._wake(piece.verdict_by)
        else:
            self._return(piece)

    def _return_overdue(self) -> None:
        """Return held items to the queue if the verdict takes too long."""
        now = self._clock()
        while self._unresolved and (
            self._unresolved[0].server is None or (self._unresolved[0].verdict_by or 0.0) <= now
        ):
            piece = self._unresolved.popleft()
            self._return_without_verdict(piece)

    def _return_without_verdict(self, piece: Piece) -> None:
        if piece.server is not None:
            piece.server.accused += piece.unfinished
            self._return(piece)

    def _return(self, piece: Piece) -> None:
        """Return the items of a broken connection to the queue without a loss: no death of the server is known."""
        self._apply(retries.after_break(self._detach(piece), is_narrowing=piece.is_narrowing))

    def _apply(self, retry: Retry, why: str = "") -> None:
        """Send items again and lose others. The caller adds the new suspects."""
        self._lose(retry.lost, f"{retry.why}: {why}" if why else retry.why)
        self._put_back(retry.again)
        self._suspects.extendleft(reversed([group for group in retry.groups if group]))

    def _wait_again(self, piece: Piece, groups: list[list[Item]]) -> None:
        """Return the items of a detached piece to the queue. Suspects keep these groups."""
        for group in reversed(groups):
            if not piece.is_narrowing:
                self._put_back(group)
            elif group:
                self._suspects.appendleft(group)

    def _put_back(self, items: list[Item]) -> None:
        """Return items to the head of the queues of their calls."""
        for item in reversed(items):
            call = item.call
            if not call.is_paused:
                if not call.waiting:
                    self._calls.appendleft(call)
                self._waiting_in_calls += 1
            call.waiting.appendleft(item)

    def _detach(self, piece: Piece) -> list[Item]:
        """Remove a piece from its server and return its unfinished items. Later events of the piece are ignored."""
        server, items = piece.server, piece.unfinished
        assert server is not None
        piece.server = None
        del server.pieces[piece]
        server.is_narrowing = server.is_narrowing and not piece.is_narrowing
        server.in_flight -= len(items)
        server.size_in_flight -= sum(item.size for item in items)
        return items

    def _finish(self, server: Server, items: list[Item]) -> None:
        """Mark items as ended that have left their piece."""
        total = 0
        for item in items:
            size = item.size
            total += size
            item.call.ended_size += size
            item.is_over = True
        server.size_in_flight -= total
        server.in_flight -= len(items)
        self.ended_items += len(items)

    def _fail(self, piece: Piece, message: str, *, invalid: bool) -> None:
        for item in self._detach(piece):
            self._end(item)
            item.call.deliver([(item.index, ItemError(message, index=item.index, invalid=invalid))])

    def _lose(self, items: Iterable[Item], message: str) -> None:
        for item in items:
            self._end(item)
            item.call.deliver([(item.index, ItemLost(message, index=item.index, invalid=False))])

    def _end(self, item: Item) -> None:
        item.is_over = True
        item.call.ended_size += item.size
        self.ended_items += 1

    # ---------------------------------------------------------------------------------------------------- sending items

    def resume(self, call: Call) -> None:
        """Send items of a paused call again if its caller has taken enough results."""
        if call.untaken <= RESULTS_SIZE // 2:
            self._unpause(call)
            self.pump()

    def _pause(self, call: Call) -> None:
        if not call.is_paused:
            call.is_paused = True
            self._paused[call] = None
            if call.waiting:
                self._calls.remove(call)
                self._waiting_in_calls -= len(call.waiting)

    def _unpause(self, call: Call) -> None:
        if call.is_paused:
            call.is_paused = False
            del self._paused[call]
            if call.waiting:
                self._calls.append(call)
                self._waiting_in_calls += len(call.waiting)

    def pump(self) -> None:
        """Send every server as many items as it should have now."""
        if self._unresolved:
            self._return_overdue()
        if not self._waiting_in_calls and not self._suspects and not self._paused:
            self._reserved = None
            return
        if (ending := self.ending) is not None:
            self._lose_all(ending)
            return
        now = self._clock()
        usable = [server for server in self._servers.values() if server.is_usable(now)]
        self._start_suspects(usable)
        if self._waiting_in_calls:
            self._send_waiting(
                [server for server in usable if server is not self._reserved and not server.is_narrowing]
            )

    def _has_no_servers(self) -> bool:
        """Return whether every server is gone or given up, and none is expected."""
        return not self._expected and all(server.is_given_up for server in [*self._servers.values()])

    def _start_suspects(self, usable: list[Server]) -> None:
        """Start groups of suspects on idle servers. If none is idle, reserve one, in turn with the calls."""
        must_wait = self._waiting_in_calls and (self._is_turn_of_calls or any(it.is_narrowing for it in self.servers))
        if not self._suspects or must_wait or not usable:
            self._reserved = None
            return
        if self._reserved not in usable:
            self._reserved = min(usable, key=lambda server: server.in_flight)
        now = self._clock()
        for server in usable:
            is_free = not server.in_flight and server.settled_at <= now
            if self._suspects and is_free and (server is self._reserved or not self._waiting_in_calls):
                self._send_piece(server, self._suspects.popleft(), is_narrowing=True)
                if server is self._reserved:
                    self._reserved = None
        if not self._suspects:
            self._reserved = None

    def _send_waiting(self, usable: list[Server]) -> None:
        """Send waiting items to the servers with the least work, in pieces that are worth a request."""
        while self._waiting_in_calls and usable:
            server = min(usable, key=lambda it: it.in_flight / it.window)
            outstanding = self._waiting_in_calls + sum(it.in_flight for it in usable)
            limit = server.limit(outstanding, len(usable))
            room = limit - server.in_flight
            if room < min(self._waiting_in_calls, max(1, limit // 4)):
                return
            size = min(server.piece_size, MAX_SIZE_IN_FLIGHT - server.size_in_flight)
            if size <= 0 and server.in_flight:
                usable = [it for it in usable if it is not server]
                continue
            home = self._home_of_next(server, usable, outstanding)
            if home is None:
                items = self._take_items(server, min(room, MAX_PIECE_ITEMS), size)
            else:
                server, count, size = home
                items = self._take_items(server, min(count, MAX_PIECE_ITEMS), size, calls=1)
            self._is_turn_of_calls = False
            if items:
                self._send_piece(server, spread(items), is_narrowing=False)

    def _home_of_next(self, server: Server, usable: list[Server], outstanding: int) -> tuple[Server, int, float] | None:
        """Return the server that should get the next items in place of `server`, since it alone has their prefix.

        It comes with the maximum number of items and bytes that it may get; None: `server` should get them.
        """
        if (foreign := self._calls[0].waiting.foreign(server.cache)) is None:
            return None
        cache, count = foreign
        home = next((it for it in usable if it.cache is cache), None)
        if home is None:
            return None
        limit = home.limit(outstanding, len(usable))
        room = min(limit + limit // AHEAD_BY_PREFIX, home.window) - home.in_flight
        size = min(home.piece_size, MAX_SIZE_IN_FLIGHT - home.size_in_flight)
        return (home, min(room, count), size) if room > 0 and size > 0 else None

    def _take_items(self, server: Server, count: int, most: float, calls: int | None = None) -> list[Item]:
        """Take up to `count` items and `most` bytes for a server from the calls in turn, but at least one item.

        `calls`: the number of calls that may give some; None: all.
        """
        taken: list[Item] = []
        while self._calls and len(taken) < count and most >= 0 and calls != 0:
            calls = calls and calls - 1
            call = self._calls[0]
            waiting = call.waiting
            share = min(len(waiting), -(-(count - len(taken)) // (1 if calls == 0 else len(self._calls))))
            most = waiting.take(server.cache, share, most, taken)
            self._calls.rotate(-1)  # the next piece begins with another call
            if not waiting:
                self._calls.pop()
        self._waiting_in_calls -= len(taken)
        accused = [*filter(retries.is_suspect, taken)]
        if accused:  # a verdict while they waited made them suspects
            self._suspects.append(accused)
            self._wake(self._clock())
            return [item for item in taken if not retries.is_suspect(item)]
        return taken

    def _send_piece(self, server: Server, items: list[Item], *, is_narrowing: bool) -> None:
        piece = Piece(server, items, is_narrowing, self._clock())
        server.pieces[piece] = None
        server.is_narrowing = is_narrowing
        server.in_flight += len(items)
        server.size_in_flight += piece.size
        self._start(piece)

    def _lose_all(self, message: str) -> None:
        """End every waiting item with the error `message`."""
        for call in [*self._paused]:
            self._unpause(call)
        calls, self._calls = self._calls, deque()
        groups, self._suspects = self._suspects, deque()
        self._waiting_in_calls = 0
        for call in calls:
            items = [*call.waiting]
            call.waiting.clear()
            self._lose(items, message)
        for group in groups:
            self._lose(group, message)
