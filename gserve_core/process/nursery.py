"""The nursery: a process that imports the modules that servers need, and forks a server on each request.

Importing vLLM takes most of a server's start. A nursery does it once for all servers of a service, and for every
restart. A forked server is a server like any other. It leads a session of its own, and has its own environment, log,
lease and GPUs. It continues when the nursery dies. A server requested while the nursery is dead or hangs is started
without it.

A process with threads must be forked with care: a lock that a thread holds stays locked in the child for ever. So a
nursery has no other Python thread when it forks. It has no event loop and has touched no GPU. The imported libraries
have a thread pool or two. These threads have had no work yet, and so hold no lock.

A server may have a place of its own, such as a step of a SLURM job. A nursery then runs in that place
(`run_in_place`). It forks the server there, and forks it again after it has died, so that the place is kept.

The owner's end is in `gserve_core.service.nursery`.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from .. import lease
from ..host import processes, scratch
from ..host.control_group import memory_kills
from ..host.poll import readable
from ..host.process_groups import GROUP_GRACE, end_group, kill_group

END = b"end"
"""Order of the owner to a nursery in a server's place: kill the server."""
TTL_SHARE = 2 / 3
"""Part of the lease's timeout after which a nursery without a server treats its owner as gone."""
END_SECONDS = 10.0
"""Maximum time for a server to end after its owner is gone, or for the owner to accept a line, in seconds."""
LONGEST_BACKLOG = 8 << 20
"""Maximum size of the data queued for a server that does not read, in bytes. Heartbeats beyond it are dropped."""
END_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that order a server to end."""


def run_nursery(prepare: Callable[[], object]) -> list[str]:
    """Run the nursery of the owner at the other end of stdin: run `prepare`, then fork a server on each request.

    Returns only in the forked servers, with the arguments of their command. The nursery itself ends when its owner
    ends.
    """
    _set_title(["gserve", "nursery", *sys.argv[1:]])
    owner = socket.socket(fileno=os.dup(0))  # `dup` makes it close-on-exec: imports execute programs
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _import(prepare, owner.fileno())
    children: dict[int, tuple[int, socket.socket]] = {}
    waiting = select.poll()
    waiting.register(owner, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready in children:
                pid, channel = children.pop(ready)
                waiting.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with channel, contextlib.suppress(OSError):
                    channel.send(f"ended {code}".encode(), socket.MSG_DONTWAIT)
                continue
            data, descriptors, *_ = socket.recv_fds(owner, 64, 5)
            if not data:
                os._exit(0)
            *order, theirs = descriptors
            channel = socket.socket(fileno=theirs)
            if not (pid := _fork()):
                owner.close()
                for descriptor, (_, other) in children.items():
                    os.close(descriptor)
                    other.close()
                return _become_server(order, channel)
            for descriptor in order:
                os.close(descriptor)
            child = os.pidfd_open(pid)
            with contextlib.suppress(OSError):
                socket.send_fds(channel, [f"fork {pid}".encode()], [child], socket.MSG_DONTWAIT)
            children[child] = pid, channel
            waiting.register(child, select.POLLIN)


def run_in_place(prepare: Callable[[], object]) -> list[str]:
    """Run a nursery in a server's place: run `prepare`, then fork a server for each hello.

    Stdin and stdout are the lease of each of these servers in turn. When a server has died and nothing remains of it,
    "ended INSTANCE CODE" is sent up, and the next hello is accepted. The nursery ends with the server's exit code if no
    other server may follow:

    - The server ended in order.
    - A signal ordered the end.
    - The owner is gone.
    - Processes of the server remain although they were killed.
    - The system killed the server for lack of memory. The scheduler must learn of that.

    Returns only in the servers, with the arguments of their command.
    """
    _set_title(["gserve", "nursery", *sys.argv[1:]])
    down, up = os.dup(0), os.dup(1)  # `dup` makes both close-on-exec: imports execute programs
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    os.write(up, lease.encode(lease.Phase("importing modules, once for all restarts")))
    _import(prepare, down)
    return _Place(down, up).run()


class _Place:
    """The place of a server, kept by `run` when the server dies. `down` and `up` are the connection to the owner."""

    def __init__(self, down: int, up: int) -> None:
        self._down = down
        self._up = up
        self._lines = lease.Lines(down)
        self._silence = lease.Silence(lease.CHECK_SECONDS)
        self._ttl: float | None = lease.HELLO_SECONDS
        self._is_last = False
        self._pid = 0
        self._instance = ""
        self._stdin = -1
        self._outgoing = b""
        """Data for the server that it has not read yet."""
        self._kills: int | None = None
        self._code = 0
        self._signals, self._signalled = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled)
        for number in (signal.SIGCHLD, *END_SIGNALS):
            signal.signal(number, lambda *_: None)  # signals are read from the pipe

    def run(self) -> list[str]:
        """Follow the owner's orders and watch the servers. Returns only in a server: the arguments of its command."""
        while True:
            ready = readable(
                lease.CHECK_SECONDS, self._signals, self._down, writable=self._stdin if self._outgoing else -1
            )
            if self._signals in ready:
                self._handle_signals()
            if self._down in ready:
                for line in self._read_lines():
                    if self._handle_line(line):
                        return sys.argv[1:]
            self._flush()
            self._check_timeouts()

    def _check_timeouts(self) -> None:
        silent, ttl = self._silence.update(), math.inf if self._ttl is None else self._ttl
        if not self._pid:
            if self._is_last or silent > ttl * TTL_SHARE:
                self._end()
        elif silent > (END_SECONDS if self._down < 0 else ttl + END_SECONDS):
            kill_group(self._pid)  # it should have ended by now

    def _handle_signals(self) -> None:
        numbers = os.read(self._signals, 64)
        if any(number in END_SIGNALS for number in numbers):
            self._is_last = True
            self._send_line(lease.encode(lease.Drain()))  # a scheduler may signal only this process, or the server too
        if self._pid and signal.SIGCHLD in numbers:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._handle_exit(os.waitstatus_to_exitcode(status))

    def _read_lines(self) -> list[bytes]:
        """Return the lines from the owner.

        At the end of the connection, close the server's stdin, so that it ends itself.
        """
        self._silence.reset()
        lines = self._lines.read(0)
        if lines is None:
            os.close(self._down)
            self._down, self._is_last = -1, True
            self._close_stdin()
            return []
        return lines

    def _handle_line(self, line: bytes) -> bool:
        """Follow a line from the owner, or pass it to the server; return True in a server that it forks."""
        if not self._pid:
            hello = next((it for it in lease.decode([line]) if isinstance(it, lease.Hello)), None)
            return hello is not None and self._begin(hello, line)
        if line == END:
            kill_group(self._pid)
        else:
            self._send_line(line + b"\n")
        return False

    def _begin(self, hello: lease.Hello, line: bytes) -> bool:
        """Fork a server and pass the hello to it; return True in the server."""
        stdin, self._stdin = os.pipe()
        if not (pid := _fork()):
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *END_SIGNALS):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (self._down, self._stdin, self._signals, self._signalled):
                os.close(descriptor)
            _become([sys.executable, *sys.argv], {processes.ID_VARIABLE: hello.instance}, [stdin, self._up, os.dup(2)])
            return True
        os.close(stdin)
        os.set_blocking(self._stdin, False)  # a server that does not read must not block the nursery
        self._pid, self._instance, self._kills = pid, hello.instance, memory_kills()
        self._ttl = hello.ttl
        self._send_line(line + b"\n")
        return False

    def _send_line(self, line: bytes) -> None:
        """Send a line to the server, if there is one, as soon as it reads."""
        if self._stdin >= 0 and len(self._outgoing) < LONGEST_BACKLOG:
            self._outgoing += line
            self._flush()

    def _flush(self) -> None:
        if self._stdin >= 0 and self._outgoing:
            try:
                self._outgoing = self._outgoing[os.write(self._stdin, self._outgoing) :]
            except BlockingIOError:
                pass
            except OSError:  # it no longer reads
                self._outgoing = b""

    def _close_stdin(self) -> None:
        self._outgoing = b""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def _handle_exit(self, code: int) -> None:
        """Remove everything that a server left when it ended, and report its end to the owner.

        Ends this process if no other server may follow.
        """
        self._close_stdin()
        end_group(self._pid, GROUP_GRACE)
        unkillable = processes.end_processes_of(self._instance)
        scratch.remove(scratch.path_of(self._instance))
        self._pid, self._code = 0, code
        if not code or unkillable or memory_kills() != self._kills:
            self._end()
        if not self._is_last:
            try:
                if self._up not in readable(END_SECONDS, writable=self._up):
                    self._end()
                os.write(self._up, f"ended {self._instance} {code}\n".encode())
            except OSError:
                self._end()
            self._silence.reset()

    def _end(self) -> NoReturn:
        """End this process with the exit code of the last server."""
        os._exit(self._code if self._code >= 0 else 128 - self._code)


