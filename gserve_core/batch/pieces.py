"""What the queue records: calls, their items, the servers, and the pieces in flight on them."""

from collections.abc import Callable

from msgspec import Struct

from ..errors import ItemError
from ..messages import Params, Prompt, ResponseOutput, weight
from .prefixes import Cache, Prefix
from .waiting import Waiting

MAX_PIECE_SIZE = 4 << 20
"""Maximum size of one request, in bytes. A request with a single item may be larger."""
AHEAD = 1.25
"""Keep at least this multiple of a server's capacity in flight, so that it never runs dry."""

type Outcome = list[ResponseOutput] | ItemError


class Call:
    """The state that the items of one call share. `deliver` receives their outcomes in the order in which they come."""

    def __init__(self, deliver: Callable[[list[tuple[int, Outcome]]], object]) -> None:
        self.deliver = deliver
        self.waiting: Waiting[Item] = Waiting()
        self.is_cancelled = False
        self.ended_size = 0
        """Total size of its items that have ended, in bytes."""
        self.made_size = 0
        """Estimated memory of the outcomes that were delivered, in bytes."""
        self.taken_size = 0
        """Estimated memory of the outcomes that the caller has taken, in bytes.
        The caller's thread sets this, then calls `ItemQueue.resume`."""
        self.is_paused = False
        """Whether its items are held back because the caller takes its results too slowly."""

    @property
    def untaken(self) -> int:
        """Estimated memory of the outcomes that the caller has not taken, in bytes."""
        return self.made_size - self.taken_size


class Item(Struct, eq=False, gc=False):
    """One prompt or conversation. `size` is in bytes. `seed` is used if the sampling parameters have none.

    `returns_prompt`, `task`: see `Group`. `adapter`: see `Group.adapters`.
    `prefix`: what it shares with other items, if that is long. The queue sets it.
    """

    call: Call
    index: int
    prompt: Prompt
    params: Params | None
    seed: int | None
    size: int
    returns_prompt: bool = False
    task: str = "generate"
    losses: int = 0
    returns: int = 0
    is_over: bool = False
    adapter: str | None = None
    prefix: Prefix | None = None


class Server:
    """A server as the queue knows it. It works on `capacity` items at once."""

    def __init__(self, key: str, capacity: int, is_watched: bool, *, ends_hung: bool = True) -> None:
        self.key = key
        self.cache = Cache()
        self.is_watched = is_watched
        """Whether an owner confirms its death."""
        self.ends_hung = is_watched and ends_hung
        """Whether the owner also ends it if it hangs. If not, `ItemQueue.give_up` ends the wait for a verdict."""
        self.resize(capacity)
        self.piece_size = float(MAX_PIECE_SIZE)
        self.pieces: dict[Piece, None] = {}  # in the order in which they were sent
        self.in_flight = 0
        self.size_in_flight = 0
        self.busy_until = 0.0
        self.settled_at = 0.0
        """Time from which it works on no cancelled item any more, in seconds of the queue's clock."""
        self.is_broken = False
        self.is_given_up = False
        self.stalled_at: float | None = None
        """Time at which a piece last timed out without an event; None once an event has come.
        If a piece that began later times out too, the server hangs. That holds even if it answers other requests."""
        self.is_narrowing = False
        """Whether it works on suspects, and on nothing else. It then refuses requests of other clients."""
        self.accused: list[Item] = []
        """Items that left before the verdict on a broken connection. If the server died, each of them counts a loss."""

    def resize(self, capacity: int) -> None:
        """Let the server work on `capacity` items at once."""
        self.window = 2 * capacity
        self.min_in_flight = int(AHEAD * capacity)

    @property
    def is_retired(self) -> bool:
        """Whether it gets no more items, since it is about to end, or has ended."""
        return self.cache.is_gone

    def is_usable(self, now: float) -> bool:
        """Return whether a piece may be sent to it."""
        return not self.is_broken and self.busy_until <= now and not self.is_narrowing and not self.is_retired

    def limit(self, outstanding: int, servers: int) -> int:
        """Return the maximum number of items in flight on this server.

        `outstanding`: number of items that wait or are in flight.
        `servers`: number of servers that share them.

        A server may have its whole share if the share is at most `min_in_flight`. It gets half of a larger share if
        there are several servers, but at least `min_in_flight` items: another server may be faster. The limit never
        exceeds `window`.
        """
        share = -(-outstanding // servers)
        return min(share, self.window, max(share // min(servers, 2), self.min_in_flight))


class Piece:
    """The items of one request. `items` has None in the place of each item that has ended."""

    def __init__(self, server: Server, items: list[Item], is_narrowing: bool, begun_at: float) -> None:
        self.server: Server | None = server
        self.begun_at = begun_at
        self.sent = tuple(items)
        self.items: list[Item | None] = [*items]
        self.size = sum(item.size for item in items)
        self.request = ""
        """The id of its request. The `start` callback sets it."""
        self.is_narrowing = is_narrowing
        self.is_begun = False
        """Whether any event of it has come. A server starts suspects only when it has no other work."""
        self.verdict_by: float | None = None
        """Time until which it waits for a verdict, on the queue's clock; None unless its connection is broken."""

    @property
    def unfinished(self) -> list[Item]:
        """The items that have not ended, in order."""
        return [item for item in self.items if item is not None]


def size_of(outcomes: list[tuple[int, Outcome]]) -> int:
    """Return the estimated memory of outcomes that came together, in bytes.

    The last outcome is taken as typical of all.
    """
    outputs = outcomes[-1][1] if outcomes else None
    return len(outcomes) * weight(outputs) if isinstance(outputs, list) else 0
