"""Many streams through a gateway while servers are killed: every request ends, and none is lost, doubled or hung."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import uvloop

from gserve_core.host import processes
from gserve_core.interfaces import Address
from gserve_core.service import records
from gserve_core.service.records import ServerRecord, ServiceRecord
from gserve_transports.http_upstream import Answer, Gone, Headers, Upstream

WORDS = 25
NAME = "storm"
ASK_HEALTH = """
import json, sys, time
from http.client import HTTPConnection

host, port, seconds = sys.argv[1:]
asking, times, end = HTTPConnection(host, int(port), timeout=60), [], time.monotonic() + float(seconds)
while time.monotonic() < end:
    began = time.perf_counter()
    asking.request("GET", "/health")
    asking.getresponse().read()
    times.append(time.perf_counter() - began)
    time.sleep(0.05)
print(json.dumps(times))
"""
"""Program that asks for health every 50 ms and prints the time of each answer, in seconds.

It has a process of its own: the one with the streams would notice an answer only when it has read all of them.
"""


@dataclass(frozen=True)
class Storm:
    """The size of a run: `streams` at once to `servers`, for `seconds`; a server is killed every `pause` seconds.

    `max_health`: maximum time of `/health` in 99 of 100 cases, in seconds.
    """

    streams: int
    servers: int
    seconds: float
    pause: float = 3.0
    max_health: float = math.inf


@dataclass
class Seen:
    """How requests have ended, and how long health took, in seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    kills: int = 0


STORMS = [
    Storm(streams=100, servers=2, seconds=10),
    pytest.param(
        Storm(streams=1000, servers=4, seconds=60, max_health=0.1),
        marks=pytest.mark.skipif("LONG" not in os.environ, reason="takes two minutes: LONG=1 runs it"),
    ),
]


@pytest.mark.parametrize("storm", STORMS, ids=lambda storm: f"{storm.streams} streams")
def test_every_stream_ends_while_servers_are_killed(tmp_path: Path, storm: Storm) -> None:
    with launched(tmp_path, storm.servers) as record:
        seen = uvloop.run(blow(storm, record))
    assert not seen.wrong, seen.wrong[:5]
    assert seen.ends["whole"] >= storm.streams
    assert seen.kills >= 2
    assert seen.ends["cut after an error event"], "no stream was under way when a server was killed"
    p99 = sorted(seen.health)[len(seen.health) * 99 // 100]
    sys.stdout.write(f"{dict(seen.ends)}, {seen.kills} kills, p99 of /health {p99:.3f} s\n")
    assert p99 < storm.max_health


@contextmanager
def launched(folder: Path, servers: int) -> Iterator[ServiceRecord]:
    """Launch a service of the engine `echo`, with 5 events a second for each stream."""
    config = folder / "storm.yaml"
    serve = {"servers": servers, "max_restarts": 1000}
    engine = {"type": "echo", "latency": 0.2, "capacity": 4096}
    config.write_text(json.dumps({"llm": {"model_name": "m"}, "serve": serve, "engine": engine}))
    command = [sys.executable, "-m", "gserve.cli", "launch", str(config), "--name", NAME]
    # In a session of its own, as a daemon is: the kernel shares the processor between sessions, and would else give
    # the gateway and the 1,000 clients together as much as one server.
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            subprocess.run([sys.executable, "-m", "gserve.cli", "wait", NAME], check=True, timeout=60)
            yield records.find_service(NAME)
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


async def blow(storm: Storm, record: ServiceRecord) -> Seen:
    """Keep the streams going, kill servers, and ask for health; return how everything has ended."""
    assert record.gateway is not None
    url = urlsplit(record.gateway.base_url)
    assert url.hostname is not None
    assert url.port is not None
    upstream, key, seen = Upstream(Address([url.hostname], url.port)), record.gateway.api_key.encode(), Seen()
    end = time.monotonic() + storm.seconds

    async def client(number: int) -> None:
        await asyncio.sleep(number / storm.streams * WORDS * 0.2)
        turn, how = 0, ""
        while time.monotonic() < end or how in ("cut after an error event", "three deaths"):  # the last one is whole
            words = [f"{number}.{turn}.{place}" for place in range(WORDS)]
            try:
                async with asyncio.timeout(60):
                    how = await one(upstream, key, words)
            except TimeoutError:
                how = "hung"
            seen.ends[how] += 1
            if how not in ("whole", "cut after an error event", "three deaths"):
                seen.wrong.append(how)
            turn += 1

    async def kill() -> None:
        turn = 0
        while time.monotonic() < end - storm.pause:
            await asyncio.sleep(storm.pause)
            found = await asyncio.to_thread(records.find_service, NAME)
            if found.servers:
                pid = await asyncio.to_thread(listener, found.servers[turn % len(found.servers)])
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    seen.kills += 1
            turn += 1

    async def ask_health() -> None:
        command = [sys.executable, "-c", ASK_HEALTH, str(url.hostname), str(url.port), str(storm.seconds)]
        asking = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, start_new_session=True)
        printed, _ = await asking.communicate()
        seen.health = json.loads(printed)

    try:
        await asyncio.gather(*map(client, range(storm.streams)), kill(), ask_health())
    finally:
        upstream.close()
    return seen


async def one(upstream: Upstream, key: bytes, words: list[str]) -> str:
    """Ask for one stream; return how it ended."""
    body = json.dumps({"prompt": " ".join(words), "max_tokens": len(words), "stream": True}).encode()
    headers = [(b"authorization", b"Bearer " + key), (b"content-type", b"application/json")]
    text = bytearray()
    try:
        answer = await whole(upstream, "POST", b"/v1/completions", headers, body, text)
        upstream.finish(answer)
        if answer.status == 503 and b"3 servers died" in text:
            return "three deaths"
        if answer.status != 200:
            return f"status {answer.status}: {text[:200]!r}"
    except Gone:
        events = [json.loads(event.removeprefix(b"data: ")) for event in bytes(text).split(b"\n\n") if event]
        if not events or "error" not in events[-1]:
            return f"cut without an error event, after {text[-200:]!r}"
        said = "".join(event["choices"][0]["text"] for event in events[:-1])
        return "cut after an error event" if " ".join(words).startswith(said) else f"cut, and wrong: {said!r}"
    *events, done = [event.removeprefix(b"data: ") for event in bytes(text).split(b"\n\n") if event]
    said = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    return "whole" if said == " ".join(words) and done == b"[DONE]" else f"whole, but wrong: {text[-300:]!r}"


async def whole(
    upstream: Upstream, method: str, target: bytes, headers: Headers, body: bytes, text: bytearray
) -> Answer:
    """Send a request, and add its answer to `text`. Raises Gone: the connection was lost."""
    answer = await upstream.request(method, target, headers, body)
    try:
        while (part := await answer.part()) is not None:
            text += part
    except BaseException:
        upstream.finish(answer)
        raise
    return answer


def listener(server: ServerRecord) -> int | None:
    """Return the process that listens for a server; None: it has ended."""
    for pid in processes.processes_of(server.instance):
        with suppress(psutil.Error):
            for found in psutil.Process(pid).net_connections("tcp"):
                if found.status == psutil.CONN_LISTEN and found.laddr.port == server.address.port:
                    return pid
    return None
