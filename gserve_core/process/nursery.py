"""The nursery: a process that has imported what servers need, and forks one whenever it is wanted.

Importing vLLM is most of a server's start. A nursery does it once for all servers of a service, and for every restart.
What it forks is a server like any other: it leads a session of its own, and has its own environment, log, lease and
GPUs. It goes on when the nursery dies; a server that is wanted then, or while the nursery hangs, is started plainly.

A process that has threads is forked with care, since a lock that one of them holds stays locked in the child for ever.
So when a nursery forks it has no other thread of Python's; it has no event loop and has touched no GPU. The threads of
the libraries that it has imported, a pool or two, have had no work yet, and so hold no lock.

Where a server has a place of its own, as a step of a SLURM job, a nursery stands in that place (`stay`): it forks the
server there, and forks it again when it has died, so that the place is not given up.

The owner's end stands in `gserve_core.service.nursery`.
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

from .. import diagnosis, lease
from ..commands import FAREWELL, end_group, kill_group
from ..host import folders, processes
from ..host.processes import readable

END = b"end"
"""What the owner says to a nursery in a server's place: kill the server."""
SHARE = 2 / 3
"""Part of the lease's time limit after which a nursery without a server takes its owner for gone."""
PARTING = 10.0
"""Seconds that a server has to end by itself when its owner is gone, or the owner to take a line."""
LONGEST_BACKLOG = 8 << 20
"""Bytes that may wait for a server that does not read; heartbeats beyond them are dropped."""
ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that tell a server to end."""


def tend(prepare: Callable[[], object]) -> list[str]:
    """Be the nursery whose owner is at the other end of stdin: run `prepare`, then fork whenever it is asked to.

    Returns in every server that it forks, with the arguments of its command. In the nursery it does not return: that
    ends when its owner does.
    """
    _show(["gserve", "nursery", *sys.argv[1:]])
    line = socket.socket(fileno=os.dup(0))  # the dup is not for programs that are executed, as imports do
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _import(prepare, line.fileno())
    children: dict[int, tuple[int, socket.socket]] = {}
    waiting = select.poll()
    waiting.register(line, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready in children:
                pid, talk = children.pop(ready)
                waiting.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with talk, contextlib.suppress(OSError):
                    talk.send(f"ended {code}".encode(), socket.MSG_DONTWAIT)
                continue
            said, descriptors, *_ = socket.recv_fds(line, 64, 5)
            if not said:
                os._exit(0)
            *order, theirs = descriptors
            talk = socket.socket(fileno=theirs)
            if not (pid := _fork()):
                line.close()
                for descriptor, (_, other) in children.items():
                    os.close(descriptor)
                    other.close()
                return _become_server(order, talk)
            for descriptor in order:
                os.close(descriptor)
            child = os.pidfd_open(pid)
            with contextlib.suppress(OSError):
                socket.send_fds(talk, [f"fork {pid}".encode()], [child], socket.MSG_DONTWAIT)
            children[child] = pid, talk
            waiting.register(child, select.POLLIN)


def stay(prepare: Callable[[], object]) -> list[str]:
    """Be the nursery that stands in a server's place: run `prepare`, then fork the server for whoever says hello.

    Stdin and stdout are the lease of each of these servers in turn. When one has died, and nothing is left of it,
    "ended INSTANCE CODE" goes up, and another may be greeted. This process ends, with the server's exit code, where
    there is to be no other: the server has ended in order, a signal has told it to, the owner is gone; or the system
    has killed it for want of memory, of which a scheduler is to hear. Returns in every server, with the arguments of
    its command.
    """
    _show(["gserve", "nursery", *sys.argv[1:]])
    down, up = os.dup(0), os.dup(1)  # neither is for programs that are executed, as imports do
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    os.write(up, lease.encoded(lease.Phase("importing, once for all lives of the server")))
    _import(prepare, down)
    return _Place(down, up).hold()


class _Place:
    """The place of a server, which `hold` keeps when that dies. `down` and `up` are the line to the owner."""

    def __init__(self, down: int, up: int) -> None:
        self._down = down
        self._up = up
        self._lines = lease.Lines(down)
        self._silence = lease.Silence(lease.LOOK)
        self._ttl: float | None = lease.GREETING_SECONDS
        self._is_last = False
        self._pid = 0
        self._instance = ""
        self._stdin = -1
        self._outgoing = b""
        """What the server is to be told, and does not read yet."""
        self._kills: int | None = None
        self._code = 0
        self._signals, self._signalled = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(self._signalled, False)
        signal.set_wakeup_fd(self._signalled)
        for number in (signal.SIGCHLD, *ENDING):
            signal.signal(number, lambda *_: None)  # what comes is read from the pipe

    def hold(self) -> list[str]:
        """Do what the owner says, and see to the servers. Returns in every server: the arguments of its command."""
        while True:
            ready = readable(lease.LOOK, self._signals, self._down, writable=self._stdin if self._outgoing else -1)
            if self._signals in ready:
                self._take_signals()
            if self._down in ready:
                for line in self._hear():
                    if self._obey(line):
                        return sys.argv[1:]
            self._flush()
            self._end_what_is_over()

    def _end_what_is_over(self) -> None:
        silent, ttl = self._silence.look(), math.inf if self._ttl is None else self._ttl
        if not self._pid:
            if self._is_last or silent > ttl * SHARE:
                self._end()
        elif silent > (PARTING if self._down < 0 else ttl + PARTING):
            kill_group(self._pid)  # it was to end by itself

    def _take_signals(self) -> None:
        numbers = os.read(self._signals, 64)
        if any(number in ENDING for number in numbers):
            self._is_last = True
            self._tell(lease.encoded(lease.Drain()))  # a scheduler may have told us alone, or the server too
        if self._pid and signal.SIGCHLD in numbers:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._bury(os.waitstatus_to_exitcode(status))

    def _hear(self) -> list[bytes]:
        """Return the lines that the owner has said. At its end the server ends, too, by itself."""
        self._silence.end()
        lines = self._lines.read(0)
        if lines is None:
            os.close(self._down)
            self._down, self._is_last = -1, True
            self._close_stdin()
            return []
        return lines

    def _obey(self, line: bytes) -> bool:
        """Do what a line says, or pass it on to the server; return True in a server that it begins."""
        if not self._pid:
            hello = next((it for it in lease.decoded([line]) if isinstance(it, lease.Hello)), None)
            return hello is not None and self._begin(hello, line)
        if line == END:
            kill_group(self._pid)
        else:
            self._tell(line + b"\n")
        return False

    def _begin(self, hello: lease.Hello, line: bytes) -> bool:
        """Fork a server, and pass the hello on to it; return True in the server."""
        stdin, self._stdin = os.pipe()
        if not (pid := _fork()):
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *ENDING):
                signal.signal(number, signal.SIG_DFL)
            for descriptor in (self._down, self._stdin, self._signals, self._signalled):
                os.close(descriptor)
            _become([sys.executable, *sys.argv], {processes.ID_VARIABLE: hello.instance}, [stdin, self._up, os.dup(2)])
            return True
        os.close(stdin)
        os.set_blocking(self._stdin, False)  # a server that does not read must not hold us up
        self._pid, self._instance, self._kills = pid, hello.instance, diagnosis.memory_kills()
        self._ttl = hello.ttl
        self._tell(line + b"\n")
        return False

    def _tell(self, line: bytes) -> None:
        """Say something to the server, where there is one, as soon as it reads."""
        if self._stdin >= 0 and len(self._outgoing) < LONGEST_BACKLOG:
            self._outgoing += line
            self._flush()

    def _flush(self) -> None:
        if self._stdin >= 0 and self._outgoing:
            try:
                self._outgoing = self._outgoing[os.write(self._stdin, self._outgoing) :]
            except BlockingIOError:
                pass
            except OSError:  # it does not listen any more
                self._outgoing = b""

    def _close_stdin(self) -> None:
        self._outgoing = b""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def _bury(self, code: int) -> None:
        """See that nothing is left of a server that has ended; tell the owner, where there may be another."""
        self._close_stdin()
        end_group(self._pid, FAREWELL)
        left = processes.end_processes_of(self._instance)
        folders.remove_scratch(folders.scratch_folder(self._instance))
        self._pid, self._code = 0, code
        if not code or left or diagnosis.memory_kills() != self._kills:
            self._end()
        if not self._is_last:
            try:
                if self._up not in readable(PARTING, writable=self._up):
                    self._end()
                os.write(self._up, f"ended {self._instance} {code}\n".encode())
            except OSError:
                self._end()
            self._silence.end()

    def _end(self) -> NoReturn:
        """End this process as the last server has ended."""
        os._exit(self._code if self._code >= 0 else 128 - self._code)


def _import(prepare: Callable[[], object], line: int) -> None:
    """Run `prepare`, unless the owner at the other end of `line` is gone meanwhile: then end this process."""
    with _ending_with(line):
        prepare()
    gc.collect()
    gc.freeze()  # no collection touches it any more, so that servers share the memory that it is in


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: see the top
        return os.fork()


@contextlib.contextmanager
def _ending_with(line: int) -> Iterator[None]:
    """End this process when the other end of `line` is closed, by a thread that is gone after the block."""
    over, end = os.pipe()

    def watch() -> None:
        waiting = select.poll()
        waiting.register(line, 0)  # a line that breaks is always told
        waiting.register(over, 0)
        if line in dict(waiting.poll()):
            os._exit(0)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        os.close(end)
        watching.join()
        os.close(over)


def _become_server(received: Sequence[int], talk: socket.socket) -> list[str]:
    """Make this process what it would be had it been started by its command; return the arguments of that.

    received: descriptors of the order, of stdin, stdout and the log.
    """
    order, *streams = received
    with os.fdopen(order, "rb") as file:
        file.seek(0)
        command, env, folder = json.load(file)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    _become(command, env, streams)
    me = os.getpid()
    with talk:
        try:
            socket.send_fds(talk, [f"is {me}".encode()], [os.pidfd_open(me)])
        except OSError:  # nobody wants it any more
            os._exit(1)
    return sys.argv[1:]


def _become(command: Sequence[str], env: Mapping[str, str], streams: Sequence[int]) -> None:
    """Give this process a command, more environment, a session and other streams: stdin, stdout and stderr."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ |= env
    sys.argv = list(command[1:])
    _show(command)
    _mark(env[processes.ID_VARIABLE])


def _show(command: Sequence[str]) -> None:
    """Let `ps` show another command for this process; one that is longer than that of its start is cut.

    A shorter one has spaces behind: where all is as it was, vLLM can name its processes in the same place.
    """
    start, end = _memory("arguments")
    size = end - start - 1
    shown = b"\0".join(map(os.fsencode, command))[:size].ljust(size)
    ctypes.memmove(start, shown + b"\0", size + 1)


def _mark(instance: str) -> None:
    """Let /proc show the id of this process in place of the nursery's, which is as long."""
    start, end = _memory("environment")
    mark = f"{processes.ID_VARIABLE}=".encode()
    place = ctypes.string_at(start, end - start).index(mark) + len(mark)
    ctypes.memmove(start + place, instance.encode(), len(instance))


def _memory(what: Literal["arguments", "environment"]) -> tuple[int, int]:
    """Return where in memory begins and ends what /proc shows of this process: where the kernel laid it at its start.

    These are `arg_start` to `env_end` in proc(5), /proc/PID/stat.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    place = {"arguments": 45, "environment": 47}[what]
    return int(fields[place]), int(fields[place + 1])
