"""The queue of one pool: where every item is, and which server gets what next.

This is plain state without threads, sockets or a clock of its own. The dispatcher drives it, and so do its tests.

Every item is in exactly one place: it waits in its call, it waits among the suspects, or it is in flight in one piece.
`submitted == waiting + in_flight + ended` holds after every method.

A broken connection is no loss. Its piece is held until the owner of the servers gives a verdict: the server answers
again, or it has died. Suspects are held as long as that takes, other items for `HOLD_SECONDS`. Only a confirmed death
is a loss of the items that were in flight. Items with `MAX_LOSSES` losses are suspects. They run on a server of their
own: first together, then, after another death, in ever smaller groups. An item that is alone on its server when that
dies is lost. Of suspects that the server has not begun by then nothing is said: others may have been at work there.
"""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from ..errors import ItemError, ItemLost, RemoteError, StallTimeout, TransportError
from ..schema import Event, Heartbeat, Params, Prompt, ResponseOutput, Result, weight

MAX_PIECE_ITEMS = 256
"""Maximum number of items in one request."""
MAX_PIECE_SIZE = 4 << 20
"""Maximum size of one request, in bytes, unless it holds a single item."""
MAX_SIZE_IN_FLIGHT = 64 << 20
"""Maximum size of the items in flight on one server, in bytes, unless it is a single piece."""
GROWTH = 1.1
"""Factor by which the size limit of a server's pieces recovers with each piece that it accepts."""
MAX_LOSSES = 2
"""Number of deaths after which the items in flight are suspects."""
WAYS = 16
"""Number of groups that a group of suspects is split into when its server dies; one of up to twice as many items is
split into single items."""
MAX_RETURNS = 100
"""Number of times that the connection of an item may break, on servers that live, before the item is lost."""
HOLD_SECONDS = 2.0
"""How long the items of a broken connection wait for a verdict on their server, in seconds, before others get them."""
BUSY_SECONDS = 1.0
"""Seconds until a server that refused a piece is tried again, where it does not say when."""
SETTLE_SECONDS = 2.0
"""How long a server that was told to drop items may still work on them, in seconds. No suspects are begun meanwhile."""
RESULTS_SIZE = 64 << 20
"""Maximum size of the results of a call that wait for its caller, in bytes of memory: beyond it, no more of its items
are sent. The results of items in flight come on top."""
AHEAD = 1.25
"""Keep at least this multiple of a server's capacity in flight, so that it never runs dry."""

logger = logging.getLogger("gserve.batch")

type Outcome = list[ResponseOutput] | ItemError


class Call:
    """What the items of one call share. `deliver` receives their outcomes, in the order in which they come."""

    def __init__(self, deliver: Callable[[list[tuple[int, Outcome]]], object]) -> None:
        self.deliver = deliver
        self.waiting: deque[Item] = deque()
        self.is_cancelled = False
        self.ended_size = 0
        """Size of its items that have ended, in bytes."""
        self.made_size = 0
        """About how much memory the outcomes take that were delivered, in bytes."""
        self.taken_size = 0
        """The same of those that the caller has taken. Its own thread sets this, and calls `ItemQueue.resume` then."""
        self.is_paused = False
        """Whether nothing of it is sent, since the caller takes too little."""

    @property
    def untaken(self) -> int:
        """About how much memory the outcomes take that the caller has not taken, in bytes."""
        return self.made_size - self.taken_size


class Item(Struct, eq=False, gc=False):
    """One prompt or conversation. `size` is in bytes; `seed` is used where its parameters name none."""

    call: Call
    index: int
    prompt: Prompt
    params: Params | None
    seed: int | None
    size: int
    losses: int = 0
    returns: int = 0
    is_over: bool = False