def _import(prepare: Callable[[], object], descriptor: int) -> None:
    """Run `prepare`. If the owner at the other end of `descriptor` goes away during it, end this process."""
    gc.disable()  # imports make no garbage, and collections take a tenth of their time
    with _exit_when_closed(descriptor):
        prepare()
    gc.enable()
    gc.collect()
    gc.freeze()  # collections skip these objects, so that servers share their memory


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads: see the module's docstring
        return os.fork()


@contextlib.contextmanager
def _exit_when_closed(descriptor: int) -> Iterator[None]:
    """End this process if the other end of `descriptor` is closed during the block.

    The thread that watches it is gone after the block.
    """
    over, end = os.pipe()

    def watch() -> None:
        waiting = select.poll()
        waiting.register(descriptor, 0)  # `poll` always reports a broken connection
        waiting.register(over, 0)
        if descriptor in dict(waiting.poll()):
            os._exit(0)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        os.close(end)
        watching.join()
        os.close(over)


def _become_server(received: Sequence[int], channel: socket.socket) -> list[str]:
    """Turn this process into the one that its command would have started; return the arguments of the command.

    received: descriptors of the order, stdin, stdout and the log.
    """
    order, *streams = received
    with os.fdopen(order, "rb") as file:
        file.seek(0)
        command, env, folder = json.load(file)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    _become(command, env, streams)
    me = os.getpid()
    with channel:
        try:
            socket.send_fds(channel, [f"is {me}".encode()], [os.pidfd_open(me)])
        except OSError:  # its requester is gone
            os._exit(1)
    return sys.argv[1:]


