"""The series of a service for Prometheus: what its gateway counts, what its servers report, and their engines' own."""

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, Self

from ..interfaces import Backend
from ..overview import Counters
from .routing import Routing
from .state import ServerState, State

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the buckets of the histograms, in seconds."""
LEFT, CUT = "499", "cut"
"""Values of the label `status` if the client disconnects, and if the server dies after the answer has begun."""
NOWHERE = "", ""
"""Values of the labels `pool` and `server` of a request that no server answers."""
PREFIX = "gserve_"
"""Beginning of the names of gserve's series. Those of an engine must begin otherwise."""

logger = logging.getLogger("gserve.gateway")


class Waiting(NamedTuple):
    """What waits for the servers of a model: `items` in the service's own queue, and `requests` in the gateway."""

    items: int
    requests: int


class _Histogram:
    """Counts of values, by bucket, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, int]]:
        """Return each upper bound, with the number of values up to it."""
        total, found = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


@dataclass
class _Totals:
    """The totals of a server, or of all servers that had its name and its model one after another.

    `ended`: those of the generations that have ended. `restarts`: number of times it was started again.
    """

    ended: Counters = field(default_factory=Counters)
    restarts: int = 0


class Measurement:
    """Measures one request. A context manager for the time of the request; it counts the request at its end."""

    __slots__ = ("_began", "_ended", "_first", "_is_timed", "_metrics", "_route", "_sent", "_server", "_status")

    def __init__(self, metrics: "Metrics", route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._status, self._sent, self._is_timed = LEFT, 0, False
        self._server = NOWHERE
        self._first: float | None = None
        self._ended: float | None = None
        self._began = metrics.clock()

    def ask(self, server: Backend | None) -> None:
        """Note which server works on the request from now on; None: it waits for one."""
        self._server = _place(server)

    def begin_answer(
        self, status: int, server: Backend | None = None, *, is_stream: bool = False, is_batch: bool = False
    ) -> None:
        """Note that the first byte of the answer is sent. `server`: the one that gives it; None: the gateway.

        `is_batch`: whether it has the results of a batch, which any servers give.
        """
        self._sent, self._server, self._is_timed = status, _place(server), server is not None or is_batch
        if is_stream:
            self._first = self._metrics.clock()

    def end_answer(self) -> None:
        """Note that the whole answer is sent."""
        self._status = str(self._sent)
        self._ended = self._metrics.clock()

    def cut(self) -> None:
        """Note that the answer has begun, and cannot be completed."""
        self._status = CUT

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        metrics, route, server = self._metrics, self._route, self._server
        key = route, self._status, *server
        metrics.requests[key] = metrics.requests.get(key, 0) + 1
        if self._is_timed and self._ended is not None and self._sent < 300:
            where = route, *server
            if self._first is not None:
                _histogram(metrics.first_events, where).add(self._first - self._began)
            _histogram(metrics.durations, where).add(self._ended - self._began)


def _place(server: Backend | None) -> tuple[str, str]:
    """Return the pool and the name of a server."""
    return NOWHERE if server is None else (server.pool, server.name)


def _histogram(histograms: dict[tuple[str, str, str], _Histogram], where: tuple[str, str, str]) -> _Histogram:
    found = histograms.get(where)
    if found is None:
        found = histograms[where] = _Histogram()
    return found


class Metrics:
    """The series of a service. All methods run in the event loop of its gateway.

    A total counts all generations of a server since the start of the service, so it does not fall when a server
    restarts. It remains when a server is removed, and goes on if another one of its model gets its name. What a killed
    server finished after its last message is missing from it: the work of two seconds at most.

    `routing`: the gateway's.
    `waiting`: returns what waits for the servers of each model, by the model's name.
    """

    def __init__(
        self,
        routing: Routing,
        waiting: Callable[[], Mapping[str, Waiting]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routing = routing
        self._waiting = waiting
        self._version = version("gserve")
        self.clock = clock
        self._servers: dict[str, ServerState] = {}
        self._totals: dict[tuple[str, str], _Totals] = {}
        """The totals of servers, by pool and name. They include the servers that were removed."""
        self.requests: dict[tuple[str, str, str, str], int] = {}
        """Number of requests, by route, status, and the server's pool and name."""
        self.first_events: dict[tuple[str, str, str], _Histogram] = {}
        """Time to the first byte of streamed answers, by route, and the server's pool and name."""
        self.durations: dict[tuple[str, str, str], _Histogram] = {}
        """Time to the end of an answer, by route, and the server's pool and name. A batch has no server."""

    def update(self, state: ServerState) -> None:
        """Take over a server's new state."""
        known = self._servers.get(state.name)
        totals = self._totals.setdefault((state.pool, state.name), _Totals())
        if known is not None and state.generation != known.generation:
            self._end(known)
            totals.restarts += known.generation > 0
        self._servers[state.name] = state

    def forget(self, name: str) -> None:
        """Forget a server that has ended and does not return. Its totals and its requests remain counted."""
        if (state := self._servers.pop(name, None)) is not None:
            self._end(state)

    def _end(self, state: ServerState) -> None:
        """Add the counters of a generation that has ended to the totals."""
        totals = self._totals[state.pool, state.name]
        totals.ended = _sum(totals.ended, state.counters)

    def measured(self, route: str) -> Measurement:
        """Return the measurement of a new request. `route`: the path of a known route, or one word for all others."""
        return Measurement(self, route)

    async def text(self, engines: Mapping[str, bytes]) -> bytes:
        """Return all series in Prometheus' text format.

        `engines`: the text of each server's engine, by the name of the server. They get the server's labels. A text
        that cannot be read is left out.
        """
        own = [family for family in self._families() if family.samples]  # here, where nothing changes meanwhile
        pools = {name: state.pool for name, state in self._servers.items()}
        return await asyncio.to_thread(_text, own, pools, engines)

    def _families(self) -> Iterator["_Family"]:
        """Yield gserve's own series."""
        servers = [(_labels(state.pool, state.name), state) for state in self._servers.values()]
        current = {(state.pool, state.name): state.counters for state in self._servers.values()}
        totals = [
            (_labels(*where), it.restarts, _sum(it.ended, current.get(where, Counters())))
            for where, it in self._totals.items()
        ]

        yield _Family("info", "gauge", "The version of gserve.", [({"version": self._version}, 1)])
        yield _Family(
            "requests", "counter", "Requests to the gateway that have ended.",
            [
                ({"route": route, "status": status} | _labels(*where), number)
                for (route, status, *where), number in self.requests.items()
            ],
        )  # fmt: skip
        for name, what, histograms in (
            ("first_event_seconds", "Time to the first byte of a streamed answer.", self.first_events),
            ("request_seconds", "Time to the end of an answer.", self.durations),
        ):
            yield _Family(
                name, "histogram", what,
                [
                    ({"route": route} | _labels(*where), (it.buckets(), it.sum))
                    for (route, *where), it in histograms.items()
                ],
            )  # fmt: skip
        yield _Family(
            "resends", "counter", "Requests that the gateway sent again, by the server that had failed them, and why.",
            [
                (_labels(pool, server) | {"reason": reason}, number)
                for (pool, server, reason), number in self._routing.resends.items()
            ],
        )  # fmt: skip
        waiting = self._waiting()
        yield _Family(
            "requests_waiting", "gauge", "Requests that wait in the gateway for a server.",
            [({"pool": pool}, it.requests) for pool, it in waiting.items()],
        )  # fmt: skip
        yield _Family(
            "queue_items", "gauge", "Items that wait in the queue of the service's own process.",
            [({"pool": pool}, it.items) for pool, it in waiting.items()],
        )  # fmt: skip
        in_flight = self._routing.requests
        yield _Family(
            "requests_in_flight", "gauge", "Requests of the gateway that a server works on.",
            [(labels, in_flight.get(it.name, 0)) for labels, it in servers],
        )  # fmt: skip
        yield _Family(
            "server_state", "gauge", "1 for the current state of a server, 0 for the others.",
            [(labels | {"state": state}, int(it.state is state)) for labels, it in servers for state in State],
        )  # fmt: skip
        yield _Family(
            "server_restarts", "counter", "Times that a server was started again.",
            [(labels, restarts) for labels, restarts, _ in totals],
        )  # fmt: skip
        for name, what in (
            ("running", "Items in the engine."),
            ("waiting", "Items that a server has admitted, and that wait for the engine."),
        ):
            samples = [(labels, getattr(it.counters, name)) for labels, it in servers]
            yield _Family(_SERVER_NAMES[name], "gauge", what, samples)
        for name, what in (
            ("items", "Items that a server has answered."),
            ("failed", "Items that have failed in a server."),
            ("prompt_tokens", "Tokens of the prompts that the engine got."),
            ("completion_tokens", "Tokens that the engine generated."),
        ):
            samples = [(labels, getattr(total, name)) for labels, _, total in totals]
            yield _Family(_SERVER_NAMES[name], "counter", what, samples)


