"""The lease: one line between a server and its owner, over the server process's own stdin and stdout.

Both directions carry JSON, a message a line. Down: first the config with its secrets, then a heartbeat every few
seconds, at last `stop` or `drain`. Up: where the server listens, its phases, that it is ready, that it failed and why,
that it has stopped. This works alike through a pipe, `srun`, or any other prefix that forwards stdin and stdout.

When the line ends, the owner is gone, and the server ends itself with every process of its group. A line to another
machine can be cut without an end: there, and only there, the server also ends when no heartbeat comes for `Hello.ttl`.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import IO, Any

import msgspec
from msgspec import Struct

from .config import LLMConfig
from .interfaces import Address, EngineInfo

BEAT = 5.0
"""Seconds between two heartbeats of the owner."""
TTL = 60.0
"""`Hello.ttl` of a line that can be cut without an end, in seconds."""
GREETING_SECONDS = 600.0
"""Seconds that a server waits for its hello. The owner may be stopped; its end is noticed at once."""
GRACE = 3.0
"""Seconds that a server whose owner is dead gives its engine to end by itself."""
LAST_WILL_SECONDS = 1.0
"""Seconds for which the group's end waits for what is to be done before."""
PULSE = 2.0
"""Seconds between two signs that the event loop of a ready server turns; less where `stall_timeout` is short."""
LOOK = 1.0
"""Seconds between two looks of a watchdog, and between two tries to send what did not fit into a pipe."""
_LONGEST_LINE = 1 << 20


class Hello(Struct, frozen=True, tag="hello"):
    """The first line down: who the server is, what it asks for, and its whole config, secrets included.

    `control`: see `interfaces.Access`. `ttl`: seconds without a heartbeat after which the owner counts as dead; None:
    only the end of the line says so. `llm`, `engine`, `transport` (sections of a config), `plugins` and `folder` (where
    they lie): None means that they stand in the server's command. `stall_timeout`, `share_gpu`: see `ServeConfig`.
    `umask` and `limits` (soft and hard, by the number of the resource): what the process is to have.
    """

    instance: str
    token: str
    control: str | None = None
    ttl: float | None = None
    stall_timeout: float | None = None
    share_gpu: bool | None = None
    llm: LLMConfig | None = None
    engine: dict[str, Any] | None = None
    transport: dict[str, Any] | None = None
    plugins: list[str] | None = None
    folder: str | None = None
    umask: int | None = None
    limits: dict[int, tuple[int, int]] = {}


class Beat(Struct, frozen=True, tag="beat"):
    """The owner is alive."""


class Drain(Struct, frozen=True, tag="drain"):
    """Finish what you have within `seconds`, take no more, then stop. None: a time that the server chooses.

    A second one changes the time of the first.
    """

    seconds: float | None = None


class Stop(Struct, frozen=True, tag="stop"):
    """Stop now."""


class Listening(Struct, frozen=True, tag="listening"):
    """The server's socket is open there."""

    address: Address


class Phase(Struct, frozen=True, tag="phase"):
    """What a starting server is doing."""

    text: str


class Ready(Struct, frozen=True, tag="ready"):
    """The engine has made its first token."""

    info: EngineInfo


class Pulse(Struct, frozen=True, tag="pulse"):
    """The server's event loop turns.

    finished: how many items it has finished. alone: it works on nothing but items of which one may kill servers.
    """

    finished: int = 0
    alone: bool = False


class Failed(Struct, frozen=True, tag="failed"):
    """The server ends because of this."""

    cause: str


class Stopped(Struct, frozen=True, tag="stopped"):
    """The server ends as it was asked to."""


type Down = Hello | Beat | Drain | Stop
type Up = Listening | Phase | Ready | Pulse | Failed | Stopped

_down: "msgspec.json.Decoder[Down]" = msgspec.json.Decoder(Down)
_up: "msgspec.json.Decoder[Up]" = msgspec.json.Decoder(Up)


class Silence:
    """Seconds without a sign of life, as a watchdog counts them that looks every `pause` seconds.

    They count only while the watchdog runs. A process may be stopped for minutes (a signal, a suspended job, a laptop
    that is closed), and its clock goes on: so each look adds at most two pauses.
    """

    def __init__(self, pause: float) -> None:
        self._most = 2 * pause
        self._looked = time.monotonic()
        self.seconds = 0.0

    def look(self) -> float:
        """Return the seconds until now."""
        now = time.monotonic()
        self.seconds += min(now - self._looked, self._most)
        self._looked = now
        return self.seconds

    def end(self) -> None:
        """Begin to count again: there was a sign."""
        self._looked = time.monotonic()
        self.seconds = 0.0


