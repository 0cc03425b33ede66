"""One server on one host, or on several, from the choice of its place to its end.

Up to the greetings of all hosts a start may fail in many ways, and is repeated in another place. From then on the
server has this place until its end.

A server on several hosts has a rank on each. Each gets all that the owner sends, and the owner gets the lines of all.
"""

import contextlib
import os
import queue
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from subprocess import Popen
from typing import IO, Protocol

import msgspec

from gserve_core import lease
from gserve_core.errors import LaunchError
from gserve_core.host.child_process import KILL_SECONDS, UNKNOWN
from gserve_core.host.forks import call_in_child
from gserve_core.interfaces import Address, Job
from gserve_core.process.far import BUSY, LOST, MEETING, RANK

from .connection import CHUNK, Connection, write
from .places import PLACES, Place, Seat

FAR_PORTS = range(20000, 32000)
"""Ports of the servers on their hosts. Systems give out higher ones by themselves."""
RETRY_SECONDS = 5.0
"""Time between two attempts to find a place for a server that is restarted, in seconds."""
RANKS_SECONDS = 5.0
"""Maximum time for the other ranks of a server to end by themselves when one has ended, in seconds."""
FORCE_SECONDS = 10.0
"""Maximum time for a server and `far` to end after their line is closed, in seconds. Then ssh is killed."""
MAX_BUSY = 5
"""Maximum number of attempts in one place whose port is taken there."""


class Ssh(Protocol):
    """Starts ssh."""

    def __call__(self, job: Job, seat: Seat, forward: tuple[int, int] | None, left: Sequence[str]) -> "Popen[bytes]":
        """Start the ssh that runs `job` in `seat`. Raises LaunchError or ConfigError.

        `forward`: see `command_line.ssh`. `left`: instances of servers that `far` ends first.
        """