_SERVER_NAMES: Mapping[str, str] = {
    "running": "server_items_running",
    "waiting": "server_items_waiting",
    "items": "server_items",
    "failed": "server_items_failed",
    "prompt_tokens": "server_prompt_tokens",
    "completion_tokens": "server_completion_tokens",
}
"""The names of the series of `Counters`, by field."""


@dataclass(frozen=True)
class _Family:
    """The series of one name, as plain values. A counter's name gets "_total" at its end."""

    name: str
    kind: str
    what: str
    samples: list[tuple[dict[str, str], Any]]


def _labels(pool: str, server: str) -> dict[str, str]:
    return {"pool": pool, "server": server}


def _sum(ended: Counters, now: Counters) -> Counters:
    """Return the totals of generations that have ended and of one more."""
    return Counters(
        items=ended.items + now.items, failed=ended.failed + now.failed,
        prompt_tokens=ended.prompt_tokens + now.prompt_tokens,
        completion_tokens=ended.completion_tokens + now.completion_tokens,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- in a thread


def _text(own: Iterable[_Family], pools: Mapping[str, str], engines: Mapping[str, bytes]) -> bytes:
    """Return all series as a text."""
    from prometheus_client import generate_latest

    text: bytes = generate_latest(_Collected([*map(_made, own), *_merged(pools, engines)]))
    return text


class _Collected:
    """Families of series, in the form of a registry."""

    def __init__(self, families: list[Any]) -> None:
        self._families = families

    def collect(self) -> list[Any]:
        return self._families


def _made(family: _Family) -> Any:
    """Return a family as prometheus_client has it."""
    from prometheus_client.core import Metric

    made = Metric(PREFIX + family.name, family.what, family.kind)
    for labels, value in family.samples:
        match family.kind:
            case "counter":
                made.add_sample(f"{made.name}_total", labels, value)
            case "histogram":
                buckets, total = value
                for bound, count in buckets:
                    made.add_sample(f"{made.name}_bucket", labels | {"le": bound}, count)
                made.add_sample(f"{made.name}_count", labels, buckets[-1][1])
                made.add_sample(f"{made.name}_sum", labels, total)
            case _:
                made.add_sample(made.name, labels, value)
    return made


def _merged(pools: Mapping[str, str], engines: Mapping[str, bytes]) -> list[Any]:
    """Return the families of all engines. Each name occurs once, with the samples of all servers."""
    from prometheus_client.parser import text_string_to_metric_families

    merged: dict[str, Any] = {}
    for server, text in engines.items():
        own = {"pool": pools.get(server, ""), "server": server}
        try:
            families = list(text_string_to_metric_families(text.decode()))
        except ValueError as error:  # UnicodeDecodeError is one
            logger.warning("cannot read the engine's own series of %s: %s", server, error)
            continue
        for family in families:
            if family.name.startswith(PREFIX):
                continue
            samples = [sample._replace(labels={**sample.labels, **own}) for sample in family.samples]
            known = merged.setdefault(family.name, family)
            if known is family:
                family.samples = samples
            elif known.type == family.type:
                known.samples += samples
    return list(merged.values())