def _become(command: Sequence[str], env: Mapping[str, str], streams: Sequence[int]) -> None:
    """Give this process a command, a session, more environment and other streams.

    env: variables to add to the environment.
    streams: descriptors of stdin, stdout and stderr.
    """
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ |= env
    sys.argv = list(command[1:])
    _set_title(command)
    _set_id(env[processes.ID_VARIABLE])


def _set_title(command: Sequence[str]) -> None:
    """Make `ps` show another command for this process. A command longer than the original one is cut.

    A shorter one is padded with spaces. The size stays the same, so that vLLM can name its processes in this memory.
    """
    start, end = _memory("arguments")
    size = end - start - 1
    shown = b"\0".join(map(os.fsencode, command))[:size].ljust(size)
    ctypes.memmove(start, shown + b"\0", size + 1)


def _set_id(instance: str) -> None:
    """Make /proc show the id of this process in place of the nursery's, which has the same length."""
    start, end = _memory("environment")
    mark = f"{processes.ID_VARIABLE}=".encode()
    place = ctypes.string_at(start, end - start).index(mark) + len(mark)
    ctypes.memmove(start + place, instance.encode(), len(instance))


def _memory(what: Literal["arguments", "environment"]) -> tuple[int, int]:
    """Return the start and end address of the arguments or environment that /proc shows of this process.

    The kernel put them there at the start of the process. They are `arg_start` to `env_end` in proc(5), /proc/PID/stat.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    place = {"arguments": 45, "environment": 47}[what]
    return int(fields[place]), int(fields[place + 1])
