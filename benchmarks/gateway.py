"""The gateway: requests and streams through it, against the same requests sent to its servers directly.

A launched service has two servers with the engine `echo`, so nothing but gserve is measured. All run on this machine,
and the client here too. Each round measures both sides.
"""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import msgspec
import psutil
import uvloop

from gserve_core.interfaces import Address
from gserve_core.service import records
from gserve_core.service.records import ServiceRecord
from gserve_transports.http_upstream import Upstream

from .rounds import Benchmark, say
from .table import GSERVE, no_figures

DIRECT = "direct"
NAME = "gateway-benchmark"
CONFIG = "llm: {model_name: m}\nserve: {servers: 2}\nengine: {type: echo, latency: %s, capacity: 4096}\n"
CONNECTIONS, REQUESTS, ALONE = 64, 6_000, 1_500
"""Number of connections at once, of requests over them, and of requests one at a time."""
STREAMS, EVENTS, PAUSE = 100, 400, 0.02
"""Number of streams at once, of events of each, and the time between two events, in seconds."""
SHORT = msgspec.json.encode({"prompt": "one two three", "max_tokens": 3})
"""The body of a request."""
READY_SECONDS = 60.0
TICK = 0.02
"""Interval between two looks at a service that starts, in seconds."""


@dataclass(frozen=True)
class Way:
    """A way to the servers: addresses, each with its key."""

    ends: Sequence[tuple[Address, str]]

    def connect(self) -> "list[tuple[Upstream, str]]":
        """Return a client of each address, and its key."""
        return [(Upstream(address), key) for address, key in self.ends]


def measure(bench: Benchmark, scale: float) -> None:
    """Measure rate, latency, and the time of the processor for an event of a stream."""
    many, one = f"{CONNECTIONS} connections", "one connection"
    rate = {side: no_figures("gateway", many, side, "echo", "req/s") for side in (GSERVE, DIRECT)}
    alone = {side: no_figures("gateway alone", one, side, "echo", "ms") for side in (GSERVE, DIRECT)}
    added = no_figures("gateway added", f"{one}: added", GSERVE, "echo", "ms")
    event = no_figures("gateway event", f"{STREAMS} streams: processor for an event", GSERVE, "echo", "µs")
    with launched(bench.folder, 0.0) as (through, direct, _):
        sides = [(GSERVE, through), (DIRECT, direct)]
        for _, way in sides:
            uvloop.run(requests(way, CONNECTIONS * 10, CONNECTIONS))  # to warm up
        for turn in bench.turns("gateway"):
            for side, way in sides if turn % 2 else sides[::-1]:
                times = uvloop.run(requests(way, round(REQUESTS * scale), CONNECTIONS))
                rate[side].figures.append(len(times) / (max(end for _, end in times) - min(it for it, _ in times)))
            taken = uvloop.run(alternately([way for _, way in sides], round(ALONE * scale)))
            for (side, _), seconds in zip(sides, taken, strict=True):
                alone[side].figures.append(1000 * median(seconds))
            added.figures.append(alone[GSERVE].figures[-1] - alone[DIRECT].figures[-1])
            rates = " and ".join(f"{rate[side].figures[-1]:.0f}" for side, _ in sides)
            say(f"round {turn}: {rates} requests/s, {added.figures[-1]:.2f} ms added")
    with launched(bench.folder, PAUSE) as (through, _, process):
        uvloop.run(streams(through, STREAMS, 10))  # to warm up
        for turn in bench.turns("gateway streams"):
            events = round(EVENTS * scale)
            before = sum(process.cpu_times()[:2])
            uvloop.run(streams(through, STREAMS, events))
            event.figures.append(1e6 * (sum(process.cpu_times()[:2]) - before) / (STREAMS * events))
            say(f"round {turn}: {event.figures[-1]:.1f} µs an event")
    bench.figures += [*rate.values(), *alone.values(), added, event]


@contextlib.contextmanager
def launched(folder: Path, latency: float) -> Iterator[tuple[Way, Way, psutil.Process]]:
    """Launch the service; yield the way through its gateway, the direct way, and the process of the gateway."""
    config = folder / "gateway.yaml"
    config.write_text(CONFIG % latency)
    command = [sys.executable, "-m", "gserve.cli", "launch", str(config), "--name", NAME]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            record = wait_ready(process, 2, READY_SECONDS)
            assert record.gateway is not None
            url = urlsplit(record.gateway.base_url)
            assert url.hostname is not None
            assert url.port is not None
            through = Way([(Address([url.hostname], url.port), record.gateway.api_key)])
            direct = Way([(server.address, server.token) for server in record.servers])
            yield through, direct, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def wait_ready(process: "subprocess.Popen[bytes]", servers: int, seconds: float) -> ServiceRecord:
    """Wait until the service of a process has this number of ready servers; return its record."""
    deadline = time.monotonic() + seconds
    while (record := records.read_service(NAME)) is None or len(record.servers) < servers:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the service of the benchmark was not ready")
        time.sleep(TICK)
    return record


async def requests(way: Way, count: int, connections: int) -> list[tuple[float, float]]:
    """Send this number of requests over connections of the way; return when each began and ended."""
    ends, times, left = way.connect(), list[tuple[float, float]](), itertools.count()

    async def client(number: int) -> None:
        upstream, key = ends[number % len(ends)]
        while next(left) < count:
            began = time.perf_counter()
            await _ask(upstream, key, SHORT)
            times.append((began, time.perf_counter()))

    await _all(ends, [client(number) for number in range(connections)])
    return times


async def alternately(ways: Sequence[Way], count: int) -> list[list[float]]:
    """Send this number of requests each way, one at a time, in turn. Return the time of each in seconds, by way.

    So whatever else the machine does meets all ways alike.
    """
    ends = [way.connect()[0] for way in ways]
    times: list[list[float]] = [[] for _ in ways]

    async def client() -> None:
        for _ in range(count):
            for (upstream, key), taken in zip(ends, times, strict=True):
                began = time.perf_counter()
                await _ask(upstream, key, SHORT)
                taken.append(time.perf_counter() - began)

    await _all(ends, [client()])
    return times


async def streams(way: Way, count: int, events: int) -> None:
    """Read this number of streams at once."""
    body = msgspec.json.encode({"prompt": "a b", "max_tokens": events, "stream": True, "ignore_eos": True})
    ends = way.connect()
    await _all(ends, [_ask(*ends[number % len(ends)], body) for number in range(count)])


async def _all(ends: "Sequence[tuple[Upstream, str]]", work: Sequence[Awaitable[None]]) -> None:
    try:
        await asyncio.gather(*work)
    finally:
        for upstream, _ in ends:
            upstream.close()


async def _ask(upstream: Upstream, key: str, body: bytes) -> None:
    headers = [(b"authorization", b"Bearer " + key.encode()), (b"content-type", b"application/json")]
    answer = await upstream.request("POST", b"/v1/completions", headers, body)
    try:
        while await answer.part() is not None:
            pass
        if answer.status != 200:
            raise RuntimeError(f"a request of the benchmark was answered with {answer.status}")
    finally:
        upstream.finish(answer)
