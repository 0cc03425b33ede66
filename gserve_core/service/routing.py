"""The choice of a server for each request that comes to a gateway.

A request goes to the ready server with the fewest requests and items in flight. If its body begins like that of an
earlier one, it goes to the server of that one, unless this has more work than others. It is sent again while its answer
has not begun: after the death of its server, and after a refusal. `Routing` follows the states that the supervisor
publishes.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import itemgetter

from ..batch.prefixes import Cache, Prefix, Prefixes
from ..errors import RemoteError
from ..interfaces import Backend
from .state import ONLY, ServerState, State

MAX_DEATHS = 3
"""Number of servers that may die while they work on a request. Then it is not sent again."""
AHEAD_BY_PREFIX = 4
"""A server that has the prefix of a request may have more work than the least busy one by this fraction of it."""
SERVERS_PER_PREFIX = 4
"""Of so many servers, one is remembered as having a prefix. The older ones may have dropped it from their caches."""
RETRY_SECONDS = 1.0
"""Retry delay for a client that found no ready server, in seconds."""


class Routing:
    """The ready servers, as a gateway sees them. All methods run in one event loop.

    `queue_timeout`: maximum time that a request waits for a server, in seconds; None: no limit.
    `items`: returns the number of items of the service's own calls that a server works on.
    """

    def __init__(self, queue_timeout: float | None, items: Callable[[str], int] = lambda name: 0) -> None:
        self._queue_timeout = queue_timeout
        self._items = items
        self._states: dict[str, ServerState] = {}
        self._backends: dict[str, Backend] = {}
        """The servers that may have requests in flight, by name."""
        self._caches: dict[str, Cache] = {}
        """The prefix caches of these servers, by instance."""
        self._prefixes = Prefixes()
        self._ready: dict[str, list[Backend]] = {ONLY: []}
        """The ready servers of each pool, kept since each request needs them. `ONLY`: of all pools."""
        self._changed = asyncio.Event()
        self._turn = 0
        self.waiting_by_pool: Counter[str] = Counter()
        """Number of requests that wait for a server, by the key of the pool."""
        self.resends: dict[tuple[str, str, str], int] = {}
        """Number of requests sent again, by pool and name of the server that failed them, and "died" or "refused"."""
        self.ending = ""
        """Why no more requests are accepted."""

    def update(self, state: ServerState) -> None:
        """Take over a server's new state. If the server has ended, the requests in flight there end."""
        before = self._states.get(state.name)
        self._states[state.name] = state
        known = self._backends.get(state.name)
        if known is not None and known.instance == state.instance:
            known.is_stopping = state.state in (State.DRAINING, State.STOPPED) and not state.died
        if known is not None and (known.instance != state.instance or not state.works):
            del self._backends[state.name]
            self._caches.pop(known.instance).is_gone = True
            known.on_gone()
            known = None
        if known is None and state.usable:
            assert state.address is not None
            self._backends[state.name] = Backend(state.name, state.instance, state.address, state.token, state.pool)
            self._caches[state.instance] = Cache()
        if before is None or _choice(before) != _choice(state):
            self._notify()

    def forget(self, name: str) -> None:
        """Forget a server that has ended and does not return."""
        self._states.pop(name, None)
        self._notify()

    def set_timeout(self, queue_timeout: float | None) -> None:
        """Replace the time limit of requests that come from now on."""
        self._queue_timeout = queue_timeout

    def end(self, why: str) -> None:
        """Accept no more requests. Those in flight go on."""
        self.ending = why
        self._notify()

    def _notify(self) -> None:
        self._ready = {ONLY: []}
        for name, state in self._states.items():
            if state.usable and name in self._backends:
                for pool in {ONLY, state.pool}:
                    self._ready.setdefault(pool, []).append(self._backends[name])
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def backends(self) -> list[Backend]:
        """The ready servers."""
        return [*self._ready[ONLY]]

    @property
    def requests(self) -> dict[str, int]:
        """The number of requests in flight, by the name of the server."""
        return {name: backend.requests for name, backend in self._backends.items()}

    @property
    def status(self) -> str:
        """Return "ok" if a server is ready, "starting" if one will be, "draining", or "stopped"."""
        return "draining" if self.ending else self.status_of(ONLY)

    def status_of(self, pool: str) -> str:
        """Return "ok" if a server of a pool is ready, "starting" if one will be, or "stopped". `ONLY`: any pool."""
        if self._ready.get(pool):
            return "ok"
        return "starting" if any(state.returns for state in self.states_of(pool)) else "stopped"

    def is_stale(self, pool: str) -> bool:
        """Return whether all servers of a pool that could work have not the pushed weights. `ONLY`: of all pools."""
        states = [state for state in self.states_of(pool) if state.works or state.returns]
        return bool(states) and all(state.is_stale for state in states)

    def states_of(self, pool: str) -> list[ServerState]:
        """Return the states of the servers of a pool. `ONLY`: of all pools."""
        return [state for state in self._states.values() if pool in (ONLY, state.pool)]

    def attempts(self, pool: str = ONLY, body: bytes = b"") -> "Attempts":
        """Return the attempts of a new request to a pool. `ONLY`: to any pool.

        `body`: requests whose bodies share a long prefix go to the same server; empty: to any.
        """
        return Attempts(self, self._queue_timeout, pool, self._prefixes.find(body, pool))

    async def wait_changed(self, seconds: float, pool: str = ONLY) -> None:
        """Have a request to a pool wait until a state changes, for `seconds` at most."""
        self.waiting_by_pool[pool] += 1
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self.waiting_by_pool[pool] -= 1

    def choose(self, pool: str, without: set[str], prefix: Prefix | None = None) -> Backend | None:
        """Return the server of a pool for a request, but for the instances in `without`; None: there is none.

        It is the one with the least work. Equal ones take turns. A request counts as much as an item of the service's
        own calls. A server that has the prefix of the request is preferred unless it has much more work.
        """
        found = [backend for backend in self._ready.get(pool, ()) if backend.instance not in without]
        if not found:
            return None
        self._turn += 1
        first = self._turn % len(found)
        loads = [(it.requests + self._items(it.name), it) for it in found[first:] + found[:first]]
        least, chosen = min(loads, key=itemgetter(0))
        if prefix is not None:
            most = least and least + max(1, least // AHEAD_BY_PREFIX)  # a server without work always gets some
            having = [it for it in loads if it[0] <= most and self._caches[it[1].instance] in prefix.caches]
            _, chosen = min(having, key=itemgetter(0), default=(least, chosen))
            prefix.add(self._caches[chosen.instance], most=max(1, len(found) // SERVERS_PER_PREFIX))
        return chosen


def _choice(state: ServerState) -> tuple[object, ...]:
    """Return the part of a state that matters for the choice of a server."""
    return state.instance, state.usable, state.works, state.returns


class Attempts:
    """The attempts to have one request answered."""

    def __init__(self, routing: Routing, queue_timeout: float | None, pool: str, prefix: Prefix | None = None) -> None:
        self._routing = routing
        self._pool = pool
        self._prefix = prefix
        self._patience = math.inf if queue_timeout is None else queue_timeout
        """Remaining time to wait for a server, in seconds. The time in servers does not count."""
        self._tried: set[str] = set()
        """Instances that refused the request, or seemed to die while they worked on it, a moment ago."""
        self._tried_at = 0.0
        self._deaths = 0
        self._failed: tuple[str, str, str] | None = None
        """Pool and name of the server of the last attempt, and why it failed."""
        self._busy: RemoteError | None = None

    async def next(self) -> Backend:
        """Return the server for the next attempt; wait for one if there is none.

        Raises RemoteError: there is none in time, all are busy, or too many have died (429, 503).
        """
        loop = asyncio.get_running_loop()
        while True:
            if self._deaths >= MAX_DEATHS:
                raise RemoteError(
                    f"{self._deaths} servers died while they worked on this request: it is not sent again", status=503
                )
            if self._routing.ending:
                raise RemoteError(self._routing.ending, status=503)
            backend = self._routing.choose(self._pool, self._tried, self._prefix)
            if backend is not None:
                if self._failed is not None:
                    self._routing.resends[self._failed] = self._routing.resends.get(self._failed, 0) + 1
                return backend
            if self._busy is not None:
                raise self._busy
            if self._routing.status_of(self._pool) == "stopped":
                of = f" of the model '{self._pool}'" if self._pool else ""
                raise RemoteError(f"no server{of} is running", status=503)
            if self._routing.is_stale(self._pool):
                raise RemoteError(
                    "all servers were started again after the last push of weights, and wait for the next one",
                    status=503,
                )
            if self._patience <= 0:
                raise RemoteError("no server became ready in time", status=503, retry_after=RETRY_SECONDS)
            began = loop.time()
            await self._routing.wait_changed(min(self._patience, RETRY_SECONDS), self._pool)
            self._patience -= loop.time() - began
            if loop.time() > self._tried_at + RETRY_SECONDS:
                self._tried.clear()  # those that are ready still are alive

    def at_work(self, backend: Backend) -> AbstractContextManager[None]:
        """Count the request as one that `backend` works on, for the block."""
        return backend

    def refused(self, backend: Backend, busy: RemoteError | None = None) -> None:
        """Take note that a server refused the request. `busy`: its answer if it had too much work."""
        self._exclude(backend, "refused")
        self._busy = busy or self._busy

    def died(self, backend: Backend) -> None:
        """Take note that a server died while it worked on the request."""
        self._exclude(backend, "died")
        self._deaths += 1

    def why_cut(self, backend: Backend) -> str:
        """Return why a server cannot complete an answer that has begun."""
        what = "the server died"
        if backend.is_stopping:
            what = "the service was stopped" if self._routing.ending else "the server was stopped"
        return f"{what} before the answer was complete"

    def _exclude(self, backend: Backend, why: str) -> None:
        self._failed = backend.pool, backend.name, why
        self._tried.add(backend.instance)
        self._tried_at = asyncio.get_running_loop().time()