class Server:
    """A server, as the queue sees it: it works on `capacity` items at once."""

    def __init__(self, key: str, capacity: int, is_watched: bool, *, ends_hung: bool = True) -> None:
        self.key = key
        self.is_watched = is_watched
        """Whether an owner confirms its death."""
        self.ends_hung = is_watched and ends_hung
        """Whether the owner ends it too where it hangs. Else, `ItemQueue.lose_sight` ends what only it could do."""
        self.window = 2 * capacity
        self.least = int(AHEAD * capacity)
        self.piece_size = float(MAX_PIECE_SIZE)
        self.pieces: dict[Piece, None] = {}  # in the order in which they were sent
        self.in_flight = 0
        self.size_in_flight = 0
        self.busy_until = 0.0
        self.settled_at = 0.0
        """When it works on nothing any more of what it was told to drop."""
        self.is_broken = False
        self.is_out_of_sight = False
        self.stalled_at: float | None = None
        """When a piece last ended without a sign of life, unless one has come since. A piece that was begun after that,
        and gives none either, means that the server hangs, whatever else it answers."""
        self.is_narrowing = False
        """Whether it works on suspects, and on nothing else: it refuses what other clients send meanwhile."""
        self.accused: list[Item] = []
        """Items that left before the verdict on a broken connection: a loss of theirs if the server has died."""

    def is_usable(self, now: float) -> bool:
        """Return whether it may be sent a piece."""
        return not self.is_broken and self.busy_until <= now and not self.is_narrowing

    def limit(self, outstanding: int, servers: int) -> int:
        """Return the maximum number of items in flight here, given all items and the number of servers.

        A share that the server can work on at once is sent whole. Of a larger share it gets no more than half ahead:
        another server may turn out to be faster.
        """
        share = -(-outstanding // servers)
        return min(share, self.window, max(share // min(servers, 2), self.least))


class Piece:
    """Items that travel in one request. `items` has None in the place of one that has ended."""

    def __init__(self, server: Server, items: list[Item], is_narrowing: bool, begun_at: float) -> None:
        self.server: Server | None = server
        self.begun_at = begun_at
        self.sent = tuple(items)
        self.items: list[Item | None] = [*items]
        self.size = sum(item.size for item in items)
        self.request = ""
        """The id of its request, which `start` sets."""
        self.is_narrowing = is_narrowing
        self.is_begun = False
        """Whether the server has said anything of it: suspects it begins when it has nothing else."""
        self.held_until: float | None = None
        """Set while its connection is broken and the verdict is open."""

    @property
    def left(self) -> list[Item]:
        """The items that have not ended, in order."""
        return [item for item in self.items if item is not None]


class ItemQueue:
    """All items of a pool, and its servers.

    start(piece): send it, then call `happened` and at last `ended`. stop(piece): abort it; nothing of it is wanted.
    cancel(piece, indexes): these items of it are not wanted. probe(server): ask it until it answers, then call
    `answered`. wake(time): call `pump` then. clock() returns the time in seconds.
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
        self._held: deque[Piece] = deque()
        self._reserved: Server | None = None
        """The server that receives nothing, until it is idle and can take the next suspects."""
        self._is_turn_of_calls = False
        """Whether waiting items come before the next suspects."""
        self._no_server = "there is no server"
        self._ending: str | None = None
        self._waiting_in_calls = 0
        self.submitted = 0
        self.ended_items = 0

    # --------------------------------------------------------------------------------------------------------- looking

    @property
    def waiting(self) -> int:
        """Number of items that wait, suspects included."""
        return self._waiting_in_calls + sum(map(len, self._suspects)) + sum(len(call.waiting) for call in self._paused)

    @property
    def in_flight(self) -> int:
        """Number of items in flight, those of broken connections included."""
        return sum(server.in_flight for server in self._servers.values())

    @property
    def servers(self) -> Iterable[Server]:
        """The servers that take part."""
        return self._servers.values()

    # --------------------------------------------------------------------------------------------------------- servers

    def expect(self, key: str) -> None:
        """Keep items waiting, where there is no server, for one that is starting."""
        self._expected.add(key)

    def expect_no_more(self, key: str) -> None:
        """Do not wait for what was expected."""
        self._expected.discard(key)
        self.pump()

    def add(self, server: Server) -> None:
        """Add a server, of whose key there must be none."""
        assert server.key not in self._servers
        self._expected.discard(server.key)
        self._servers[server.key] = server
        self.pump()

    def remove(self, key: str, why: str, *, returns: bool, died: bool) -> None:
        """Remove a server; what it had in flight waits again, for the others or for its restart where it `returns`.

        died: whether it has died while it worked. Only then is it a loss of the items in flight.
        """
        (self._expected.add if returns else self._expected.discard)(key)
        self._no_server = f"no server is left: {why}"
        server = self._servers.pop(key, None)
        if server is None:
            self.pump()
            return
        if self._reserved is server:
            self._reserved = None
        suspects: list[Item] = []
        for item in server.accused if died else ():
            item.losses += not item.is_over
        for piece in reversed([*server.pieces]):  # the oldest items come to the head of the queue
            if piece.held_until is None:
                self._stop(piece)
            self._is_turn_of_calls = self._is_turn_of_calls or piece.is_narrowing
            if piece.is_narrowing and not piece.is_begun:
                self._return(piece)
                continue
            items = self._detach(piece)
            for item in items:
                item.losses += died
            if not died:
                self._wait_again(piece, [items])
            elif not piece.is_narrowing:
                suspects += [item for item in items if item.losses >= MAX_LOSSES]
                self._put_back([item for item in items if item.losses < MAX_LOSSES])
            elif len(items) > 1:
                self._suspects.extendleft(reversed(_split(items, len(items) if len(items) <= 2 * WAYS else WAYS)))
            else:
                for item in items:
                    deaths = f"a server died {item.losses} times while it worked on this, at last on nothing else"
                    self._lose([item], f"{deaths}: {why}")
        if suspects:
            self._suspects.append(suspects)
        self.pump()

    def answered(self, server: Server) -> None:
        """Use a server again: its connection was broken, and it lives."""
        server.is_broken = server.is_out_of_sight = False
        server.accused.clear()
        for piece in reversed([piece for piece in server.pieces if piece.held_until is not None]):
            self._return(piece)
        self.pump()

    def lose_sight(self, server: Server, why: str) -> None:
        """Give up a server that does not answer and that nobody ends, until the next item is submitted."""
        server.is_out_of_sight = True
        for piece in [piece for piece in server.pieces if piece.held_until == math.inf]:
            self._return_without_verdict(piece)
        self._no_server = f"no server is left: {why}"
        self.pump()

    # ----------------------------------------------------------------------------------------------------------- items

    def submit(self, items: Sequence[Item]) -> None:
        """Have items of one call wait. `pump` follows."""
        self.submitted += len(items)
        call = items[0].call
        if call.is_cancelled:
            for item in items:
                self._end(item)
            return
        if not call.is_paused:
            if not call.waiting:
                self._calls.append(call)
            self._waiting_in_calls += len(items)
        call.waiting.extend(items)
        for server in self._servers.values():
            if server.is_out_of_sight:
                server.is_out_of_sight = False
                self._probe(server)

    def cancel(self, call: Call) -> None:
        """End all items of a call without outcomes, those on servers too."""
        call.is_cancelled = True
        self._go_on(call)
        if call.waiting:
            self._calls.remove(call)
            self._waiting_in_calls -= len(call.waiting)
            for item in call.waiting:
                self._end(item)
            call.waiting.clear()
        for group in self._suspects:
            for item in group:
                if item.call is call:
                    self._end(item)
        rests = [[item for item in group if item.call is not call] for group in self._suspects]
        self._suspects = deque(rest for rest in rests if rest)
        for server in self._servers.values():
            for piece in [*server.pieces]:
                theirs = {index: item for index, item in enumerate(piece.items) if item and item.call is call}
                for index in theirs:
                    piece.items[index] = None
                self._finish(server, [*theirs.values()])
                if theirs:
                    server.settled_at = self._clock() + SETTLE_SECONDS
                    self._wake(server.settled_at)
                if theirs and not piece.left:
                    if piece.held_until is None:
                        self._stop(piece)
                    self._detach(piece)
                elif theirs and piece.held_until is None:
                    self._cancel(piece, [*theirs])
        self.pump()

    def drain(self, why: str) -> None:
        """Send nothing any more: what is in flight goes on, everything else is lost because of `why`."""
        self._ending = why
        self.pump()

    def close(self, why: str) -> None:
        """End every item, with an error."""
        self._ending = why
        for server in self._servers.values():
            for piece in [*server.pieces]:
                if piece.held_until is None:
                    self._stop(piece)
                self._lose(self._detach(piece), why)
        self._servers.clear()
        self.pump()

    # ---------------------------------------------------------------------------------------------------------- pieces

    def happened(self, piece: Piece, events: Sequence[Event]) -> None:
        """Deliver the results among the events of a piece. Ignores what comes twice, or too late."""
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
                error = ItemError(event.message, index=item.index, invalid=event.invalid)
                outcomes[item.call].append((item.index, error))
        self._finish(server, finished)
        for call, batch in outcomes.items():
            call.made_size += size_of(batch)
            if call.untaken > RESULTS_SIZE:
                self._pause(call)  # first: the caller looks at that when it has taken these
            call.deliver(batch)
        is_whole = len(finished) == count  # then the end of the piece follows at once
        if finished and not is_whole and (self._waiting_in_calls or self._suspects):
            self.pump()

    def ended(self, piece: Piece, error: Exception | None) -> None:
        """Take note that nothing more comes of a piece, and why."""
        server = piece.server
        if server is None:
            return
        self._is_turn_of_calls = self._is_turn_of_calls or piece.is_narrowing
        items = piece.left
        if not items:
            self._detach(piece)
            server.piece_size = min(MAX_PIECE_SIZE, server.piece_size * GROWTH)
        elif error is not None and not isinstance(error, TransportError):
            self._fail(piece, f"cannot be sent: {type(error).__name__}: {error}", invalid=False)
        elif isinstance(error, RemoteError) and error.status == 413 and len(piece.sent) > 1:
            server.piece_size = max(1, min(server.piece_size, piece.size) / 2)
            self._wait_again(piece, _split(self._detach(piece), 2))
        elif isinstance(error, RemoteError) and (error.status == 429 or (error.status == 503 and server.is_watched)):
            server.busy_until = self._clock() + (error.retry_after or BUSY_SECONDS)
            self._wake(server.busy_until)
            self._wait_again(piece, [self._detach(piece)])
        elif isinstance(error, RemoteError) and 400 <= error.status < 500:
            self._fail(piece, str(error), invalid=error.status in (400, 413, 422))
        else:
            self._break(piece, server, error or TransportError("the server left items out"))
        self.pump()

    def _break(self, piece: Piece, server: Server, error: Exception) -> None:
        """Hold the items of a broken connection until the verdict on its server."""
        if not server.is_broken:
            server.is_broken = True
            logger.debug("the connection to %s broke: %s", server.key, error)
            self._no_server = f"no server is left: {error}"
            if isinstance(error, StallTimeout) and not server.ends_hung:
                before, server.stalled_at = server.stalled_at, self._clock()
                server.is_out_of_sight = before is not None and piece.begun_at >= before
            if not server.is_out_of_sight:  # the first time, it may be this process that was stopped
                self._probe(server)
        if server.is_watched and piece.is_narrowing and not server.is_out_of_sight:
            piece.held_until = math.inf
        elif server.is_watched:
            piece.held_until = self._clock() + HOLD_SECONDS
            self._held.append(piece)
            self._wake(piece.held_until)
        else:
            self._return(piece)

    def _release_held(self) -> None:
        """Give the items to others where the verdict takes too long."""
        now = self._clock()
        while self._held and (self._held[0].server is None or (self._held[0].held_until or 0.0) <= now):
            piece = self._held.popleft()
            self._return_without_verdict(piece)

    def _return_without_verdict(self, piece: Piece) -> None:
        if piece.server is not None:
            piece.server.accused += piece.left
            self._return(piece)

    def _return(self, piece: Piece) -> None:
        """Have the items of a broken connection wait again, though no death of their server is known."""
        items = self._detach(piece)
        for item in items:
            item.returns += 1
        self._lose(
            [item for item in items if item.returns >= MAX_RETURNS],
            f"the connection broke {MAX_RETURNS} times while a server worked on this",
        )
        self._wait_again(piece, [[item for item in items if not item.is_over]])

    def _wait_again(self, piece: Piece, groups: list[list[Item]]) -> None:
        """Have the items of a detached piece wait again, suspects in these groups."""
        for group in reversed(groups):
            if not piece.is_narrowing:
                self._put_back(group)
            elif group:
                self._suspects.appendleft(group)

    def _put_back(self, items: list[Item]) -> None:
        """Have items wait again, at the head of their calls."""
        for item in reversed(items):
            call = item.call
            if not call.is_paused:
                if not call.waiting:
                    self._calls.appendleft(call)
                self._waiting_in_calls += 1
            call.waiting.appendleft(item)

    def _detach(self, piece: Piece) -> list[Item]:
        """Take a piece from its server; return what is left of it. Whatever still comes of it is ignored."""
        server, items = piece.server, piece.left
        assert server is not None
        piece.server = None
        del server.pieces[piece]
        server.is_narrowing = server.is_narrowing and not piece.is_narrowing
        server.in_flight -= len(items)
        server.size_in_flight -= sum(item.size for item in items)
        return items

    def _finish(self, server: Server, items: list[Item]) -> None:
        """End items that have left their piece."""
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

    # ---------------------------------------------------------------------------------------------------- who gets what

    def resume(self, call: Call) -> None:
        """Send items of a call again, where its caller has taken enough of what was delivered."""
        if call.untaken <= RESULTS_SIZE // 2:
            self._go_on(call)
            self.pump()

    def _pause(self, call: Call) -> None:
        if not call.is_paused:
            call.is_paused = True
            self._paused[call] = None
            if call.waiting:
                self._calls.remove(call)
                self._waiting_in_calls -= len(call.waiting)

    def _go_on(self, call: Call) -> None:
        if call.is_paused:
            call.is_paused = False
            del self._paused[call]
            if call.waiting:
                self._calls.append(call)
                self._waiting_in_calls += len(call.waiting)

    def pump(self) -> None:
        """Give every server as many items as it should have now."""
        if self._held:
            self._release_held()
        if not self._waiting_in_calls and not self._suspects and not self._paused:
            self._reserved = None
            return
        if self._ending is not None or self._is_deserted():
            self._lose_all(self._no_server if self._ending is None else self._ending)
            return
        now = self._clock()
        usable = [server for server in self._servers.values() if server.is_usable(now)]
        self._narrow_down(usable)
        if self._waiting_in_calls:
            self._share_out([server for server in usable if server is not self._reserved and not server.is_narrowing])

    def _is_deserted(self) -> bool:
        """Return whether there is no server, and none will come."""
        return not self._expected and all(server.is_out_of_sight for server in self._servers.values())

    def _narrow_down(self, usable: list[Server]) -> None:
        """Start groups of suspects on idle servers. Where none is idle, reserve one, in turn with the calls."""
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
                self._begin(server, self._suspects.popleft(), is_narrowing=True)
                if server is self._reserved:
                    self._reserved = None
        if not self._suspects:
            self._reserved = None

    def _share_out(self, usable: list[Server]) -> None:
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
            items = self._take(min(room, MAX_PIECE_ITEMS), size)
            self._is_turn_of_calls = False
            if items:
                self._begin(server, items, is_narrowing=False)

    def _take(self, count: int, most: float) -> list[Item]:
        """Take up to `count` items and `most` bytes, at least one item, from the calls in turn."""
        taken: list[Item] = []
        size = 0
        while self._calls and len(taken) < count:
            call = self._calls[0]
            waiting = call.waiting
            share = min(len(waiting), -(-(count - len(taken)) // len(self._calls)))
            for _ in range(share):
                item = waiting.popleft()
                size += item.size
                if size > most and taken:
                    waiting.appendleft(item)
                    count = 0
                    break
                taken.append(item)
            self._calls.rotate(-1)  # the next piece begins with another call
            if not waiting:
                self._calls.pop()
        self._waiting_in_calls -= len(taken)
        accused = [item for item in taken if item.losses >= MAX_LOSSES]
        if accused:  # the verdict came while they waited
            self._suspects.append(accused)
            self._wake(self._clock())
            return [item for item in taken if item.losses < MAX_LOSSES]
        return taken

    def _begin(self, server: Server, items: list[Item], *, is_narrowing: bool) -> None:
        piece = Piece(server, items, is_narrowing, self._clock())
        server.pieces[piece] = None
        server.is_narrowing = is_narrowing
        server.in_flight += len(items)
        server.size_in_flight += piece.size
        self._start(piece)

    def _lose_all(self, message: str) -> None:
        """End everything that waits."""
        for call in [*self._paused]:
            self._go_on(call)
        calls, self._calls = self._calls, deque()
        groups, self._suspects = self._suspects, deque()
        self._waiting_in_calls = 0
        for call in calls:
            items = [*call.waiting]
            call.waiting.clear()
            self._lose(items, message)
        for group in groups:
            self._lose(group, message)


def size_of(outcomes: list[tuple[int, Outcome]]) -> int:
    """Return about how much memory outcomes take that came together, in bytes: the last one stands for all."""
    outputs = outcomes[-1][1] if outcomes else None
    return len(outcomes) * weight(outputs) if isinstance(outputs, list) else 0


def _split(items: list[Item], parts: int) -> list[list[Item]]:
    """Split suspects into groups of about the same number of items."""
    size = -(-len(items) // parts)
    return [items[start : start + size] for start in range(0, len(items), size)]
