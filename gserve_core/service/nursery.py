"""The owner's end of the nursery: starts it, and requests forked servers. If it dies or hangs, servers start directly.

`gserve_core.process.nursery` explains nurseries, and contains the other end.
"""

import contextlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from .. import lease
from ..command_launcher import LocalProcess
from ..errors import StartupTimeout
from ..host import processes
from ..host.child_process import KILL_SECONDS, UNKNOWN
from ..host.folders import NURSERY_LOG
from ..host.forks import call_in_child
from ..host.gpus import MPS_LOGS, MPS_PIPES, VISIBLE
from ..host.poll import readable
from ..host.process_groups import reap_group
from ..interfaces import Job

IMPORT_SECONDS = 600.0
"""Maximum time for the imports of a nursery, in seconds. From a slow network file system they take minutes."""
FORK_SECONDS = 10.0
"""Maximum time for a fork by a nursery that has forked before, in seconds."""
END_SECONDS = 1.0
"""Maximum time for a nursery to end after its socket was closed, in seconds. Then it is killed."""
REAP_SECONDS = 1.0
"""Maximum time for a nursery to report the exit code of an ended server, in seconds."""
IMPORTING = "importing modules, once for all servers"
"""Phase of a server whose nursery imports."""
PER_SERVER = {VISIBLE, MPS_PIPES, MPS_LOGS}
"""Environment variables that a nursery must not inherit from its first server."""
# Libraries would count the GPUs in the first one. The next server may have none of the others.


type Popen = Callable[..., subprocess.Popen[bytes]]
"""Starts a job as a local process. Accepts `stdin` and `stdout` too. Raises LaunchError."""


