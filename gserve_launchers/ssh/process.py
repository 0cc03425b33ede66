"""One server on a host, from the choice of its place to its end. ssh carries its lease, its log and its tunnel.

One ssh process does all three, so that none of them can end without the others. The tunnel's far port must be known
before ssh starts, and the server's is not. So a port is chosen at random; the program `far` says whether it is free.

Nothing is sent until `far` has said that it runs. Up to then a start may fail in many ways, and is repeated in another
place. From then on the server has this place until its end.
"""

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Protocol

import msgspec

from gserve_core import lease
from gserve_core.errors import LaunchError
from gserve_core.host.child_process import KILL_SECONDS, UNKNOWN
from gserve_core.host.forks import call_in_child
from gserve_core.interfaces import Address, Job
from gserve_core.process.far import BUSY, GREETING, LOST

from .messages import explain, last_line, read_from
from .places import PLACES, Place

FAR_PORTS = range(20000, 32000)
"""Ports of the servers on their hosts. Systems give out higher ones by themselves."""
GREETING_SECONDS = 60.0
"""Maximum time for ssh to connect and for `far` to start, in seconds. Python may load from a slow file system."""
RETRY_SECONDS = 5.0
"""Time between two attempts to find a place for a server that is restarted, in seconds."""
FORCE_SECONDS = 10.0
"""Maximum time for a server and `far` to end after their line is closed, in seconds. Then ssh is killed."""
TUNNEL_SECONDS = 20.0
"""Maximum time until `far` answers through the tunnel, in seconds."""
MAX_BUSY = 5
"""Maximum number of attempts in one place whose port is taken there."""
LAST_LINES = 3
"""Number of lines at the end of a log that may tell why a connection has ended. Others are the server's own."""
CHECK_SECONDS = 0.2
"""Interval between two checks whether a start was given up, in seconds."""
CHUNK = 1 << 16
"""Maximum size of one read, in bytes."""


class Ssh(Protocol):
    """Starts ssh."""

    def __call__(
        self, job: Job, place: Place, forward: tuple[int, int] | None, left: Sequence[str]
    ) -> "subprocess.Popen[bytes]":
        """Start the ssh that runs `job` in `place`. Raises LaunchError or ConfigError.

        `forward`: see `command_line.ssh`. `left`: instances of servers that `far` ends first.
        """