class SshProcess:
    """A server on one of several hosts, or on several. Implements `interfaces.Process`.

    `places`: all places. `first`: the one to begin with, which is taken.
    `start`: starts ssh.
    `near_port`: the port of the near end of the tunnel; 0: any.
    `patience`: maximum time to look for a place, in seconds. 0: each place is tried once.
    """

    def __init__(
        self, job: Job, places: Sequence[Place], first: Place, start: Ssh, *, near_port: int, patience: float
    ) -> None:
        self._job = job
        self._places = places
        self._place = first
        self._start = start
        self._near_port = near_port
        self._patience = patience
        self._connections: list[Connection] = []
        self._phase: str | None = f"connecting to {first.hosts}"
        self._why: str | None = None
        self._code: int | None = None
        self._end_code = LOST
        self._is_stopping = False
        self._was_ready = False
        self._passing_up = threading.Lock()
        down, stdin = os.pipe()
        stdout, up = os.pipe()
        self._down = os.fdopen(down, "rb", 0)
        self._up = os.fdopen(up, "wb", 0)
        self.stdin: IO[bytes] = os.fdopen(stdin, "wb", 0)
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb", 0)
        call_in_child(self._close_in_child)
        self._thread = threading.Thread(target=self._run, name=f"{job.name}-ssh", daemon=True)
        self._thread.start()

    @property
    def machine(self) -> str:
        """The host on which the server runs, or is about to run; all of them, with ", " between them."""
        return self._place.hosts

    @property
    def place(self) -> Place:
        """The place of the server."""
        return self._place

    def poll(self) -> int | None:
        """Return the exit code of the server once it and ssh have ended (negative: a signal's number), else None."""
        return self._code

    def waiting(self) -> str | None:
        """Return the host to which ssh connects; None once the server runs."""
        return self._phase

    def why(self) -> str | None:
        """Return why no place was found, or why the connection has ended; None if the server ended on its own."""
        return self._why

    def stop(self, grace: float) -> int:
        """Wait `grace` seconds for the server to end, as it was asked to; then end it. Return its exit code."""
        if self._phase is None:
            self._thread.join(grace)
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self.stdin.close()  # `far` then ends the server
        if self._phase is None:
            self._thread.join(FORCE_SECONDS)
        for connection in self._connections:
            connection.kill()
        self._thread.join(KILL_SECONDS)
        with contextlib.suppress(OSError):
            self.stdout.close()
        return UNKNOWN if self._code is None else self._code

    def _close_in_child(self) -> None:
        """Close our ends in a forked child. An open copy there would hide the end of this process."""
        for stream in (self.stdin, self._up):
            with contextlib.suppress(OSError):
                stream.close()
        for connection in self._connections:
            connection.close_stdin()

    # ------------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        code = LOST
        try:
            code = self._find_place_and_serve()
        except Exception as error:  # too few descriptors, for example
            self._why = f"cannot run ssh: {error}"
        finally:
            self._code = code
            self._phase = None
            for stream in (self._up, self._down):
                with contextlib.suppress(OSError):
                    stream.close()

    def _find_place_and_serve(self) -> int:
        """Start the server in the first place that takes it, and follow it to its end. Return its exit code."""
        deadline = time.monotonic() + self._patience
        tried: dict[Place, str] = {}
        place: Place | None = self._place
        while not self._is_stopping:
            if place is not None:
                self._place, self._phase = place, f"connecting to {place.hosts}"
                failure = self._attempt(place)
                if failure is None:
                    return self._end_code
                tried[place] = failure
            place = PLACES.take(self._places, tried)
            if place is None:
                self._why = "; ".join(dict.fromkeys(tried.values()))
                if time.monotonic() > deadline:
                    return LOST
                self._phase = f"waiting for a host: {self._why}"
                self._wait(RETRY_SECONDS)
                tried.clear()
                place = PLACES.take(self._places)
        if place is not None:
            PLACES.free(place, failed=False)
        return -signal.SIGTERM

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < deadline:
            time.sleep(0.1)

    def _attempt(self, place: Place) -> str | None:
        """Run the server in a place to its end, and free the place. Return why it could not be started there, if so."""
        has_begun = False
        try:
            for _ in range(MAX_BUSY):
                with self._near_end() as near:
                    failure = self._connect(place, near)
                    if failure is None and not self._is_stopping:
                        has_begun = True
                        self._serve(near)
                        return None
                    self._end(self._connections)
                if failure != BUSY:
                    return failure or "it was stopped"
            return f"no free port was found on {place.seats[0].host.host}"
        finally:
            self._end(self._connections)
            is_lost = has_begun and any(connection.is_lost for connection in self._connections)
            has_failed = is_lost or not (self._was_ready or self._is_stopping)
            PLACES.free(place, failed=has_failed, left=self._job.instance if is_lost else "")

    @contextlib.contextmanager
    def _near_end(self) -> Iterator[int]:
        """Keep a port of this machine for the near end of the tunnel. ssh may listen there, and nobody else."""
        with socket.socket() as kept:
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not self._near_port:
                kept.bind(("127.0.0.1", 0))
            yield self._near_port or kept.getsockname()[1]

    def _connect(self, place: Place, near_port: int) -> str | None:
        """Connect to all hosts, one after the other. Return why that fails, if so; `BUSY`: try another far port.

        In that order, what ssh writes into the log is about the last one.
        """
        self._connections = []
        left = PLACES.left(place)
        for rank, seat in enumerate(place.seats):
            with contextlib.suppress(OSError), self._job.log.open("a") as log:
                log.write(f"{self._job.name} on {seat}, over ssh\n")
            has_tunnel = rank == 0 and seat.host.address is None
            forward = (near_port, random.choice(FAR_PORTS)) if has_tunnel else None  # noqa: S311
            connection = Connection(
                seat, rank if len(place.seats) > 1 else None, self._job.log,
                partial(self._start, self._job, seat, forward, left),
            )  # fmt: skip
            self._connections.append(connection)
            greeting = connection.greeting(lambda: self._is_stopping)
            if greeting == BUSY:
                return BUSY
            failure = connection.explain_start() if greeting is None else None
            if greeting is not None and has_tunnel:
                failure = connection.test_tunnel(near_port, greeting)
            if failure is not None or self._is_stopping:
                return failure
        PLACES.ended(place, left)
        return None

    def _serve(self, near_port: int) -> None:
        """Send each rank its environment, then pass on the lease until all have ended."""
        connections, ended = self._connections, queue.SimpleQueue[Connection]()
        self._why = None
        for rank, connection in enumerate(connections):
            host = connection.seat.host
            own = {RANK: str(rank), MEETING: host.node_address or host.address or ""} if len(connections) > 1 else {}
            connection.send_env({**self._job.env, **own})
        self._phase = None
        threading.Thread(
            target=self._pass_down, args=(connections,), name=f"{self._job.name}-down", daemon=True
        ).start()
        for rank, connection in enumerate(connections):
            near = near_port if rank == 0 and connection.seat.host.address is None else 0
            threading.Thread(
                target=self._pass_all_up, args=(connection, near, ended), name=f"{self._job.name}-up", daemon=True
            ).start()
        by_themselves = [ended.get()]
        if not self._is_stopping:
            self._explain_end(by_themselves)  # now: another rank may take longer than the owner waits
        by_themselves += _take(ended, len(connections) - 1, RANKS_SECONDS)
        others = [connection for connection in connections if connection not in by_themselves]
        for connection in others:
            connection.close_stdin()
        hung = {*others}.difference(_take(ended, len(others), FORCE_SECONDS))
        self._end(hung)
        if self._why is None:
            self._end_code = connections[0].code
            if not self._is_stopping:
                self._explain_end(by_themselves, hung)

    def _explain_end(self, by_themselves: Sequence[Connection], hung: Iterable[Connection] = ()) -> None:
        """Set why the server has ended, and its exit code, if one of its ranks tells. They have ended in this order."""
        for connection in by_themselves:
            if (why := connection.explain_end()) is not None:
                self._why, self._end_code = why, connection.code
                return
        for connection in hung:
            self._why = f"the connection to {connection.seat.host.host} was lost, or gserve's program there hangs"

    def _pass_all_up(self, connection: Connection, near_port: int, ended: "queue.SimpleQueue[Connection]") -> None:
        """Pass on all lines of a rank, until its end. Runs in a thread of its own."""
        rest = b""
        with contextlib.suppress(OSError, ValueError):
            for chunk in connection.chunks():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._pass_up(self._near_line(line, near_port) + b"\n")
        self._pass_up(rest)
        connection.end(KILL_SECONDS)
        ended.put(connection)

    def _near_line(self, line: bytes, near_port: int) -> bytes:
        """Return a line of the server as its owner needs it: with the near end of the tunnel as its address."""
        if self._was_ready:
            return line
        try:
            message = msgspec.json.decode(line, type=lease.Listening | lease.Ready)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return line
        if isinstance(message, lease.Ready):
            self._was_ready = True
        elif near_port:
            return lease.encode(lease.Listening(Address(["127.0.0.1"], near_port))).rstrip()
        return line

    def _pass_up(self, data: bytes) -> None:
        with self._passing_up, contextlib.suppress(OSError, ValueError):  # the owner no longer reads
            write(self._up, data)

    def _pass_down(self, connections: Sequence[Connection]) -> None:
        """Pass on what the owner sends to all ranks, and its end. Runs in a thread of its own."""
        with contextlib.suppress(OSError, ValueError):
            while chunk := os.read(self._down.fileno(), CHUNK):
                for connection in connections:
                    connection.send(chunk)
        for connection in connections:
            connection.close_stdin()

    def _end(self, connections: Iterable[Connection]) -> None:
        for connection in connections:
            connection.end()


def _take(found: "queue.SimpleQueue[Connection]", number: int, seconds: float) -> Iterator[Connection]:
    """Yield what arrives within the time, at most `number`."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        for _ in range(number):
            yield found.get(timeout=max(0.0, deadline - time.monotonic()))


def choose(places: Sequence[Place], job: Job, start: Callable[[Place], SshProcess]) -> SshProcess:
    """Take a place for `job`, and start it there. Raises LaunchError: no place is free."""
    last = job.previous.place if isinstance(job.previous, SshProcess) else None
    place = PLACES.take(places, last=last)
    if place is None:
        hosts = ", ".join(dict.fromkeys(seat.host.host for it in places for seat in it.seats))
        raise LaunchError(f"no place for {job.name} is free on {hosts}: add hosts, or set fewer servers")
    try:
        return start(place)
    except BaseException:
        PLACES.free(place, failed=False)
        raise