def _is_possible() -> bool:
    """Return whether this system can report the end of a process that is not our child (Linux 5.3)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class Nursery:
    """The nursery of a service. It is started when first needed, and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._id = ""
        self._lock = threading.Lock()
        self.has_forked = False
        call_in_child(self._close_socket)  # a fork that kept it open would hide our end from the nursery

    def fork(self, job: Job, popen: Popen) -> LocalProcess:
        """Request a forked server, and return it. It is forked as soon as its imports are done. Does not wait for it.

        `popen`: starts the nursery, with the job's own command. It also starts the server if it cannot be forked.

        Raises LaunchError.
        """
        if not _is_possible():
            return LocalProcess(popen(job))
        with self._lock:
            if self._socket is None or self._process is None or self._process.poll() is not None:
                self._start(job, popen)
            assert self._socket is not None
            with contextlib.ExitStack() as failed:  # closes all if there are too few descriptors
                stdin, write = _close_on_error(failed, os.pipe())
                read, stdout = _close_on_error(failed, os.pipe())
                channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                failed.callback(channel.close)
                with theirs, os.fdopen(os.memfd_create("order"), "wb", 0) as order, job.log.open("ab") as log:
                    order.write(json.dumps([list(job.command), dict(job.env), _folder()]).encode())
                    with contextlib.suppress(OSError):  # it has just died: `ForkedServer.poll` notices that
                        descriptors = [order.fileno(), stdin, stdout, log.fileno(), theirs.fileno()]
                        socket.send_fds(self._socket, [b"fork"], descriptors)
                failed.pop_all()
            fork = _Fork(channel, os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0))
            return ForkedServer(self, fork, job, lambda: popen(job, stdin=stdin, stdout=stdout), [stdin, stdout])

    def _start(self, job: Job, popen: Popen) -> None:
        self._release()
        self.has_forked, self._id = False, uuid.uuid4().hex
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            env = {name: value for name, value in job.env.items() if name not in PER_SERVER}
            command = [{"--lease": "--forks"}.get(word, word) for word in job.command]
            job = replace(
                job, name="the nursery", command=command, env=env | {processes.ID_VARIABLE: self._id},
                log=log_of(job),
            )  # fmt: skip
            job.log.touch(mode=0o600)
            self._process = popen(job, stdin=theirs, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """Kill a nursery that does not answer. The servers that wait for it are then started directly."""
        process, own = self._process, self._id
        if process is not None:
            process.kill()
            _kill_processes_of(own)

    def close(self) -> None:
        """End the nursery. The servers that it has forked continue. Idempotent. The nursery may be used again."""
        with self._lock:
            self._release()

    def _release(self) -> None:
        self._close_socket()
        if self._process is not None:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(KILL_SECONDS)
            _kill_processes_of(self._id)
            reap_group(self._process.pid)
            self._process = None

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _close_on_error(stack: contextlib.ExitStack, descriptors: tuple[int, int]) -> tuple[int, int]:
    """Make `stack` close the descriptors of a pipe, and return them."""
    for descriptor in descriptors:
        stack.callback(os.close, descriptor)
    return descriptors


def log_of(job: Job) -> Path:
    """Return the path of the log of a job's nursery."""
    return job.log.with_name(NURSERY_LOG)


def _kill_processes_of(nursery: str) -> None:
    """Kill all processes with the id of a nursery.

    Its imports started them, or they are forks that have not become a server.
    """
    for pid in processes.processes_of(nursery):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class _Fork:
    """A process that a nursery forks, like a `subprocess.Popen`. `pid` is 0 until it is a server.

    `channel` is a socket that receives these messages:
    "fork", from the nursery, with a descriptor of the process.
    "is", from the process once it is a server, with its id and a descriptor.
    "ended", from the nursery, with the exit code of the process.

    The socket closes when the nursery has ended. If neither "is" nor "ended" has come by then, the fork `is_lost`: it
    will never become a server.
    """

    def __init__(self, channel: socket.socket, stdin: io.FileIO, stdout: io.FileIO) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.pid = 0
        self.returncode: int | None = None
        self.is_lost = False
        self._channel = channel
        self._process = -1

    def poll(self) -> int | None:
        if self.returncode is None:
            self._receive(0.0)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise subprocess.TimeoutExpired("a forked server", timeout)
            self._receive(min(remaining, 1.0))
        return self.returncode

    def terminate(self) -> None:
        """Ask the process to end. A process without a descriptor here ends when its lease is closed."""
        if self._process >= 0:
            signal.pidfd_send_signal(self._process, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the process if it exists, and wait until it has ended."""
        if self.returncode is None:
            self._receive(0.0)
        if self.returncode is None and self._process >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(KILL_SECONDS)

    def close(self) -> None:
        """Close the socket and the descriptor. A process forked later ends at once, since the socket is closed."""
        self._channel.close()
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def _receive(self, seconds: float) -> None:
        """Receive one message within `seconds`, and record whether the process has ended."""
        channel = self._channel.fileno()
        ready = readable(seconds, channel, self._process)
        if channel not in ready and self._process in ready:
            ready = readable(REAP_SECONDS, channel)
            if channel not in ready:
                self.returncode = UNKNOWN
        if channel not in ready:
            return
        data, descriptors, *_ = socket.recv_fds(self._channel, 64, 1)
        word, _, number = data.decode().partition(" ")
        for descriptor in descriptors:
            if self._process < 0:
                self._process = descriptor
                os.set_inheritable(descriptor, False)
            else:
                os.close(descriptor)
        match word:
            case "fork":
                pass
            case "is":
                self.pid = int(number)
            case "ended":
                self.returncode = int(number)
            case _:
                self._channel.close()
                self.is_lost = not self.pid and self.returncode is None


class ForkedServer(LocalProcess):
    """A server that a nursery forks. If the nursery dies first, it is started directly.

    Implements `interfaces.Process`.

    `start`: starts the server directly.
    `pipes`: the server's ends of its stdin and stdout.
    """

    def __init__(
        self, nursery: Nursery, fork: _Fork, job: Job, start: Callable[[], "subprocess.Popen[bytes]"], pipes: list[int]
    ) -> None:
        super().__init__(cast("subprocess.Popen[bytes]", fork))
        self._nursery = nursery
        self._fork = fork
        self._start = start
        self._pipes = pipes
        self._job = job
        self._silence = lease.Silence(lease.CHECK_SECONDS)
        self._log_size = 0
        self._is_late = False

    def poll(self) -> int | None:
        """Return the exit code once the server has ended, else None. Starts it directly if its nursery has died."""
        code = super().poll()
        if self._fork.is_lost and self._popen is cast(object, self._fork):
            self._popen = self._start()
        if self.pid:
            self._close_pipes()
            self._nursery.has_forked = True
        return code

    def waiting(self) -> str | None:
        """Return the phase `IMPORTING`; None once the server runs.

        Raises StartupTimeout: there was no progress for `startup_timeout`.
        """
        if self.pid:
            return None
        limit, log = self._job.startup_timeout, log_of(self._job)
        with contextlib.suppress(OSError):
            if (size := log.stat().st_size) != self._log_size:
                self._log_size = size
                self._silence.reset()
        silent = self._silence.update()
        if limit is not None and silent > limit:
            self._is_late = True
            raise StartupTimeout(
                f"{self._job.name} showed no progress for {limit:g} s (startup_timeout) while {IMPORTING};"
                f" its log: {log}",
                log=log,
            )
        if silent > (FORK_SECONDS if self._nursery.has_forked else IMPORT_SECONDS):
            self._nursery.kill()
        return IMPORTING

    def why(self) -> str | None:
        """Return why the exit code is unknown, if it is. The exit code is meaningless then."""
        if self._fork.returncode == UNKNOWN:
            return "its process has ended, and the nursery that forked it did not report the exit code"
        return super().why()

    def stop(self, grace: float) -> int:
        """End the process group, and return the exit code. Kills the group after `grace` seconds."""
        self._close_pipes()
        if self.pid:
            code = super().stop(grace)
            self._fork.close()
            return code
        if self._is_late:
            self._nursery.kill()
        self._fork.kill()
        self._fork.close()
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.stdout.close()
        self.resources.close()
        return self._fork.returncode or -signal.SIGTERM

    def _close_pipes(self) -> None:
        while self._pipes:
            os.close(self._pipes.pop())


def _folder() -> str:
    """Return the working directory, or "." if it was removed."""
    try:
        return str(Path.cwd())
    except OSError:
        return "."