class Lines:
    """Cuts what comes from a descriptor into lines."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._rest = b""

    def read(self, timeout: float) -> list[bytes] | None:
        """Return the lines that came within `timeout` seconds; None at the end of the stream."""
        waiting = select.poll()  # `select.select` knows no descriptor above 1023
        waiting.register(self.fd, select.POLLIN)
        if not waiting.poll(math.ceil(max(0.0, timeout) * 1000)):
            return []
        try:
            chunk = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not chunk:
            return None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            self._rest = b""
        return lines


class OwnerEnd:
    """The owner's end. The heartbeats are sent by a thread of this process that does nothing else."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes], hello: Hello) -> None:
        self._stdin = stdin
        self._lines = Lines(stdout.fileno())
        self._outgoing: deque[bytes] = deque()
        self._next_beat = time.monotonic() + BEAT
        self._sending = threading.Lock()  # held over a write that cannot block
        self._is_silent = False
        os.set_blocking(stdin.fileno(), False)  # a server that does not read must not hold us up
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        self.send(hello)
        _HEART.add(self)

    def send(self, message: Down) -> None:
        """Send a message, or as much as fits now; the rest follows. Never blocks, never raises; from any thread.

        A signal handler may call it too: so a send never waits for another one, which sends on its behalf.
        """
        self._outgoing.append(encoded(message))
        self._flush()

    def beat(self) -> bool:
        """Send what has not fitted yet, and a heartbeat when it is time; return False where nobody listens any more."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            if not self._outgoing:
                self._outgoing.append(encoded(Beat()))
        self._flush()
        return not self._is_silent

    def _flush(self) -> None:
        while self._outgoing and self._sending.acquire(blocking=False):
            try:
                if not self._write():
                    return
            finally:
                self._sending.release()

    def _write(self) -> bool:
        """Write all that is to be sent; return False where not all of it fits now."""
        try:
            while self._outgoing and not self._is_silent:
                written = os.write(self._stdin.fileno(), self._outgoing[0])
                if written < len(self._outgoing[0]):
                    self._outgoing[0] = self._outgoing[0][written:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            return False
        except (OSError, ValueError):  # the server has ended, or the pipe is closed
            self._is_silent = True
        if self._is_silent:
            self._outgoing.clear()
        return True

    def receive(self, timeout: float) -> list[Up] | None:
        """Return what the server said within `timeout` seconds; None when it has closed its end."""
        lines = self._lines.read(timeout)
        if lines is None:
            return None
        messages = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # a login script's greeting, and such
                messages.append(_up.decode(line))
        return messages

    def silence(self) -> None:
        """Send nothing more. To be called before anybody else closes the pipe, whose number may be another's then."""
        with self._sending:
            self._is_silent = True
        _HEART.remove(self)

    def close(self) -> None:
        """Give the lease up: a server that still runs ends itself. Idempotent."""
        self.silence()
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()

    def _forget(self) -> None:
        """Close the line in a forked child: while it held the line open, the end of the owner would not be noticed."""
        self._is_silent = True  # without the lock, which another thread may have held for ever
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()