class SshProcess:
    """A server on one of several hosts. Implements `interfaces.Process`.

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
        self._ssh: subprocess.Popen[bytes] | None = None
        self._phase: str | None = f"connecting to {first.host.host}"
        self._why: str | None = None
        self._code: int | None = None
        self._is_stopping = False
        self._was_ready = False
        self._log_position = 0
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
        """The host on which the server runs, or is about to run."""
        return self._place.host.host

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
        self._kill_ssh()
        self._thread.join(KILL_SECONDS)
        with contextlib.suppress(OSError):
            self.stdout.close()
        return UNKNOWN if self._code is None else self._code

    def _kill_ssh(self) -> None:
        ssh = self._ssh
        if ssh is not None and ssh.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ssh.pid, signal.SIGKILL)

    def _close_in_child(self) -> None:
        """Close our ends in a forked child. An open copy there would hide the end of this process."""
        for stream in (self.stdin, self._up, None if self._ssh is None else self._ssh.stdin):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

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
                self._place, self._phase = place, f"connecting to {place.host.host}"
                failure = self._attempt(place)
                if failure is None:
                    return self._code_of_ssh()
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
                    forward = None if place.host.address else (near, random.choice(FAR_PORTS))  # noqa: S311
                    greeting = self._connect(place, forward)
                    failure = self._explain_start(place) if greeting is None else None
                    if greeting and forward and greeting != BUSY:
                        failure = self._test_tunnel(place, near, greeting)
                    if greeting != BUSY and failure is None and not self._is_stopping:
                        has_begun = True
                        self._serve(place, near if forward else 0)
                        return None
                    self._end_ssh()
                if greeting != BUSY:
                    return failure or "it was stopped"
            return f"no free port was found on {place.host.host}"
        finally:
            self._end_ssh()
            code = None if self._ssh is None else self._ssh.poll()
            is_lost = has_begun and (code is None or code < 0 or code == LOST)
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

    def _connect(self, place: Place, forward: tuple[int, int] | None) -> str | None:
        """Start ssh, and return the last word of `far`'s greeting; None if there is none in time."""
        left = PLACES.left(place)
        with contextlib.suppress(OSError), self._job.log.open("a") as log:
            log.write(f"{self._job.name} on {place}, over ssh\n")
            self._log_position = log.tell()
        self._ssh = ssh = self._start(self._job, place, forward, left)
        assert ssh.stdout is not None
        deadline, text = time.monotonic() + GREETING_SECONDS, b""
        news = select.poll()
        news.register(ssh.stdout, select.POLLIN)
        while time.monotonic() < deadline and not self._is_stopping:
            if not news.poll(CHECK_SECONDS * 1000):
                continue
            byte = os.read(ssh.stdout.fileno(), 1)  # what follows the greeting is the server's
            if not byte:
                break
            text += byte
            if byte == b"\n":
                words = text.decode(errors="replace").split()
                if words[:1] == [GREETING]:
                    PLACES.ended(place, left)
                    return words[-1]
                text = b""
        return None

    def _test_tunnel(self, place: Place, near_port: int, token: str) -> str | None:
        """Ask `far` for its token through the tunnel. Return why that fails, if so."""
        try:
            with socket.create_connection(("127.0.0.1", near_port), TUNNEL_SECONDS) as tunnel:
                said = tunnel.makefile("rb").readline().decode(errors="replace").strip()
        except OSError as error:
            said = error.strerror or str(error)
        if said == token:
            return None
        text = read_from(self._job.log, self._log_position)
        return explain(text, place.host.host) or (
            f"the tunnel from port {near_port} to {place.host.host} does not work"
            f" ({said or 'it is closed at once'}): check that no other program listens on that port here"
        )

    def _explain_start(self, place: Place) -> str:
        """Return why `far` has not been started."""
        text = read_from(self._job.log, self._log_position)
        if why := explain(text, place.host.host):
            return why
        if self._ssh is not None and self._ssh.poll() is None:
            return f"{place.host.host} did not run gserve within {GREETING_SECONDS:g} s: check it by hand with ssh"
        return f"ssh to {place.host.host} has failed: {last_line(text) or 'it said nothing'}"

    def _serve(self, place: Place, near_port: int) -> None:
        """Send the environment of the server, then pass on its lease until it ends."""
        ssh = self._ssh
        assert ssh is not None
        assert ssh.stdin is not None
        assert ssh.stdout is not None
        self._why = None
        with contextlib.suppress(OSError):  # its end is noticed below
            _write(ssh.stdin, json.dumps(dict(self._job.env)).encode() + b"\n")
        self._phase = None
        threading.Thread(target=self._pass_down, args=(ssh.stdin,), name=f"{self._job.name}-down", daemon=True).start()
        rest = b""
        while True:
            chunk = os.read(ssh.stdout.fileno(), CHUNK)
            if not chunk:
                break
            if self._was_ready and not rest:
                self._pass_up(chunk)
                continue
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._pass_up(self._near_line(line, near_port) + b"\n")
        self._pass_up(rest)
        self._end_ssh(KILL_SECONDS)
        if self._why is None and not self._is_stopping:
            self._why = self._explain_end(place)

    def _near_line(self, line: bytes, near_port: int) -> bytes:
        """Return a line of the server as its owner needs it: with the near end of the tunnel as its address."""
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
        with contextlib.suppress(OSError, ValueError):  # the owner no longer reads
            _write(self._up, data)

    def _pass_down(self, ssh: IO[bytes]) -> None:
        """Pass on what the owner sends, and its end. Runs in a thread of its own."""
        try:
            while chunk := os.read(self._down.fileno(), CHUNK):
                _write(ssh, chunk)
        except (OSError, ValueError):  # ssh has ended
            pass
        with contextlib.suppress(OSError):
            ssh.close()

    # ------------------------------------------------------------------------------------------------ the end of ssh

    def _end_ssh(self, seconds: float = 0.0) -> None:
        """Wait for the end of ssh, then kill it."""
        ssh = self._ssh
        if ssh is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            ssh.wait(seconds)
        self._kill_ssh()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ssh.wait(KILL_SECONDS)
        for stream in (ssh.stdin, ssh.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _code_of_ssh(self) -> int:
        """Return the exit code of the server; `LOST` if the connection was lost; ssh's own if that was killed."""
        code = None if self._ssh is None else self._ssh.poll()
        if code is None:
            return LOST
        return 128 - code if 128 < code <= 192 else code

    def _explain_end(self, place: Place) -> str | None:
        """Return why the connection has ended; None if the server has ended on its own."""
        ssh = self._ssh
        assert ssh is not None
        code = ssh.poll()
        if code is not None and code < 0:
            return f"its ssh to {place.host.host} was killed by {signal.Signals(-code).name}"
        if code != LOST:
            return None
        lines = read_from(self._job.log, self._log_position).splitlines()[-LAST_LINES:]
        said = "\n".join(line for line in lines if not line.startswith("channel "))  # a client of a dead server
        return explain(said, place.host.host) or (
            f"the connection to {place.host.host} has ended, or gserve's program there was killed"
        )


def _write(stream: IO[bytes], data: bytes) -> None:
    """Write all of `data` to a stream without a buffer, which may take a part at a time. Raises OSError, ValueError."""
    while data:
        data = data[stream.write(data) or 0 :]


def choose(places: Sequence[Place], job: Job, start: Callable[[Place], SshProcess]) -> SshProcess:
    """Take a place for `job`, and start it there. Raises LaunchError: no place is free."""
    last = job.previous.place if isinstance(job.previous, SshProcess) else None
    place = PLACES.take(places, last=last)
    if place is None:
        hosts = ", ".join(dict.fromkeys(it.host.host for it in places))
        raise LaunchError(f"no place for {job.name} is free on {hosts}: add hosts, or set fewer servers")
    try:
        return start(place)
    except BaseException:
        PLACES.free(place, failed=False)
        raise
