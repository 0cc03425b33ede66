"""The lease: one line between a server and its owner, over the server process's own stdin and stdout.

Both directions carry JSON, a message a line. Down: first the secrets, then a beat every few seconds, at last `stop` or
`drain`. Up: where the server listens, its phases, that it is ready, that it failed and why, that it has stopped. When
the line ends or no beat comes for the lease's time, the owner is gone, and the server ends itself with every process of
its group. This works alike through a pipe, `srun`, or any other prefix that forwards stdin and stdout.
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
from collections.abc import Callable
from typing import IO, Any

import msgspec
from msgspec import Struct

from .interfaces import Address, EngineInfo

BEAT = 5.0
"""Seconds between two beats."""
TTL = 60.0
"""Seconds without a beat after which a server takes its owner for dead."""
GRACE = 3.0
"""Seconds that a server whose owner is dead gives its engine to end by itself."""
PULSE = 2.0
"""Seconds between two signs that the event loop of a ready server turns; less where `stall_timeout` is short."""
_LONGEST_LINE = 1 << 20


class Hello(Struct, frozen=True, tag="hello"):
    """The first line down: who the server is, what it asks for, and what must not stand in its command.

    `control`: see `interfaces.Access`. `secrets`: arguments by the section that they belong to, "llm", "engine" or
    "transport". `stall_timeout`: see `config.ServeConfig`.
    """

    instance: str
    token: str
    control: str | None = None
    secrets: dict[str, dict[str, Any]] = {}
    ttl: float = TTL
    stall_timeout: float | None = None


class Beat(Struct, frozen=True, tag="beat"):
    """The owner is alive."""


class Drain(Struct, frozen=True, tag="drain"):
    """Finish what you have, take no more, then stop. seconds: how long that may take; None: as long as by default."""

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
    """The server's event loop turns."""


class Failed(Struct, frozen=True, tag="failed"):
    """The server ends because of this."""

    cause: str


class Stopped(Struct, frozen=True, tag="stopped"):
    """The server ends as it was asked to."""


type Down = Hello | Beat | Drain | Stop
type Up = Listening | Phase | Ready | Pulse | Failed | Stopped

_down: "msgspec.json.Decoder[Down]" = msgspec.json.Decoder(Down)
_up: "msgspec.json.Decoder[Up]" = msgspec.json.Decoder(Up)


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
    """The owner's end. `receive` must be called again and again: it also sends the beats."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes], hello: Hello) -> None:
        self._stdin = stdin
        self._lines = Lines(stdout.fileno())
        self._outgoing = b""
        self._next_beat = time.monotonic() + BEAT
        self._lock = threading.Lock()
        os.set_blocking(stdin.fileno(), False)  # a server that does not read must not hold us up
        forget = weakref.WeakMethod(self.close)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        self.send(hello)

    def send(self, message: Down) -> None:
        """Send a message, or as much as fits now; the rest follows. Never blocks, never raises."""
        with self._lock:
            self._outgoing += encoded(message)
            self._flush()

    def _flush(self) -> None:
        try:
            self._outgoing = self._outgoing[os.write(self._stdin.fileno(), self._outgoing) :]
        except BlockingIOError:
            pass
        except (OSError, ValueError):  # the server has ended, or the pipe is closed
            self._outgoing = b""

    def receive(self, timeout: float) -> list[Up] | None:
        """Return what the server said within `timeout` seconds; None when it has closed its end."""
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT
            with self._lock:
                if self._outgoing:
                    self._flush()
            if not self._outgoing:
                self.send(Beat())
        lines = self._lines.read(timeout)
        if lines is None:
            return None
        messages = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # a login script's greeting, and such
                messages.append(_up.decode(line))
        return messages

    def close(self) -> None:
        """Give the lease up: a server that still runs ends itself.

        A forked child does so at once: while it held the line open, the end of the owner would not be noticed.
        """
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()


class ServerEnd:
    """The server's end. Takes over stdin and stdout: what prints to stdout goes to stderr from then on."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._lines = Lines(os.dup(0))  # both are private: `dup` makes them close when a program is executed
        self._up = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)  # so that the whole group is ours to end
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)
        self._unheard: list[Down] = []
        self._handlers: tuple[Callable[[Down], object], Callable[[], object]] | None = None
        self._hearing = threading.Lock()
        self.last_act: Callable[[], object] = lambda: None
        """What is done before the group is killed."""
        self.hello = self._greeting()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def _forget(self) -> None:
        """Close the line in a forked child: while it held the line open, its end would not be noticed."""
        os.close(self._lines.fd)
        os.close(self._up)

    def _greeting(self) -> Hello:
        deadline = time.monotonic() + TTL
        while time.monotonic() < deadline:
            lines = self._lines.read(deadline - time.monotonic())
            if lines is None:
                break
            messages = decoded(lines)
            for place, message in enumerate(messages):
                if isinstance(message, Hello):
                    self._unheard = messages[place + 1 :]
                    return message
        sys.exit("gserve: --lease was given, but no owner speaks on stdin; leave it out to start a server by hand")

    def tell(self, message: Up) -> None:
        """Tell the owner. Never raises: an owner that is gone is noticed by `watch`."""
        with self._lock, contextlib.suppress(OSError):
            os.write(self._up, encoded(message))

    def watch(self, on_message: Callable[[Down], object], on_lost: Callable[[], object]) -> None:
        """Have what the owner says passed on, from the thread of the lease, and first what it has said so far.

        When the owner is gone, `on_lost` is called; the group is killed `GRACE` seconds later, whatever it does. An
        owner that is gone before `watch` is noticed too: there is nothing to end in order yet, so the group is killed.
        """
        with self._hearing:
            self._handlers = on_message, on_lost
            self._pass_on([])

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            remaining = last + self.hello.ttl - time.monotonic()
            lines = self._lines.read(remaining)  # also when it is over: we may have been stopped, and not the owner
            if lines is None or (not lines and remaining <= 0):
                break
            if lines:
                last = time.monotonic()
                with self._hearing:
                    self._pass_on(decoded(lines))
        if self._handlers is not None:
            with contextlib.suppress(Exception):
                self._handlers[1]()
            time.sleep(GRACE)
        with contextlib.suppress(Exception):
            self.last_act()
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