class _Heart:
    """The thread that sends the heartbeats of all leases of this process, and does nothing else."""

    def __init__(self) -> None:
        os.register_at_fork(after_in_child=self._reset)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # held for a moment, over nothing that waits
        self._ends: set[OwnerEnd] = set()
        self._thread: threading.Thread | None = None

    def add(self, end: OwnerEnd) -> None:
        """Keep a lease alive until `remove`."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
                thread.start()  # raises where there can be no more threads: the next one tries it again
                self._thread = thread
            self._ends.add(end)

    def remove(self, end: OwnerEnd) -> None:
        """Send nothing more for a lease."""
        with self._lock:
            self._ends.discard(end)

    def _beat(self) -> None:
        while True:
            time.sleep(LOOK)
            with self._lock:
                ends = list(self._ends)
                if not ends:
                    self._thread = None
                    return
            for end in ends:
                if not end.beat():
                    self.remove(end)
            del end, ends


_HEART = _Heart()


class ServerEnd:
    """The server's end. Takes over stdin and stdout: what prints to stdout goes to stderr from then on.

    Two threads serve it, which do nothing else: one reads, and one writes, since the owner may have stopped reading.
    """

    def __init__(self) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        is_terminal = os.isatty(0)
        self._lines = Lines(os.dup(0))  # both are private: `dup` makes them close when a program is executed
        self._up = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)  # so that the whole group is ours to end
        self._sent = threading.Condition()
        self._outgoing: deque[Up] = deque()
        self._is_sending = False
        self._inherited = [self._lines.fd, self._up]
        os.register_at_fork(after_in_child=self._forget)
        self._unheard: list[Down] = []
        self._handlers: tuple[Callable[[Down], object], Callable[[], object]] | None = None
        self._hearing = threading.Lock()
        self.last_will: Callable[[], object] = lambda: None
        """What is done as soon as the owner is gone: it may be that this process is killed next."""
        self.hello = self._greeting(0.0 if is_terminal else GREETING_SECONDS)
        threading.Thread(target=self._watch, name="lease", daemon=True).start()
        threading.Thread(target=self._send, name="lease-sender", daemon=True).start()

    def _forget(self) -> None:
        """Close the line in a forked child: while it held the line open, its end would not be noticed.

        Once: to what the child itself forks, these numbers are files of the child's own.
        """
        while self._inherited:
            os.close(self._inherited.pop())

    def _greeting(self, patience: float) -> Hello:
        silence = Silence(LOOK)
        while silence.look() <= patience:
            lines = self._lines.read(min(LOOK, patience))
            if lines is None:
                break
            messages = decoded(lines)
            for place, message in enumerate(messages):
                if isinstance(message, Hello):
                    self._unheard = messages[place + 1 :]
                    return message
        sys.exit("gserve: --lease was given, but no owner speaks on stdin; leave it out to start a server by hand")

    def tell(self, message: Up) -> None:
        """Have the owner told. Never waits, never raises: an owner that is gone is noticed by `watch`."""
        with self._sent:
            if isinstance(message, Pulse) and self._outgoing and isinstance(self._outgoing[-1], Pulse):
                self._outgoing.pop()  # the latest says all
            self._outgoing.append(message)
            self._sent.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until the owner has been told all, so many seconds at most."""
        with self._sent:
            self._sent.wait_for(lambda: not self._outgoing and not self._is_sending, seconds)

    def _send(self) -> None:
        """Be the thread that writes."""
        while True:
            with self._sent:
                self._is_sending = False
                self._sent.notify_all()
                self._sent.wait_for(lambda: self._outgoing)
                data = b"".join(map(encoded, self._outgoing))
                self._outgoing.clear()
                self._is_sending = True
            try:
                while data:
                    data = data[os.write(self._up, data) :]
            except OSError:  # nobody reads any more
                continue

    def watch(self, on_message: Callable[[Down], object], on_lost: Callable[[], object]) -> None:
        """Have what the owner says passed on, from the thread of the lease, and first what it has said so far.

        When the owner is gone, `on_lost` is called; the group is killed `GRACE` seconds later, whatever it does. An
        owner that is gone before `watch` is noticed too: there is nothing to end in order yet, so the group is killed.
        """
        with self._hearing:
            self._handlers = on_message, on_lost
            self._pass_on([])

    def _watch(self) -> None:
        """Be the thread that reads."""
        ttl = self.hello.ttl
        silence = Silence(LOOK)
        while (lines := self._lines.read(LOOK)) is not None:
            if lines:
                silence.end()
                with self._hearing:
                    self._pass_on(decoded(lines))
            elif ttl is not None and silence.look() > ttl:
                break
        will = threading.Thread(target=self.last_will, daemon=True)
        with contextlib.suppress(RuntimeError):  # there can be no more threads: the end matters more
            will.start()
        if self._handlers is not None:
            with contextlib.suppress(Exception):
                self._handlers[1]()
            time.sleep(GRACE)
        if will.is_alive():
            will.join(LAST_WILL_SECONDS)
        end_group()

    def _pass_on(self, messages: list[Down]) -> None:
        self._unheard += messages
        if self._handlers is not None:
            unheard, self._unheard = self._unheard, []
            for message in unheard:
                with contextlib.suppress(RuntimeError):  # the server's event loop is closed: it is at its end
                    self._handlers[0](message)


def encoded(message: Down | Up) -> bytes:
    """Return the line that is sent for a message."""
    return msgspec.json.encode(message) + b"\n"


def decoded(lines: list[bytes]) -> list[Down]:
    """Return the messages to a server that the lines hold; what is none is passed over."""
    messages = []
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            messages.append(_down.decode(line))
    return messages


def end_group() -> None:
    """Kill this process and every other one of its group, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
