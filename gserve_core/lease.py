"""The lease: a connection between a server and its owner, over the stdin and stdout of the server's process.

Both directions carry JSON, one message a line. It works over a pipe, `srun`, or any other prefix that forwards stdin
and stdout.

- Down, to the server: first the config with its secrets, then regular heartbeats, at last `stop` or `drain`.
- Up, to the owner: the server's address, its phases, that it is ready, that it failed and why, that it stopped.

The end of the connection means that the owner is gone. The server then ends itself and every process of its group. A
connection to another machine can be cut without an end. Only there, the server also ends when no heartbeat comes for
`Hello.ttl` seconds.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Literal

import msgspec
from msgspec import Struct

from .config import LLMConfig
from .host.forks import call_in_child
from .interfaces import Address, EngineInfo
from .overview import Counters
from .pauses import OPEN, Gate, InFlight
from .weights import FIRST, ORIGINAL, Weights

HEARTBEAT_SECONDS = 5.0
"""Interval between two heartbeats of the owner, in seconds."""
TTL = 60.0
"""`Hello.ttl` of a connection that can be cut without an end, in seconds."""
HELLO_SECONDS = 600.0
"""Maximum wait of a server for its hello, in seconds. The owner may be suspended; its end is noticed at once."""
GRACE = 3.0
"""Time for the engine to stop after the owner is gone, in seconds. Then the server's group is killed."""
CLEANUP_SECONDS = 1.0
"""Maximum wait for `ServerEnd.start_cleanup` before the group is killed, in seconds."""
PULSE_SECONDS = 2.0
"""Maximum interval between two `Pulse` of a ready server, in seconds. It is shorter if `stall_timeout` is short."""
CHECK_SECONDS = 1.0
"""Interval between two checks of a watchdog, and between two retries of a write to a full pipe, in seconds."""
_LONGEST_LINE = 1 << 24
"""Maximum size of a message, in bytes. A `Transfer` names all tensors of a model."""
RANK_CAUSE = 600
"""Maximum length of a cause that a rank above 0 reports, in bytes. srun divides lines of more than 1,024 bytes."""


class Ranks(Struct, frozen=True):
    """The ranks of a server that runs on several nodes. All read the same messages, and rank 0 is the server.

    nodes: their number.
    variable, owner_variable, meeting_variable, meeting_option: `rank_variable` and the others of the launcher.
    """

    nodes: int
    variable: str
    owner_variable: str | None
    meeting_variable: str | None = None
    meeting_option: str = "serve.host"


class Hello(Struct, frozen=True, tag="hello"):
    """The first message to a server: its id, the secrets that it asks for, and its complete config with secrets.

    control: see `interfaces.Access`.
    ttl: maximum time without a heartbeat, in seconds. After it the owner counts as dead. None: no limit; only the end
    of the connection counts.
    llm, engine, transport: sections of a config. None: the server's command has it.
    plugins, folder: modules with plugins, and their folder. None: the server's command has it.
    stall_timeout, share_gpu: see `ServeConfig`.
    umask: the umask that the process must set.
    limits: the soft and hard limits that the process must set, by the number of the resource.
    ranks: the server runs on several nodes. None: on one.
    weights: those that it must have before it is ready.
    gate: whether it begins items.
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
    ranks: Ranks | None = None
    weights: Weights = ORIGINAL
    gate: Gate = OPEN


class Beat(Struct, frozen=True, tag="beat"):
    """The owner is alive."""


class Drain(Struct, frozen=True, tag="drain"):
    """Finish the admitted requests within `seconds`, accept no more, then stop.

    None: the server chooses the time. A second `Drain` changes the time of the first.
    """

    seconds: float | None = None


class Stop(Struct, frozen=True, tag="stop"):
    """Stop now."""


class SetAdapters(Struct, frozen=True, tag="set_adapters"):
    """Have exactly these LoRA adapters: their folders by name. The server answers with `AdaptersSet`.

    number: identifies the answer. A server that is not ready yet answers before it is.
    """

    number: int
    adapters: dict[str, str]


class AdaptersSet(Struct, frozen=True, tag="adapters_set"):
    """The server has the adapters of the message with this number; 0: those of its config.

    `faults`: why some could not be loaded, by name.
    """

    number: int
    faults: dict[str, str] = {}


class CheckWeights(Struct, frozen=True, tag="check_weights"):
    """Check that the files in `path` hold weights for this model. The server answers with `Answered`."""

    number: int
    path: str


class Pause(Struct, frozen=True, tag="pause"):
    """Begin no more items. The server answers with `Answered` once the engine computes none.

    in_flight: what happens to those in the engine.
    """

    number: int
    in_flight: InFlight = "finish"


class LoadWeights(Struct, frozen=True, tag="load_weights"):
    """Load these weights, and make a token with them. The server answers with `Answered`.

    A server that is not ready yet answers before it is. Another one must be paused.
    """

    number: int
    weights: Weights


class Transfer(Struct, frozen=True, tag="transfer"):
    """Take part in a step of a trainer's transfer of weights. The server answers with `Answered`.

    step: "init": connect to the trainer. "check": check the tensors of a part of the weights, and change nothing.
    "receive": pause, and receive that part. "finish": use all parts.
    info: what the trainer sends with the step. It is for the engine.
    version: that of the weights, for "finish".
    """

    number: int
    step: Literal["init", "check", "receive", "finish"]
    info: dict[str, Any] = {}
    version: str = FIRST


class Resume(Struct, frozen=True, tag="resume"):
    """Begin items again. It ends a `Pause` that has not been answered too."""


class SetGate(Struct, frozen=True, tag="set_gate"):
    """Begin items, or none: the last one counts. The server answers with `Answered`.

    One that opens the gate ends one in progress that closes it. A closed gate stays closed after a `Resume`.
    """

    number: int
    gate: Gate


class ResetCache(Struct, frozen=True, tag="reset_cache"):
    """Forget what the engine computed for earlier prompts. The server answers with `Answered`."""

    number: int


class Answered(Struct, frozen=True, tag="answered"):
    """The order with this number is done, or has failed: `fault` is the reason.

    `version`: that of the weights now. `gate`: the name of the gate now; see `Gate`.
    """

    number: int
    fault: str = ""
    version: str = FIRST
    gate: str = OPEN.name


class Listening(Struct, frozen=True, tag="listening"):
    """The server listens at `address`."""

    address: Address


class Meeting(Struct, frozen=True, tag="meeting"):
    """Where rank 0 waits for the other ranks. The owner passes this message on to all of them.

    host: an address of rank 0's node.
    port: a free port there, for the engine.
    open_port: the port at which rank 0 listens already.
    """

    host: str
    port: int
    open_port: int


class Phase(Struct, frozen=True, tag="phase"):
    """The phase of a starting server."""

    text: str


class Ready(Struct, frozen=True, tag="ready"):
    """The server is ready: its engine has made the first token or vector."""

    info: EngineInfo


class Pulse(Struct, frozen=True, tag="pulse"):
    """The server's event loop runs.

    finished: number of items that the server has finished.
    alone: whether the server works only on a request that must run alone. One of its items may crash servers.
    counters: its counters now. A `Pulse` that was not sent is not missed: the next one has later values.
    """

    finished: int = 0
    alone: bool = False
    counters: Counters = Counters()


class Failed(Struct, frozen=True, tag="failed"):
    """The server ends because of `cause`.

    follows: whether another rank has ended first. That rank may report its own cause.
    """

    cause: str
    follows: bool = False


class Stopped(Struct, frozen=True, tag="stopped"):
    """The server ends as ordered."""


type Order = SetAdapters | CheckWeights | Pause | LoadWeights | SetGate | ResetCache | Transfer
type Down = Hello | Beat | Drain | Stop | Meeting | Order | Resume
type Up = Listening | Meeting | Phase | Ready | Pulse | Failed | Stopped | AdaptersSet | Answered

_down: "msgspec.json.Decoder[Down]" = msgspec.json.Decoder(Down)
_up: "msgspec.json.Decoder[Up]" = msgspec.json.Decoder(Up)


class Silence:
    """Seconds without a sign of life, counted by a watchdog that checks every `pause` seconds.

    Time counts only while the watchdog runs. A process may be suspended for minutes: by a signal, with its job, or with
    a closed laptop. Its clock goes on, so each check adds at most two pauses.
    """

    def __init__(self, pause: float) -> None:
        self._max_step = 2 * pause
        self._updated_at = time.monotonic()
        self.seconds = 0.0

    def update(self) -> float:
        """Return the seconds without a sign of life until now."""
        now = time.monotonic()
        self.seconds += min(now - self._updated_at, self._max_step)
        self._updated_at = now
        return self.seconds

    def reset(self) -> None:
        """Restart the count after a sign of life."""
        self._updated_at = time.monotonic()
        self.seconds = 0.0


class Lines:
    """Splits the data of a descriptor into lines."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._rest = b""

    def read(self, timeout: float) -> list[bytes] | None:
        """Return the lines that arrive within `timeout` seconds; None at the end of the stream."""
        waiting = select.poll()  # `select.select` does not support descriptors above 1023
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
    """The owner's end of the lease. A dedicated thread of this process sends the heartbeats."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes], hello: Hello) -> None:
        self._stdin = stdin
        self._lines = Lines(stdout.fileno())
        self._outgoing: deque[bytes] = deque()
        self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        self._sending = threading.Lock()  # held during a write that cannot block
        self._is_stopped = False
        os.set_blocking(stdin.fileno(), False)  # a server that does not read must not block the owner
        call_in_child(self._close_in_child)
        self.send(hello)
        _HEARTBEATS.add(self)

    def send(self, message: Down) -> None:
        """Queue a message, and send as much as fits now; the rest follows later.

        Never blocks or raises. Any thread may call it, and a signal handler too. So a send never waits for another
        send, which sends this message as well.
        """
        self._outgoing.append(encode(message))
        self._flush()

    def send_heartbeat(self) -> bool:
        """Send the queued data, and a heartbeat if it is due; return False if the server no longer reads."""
        if time.monotonic() >= self._next_heartbeat:
            self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
            if not self._outgoing:
                self._outgoing.append(encode(Beat()))
        self._flush()
        return not self._is_stopped

    def _flush(self) -> None:
        while self._outgoing and self._sending.acquire(blocking=False):
            try:
                if not self._write():
                    return
            finally:
                self._sending.release()

    def _write(self) -> bool:
        """Write the queued data; return False if not all of it fits now."""
        try:
            while self._outgoing and not self._is_stopped:
                written = os.write(self._stdin.fileno(), self._outgoing[0])
                if written < len(self._outgoing[0]):
                    self._outgoing[0] = self._outgoing[0][written:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            return False
        except (OSError, ValueError):  # the server has ended, or the pipe is closed
            self._is_stopped = True
        if self._is_stopped:
            self._outgoing.clear()
        return True

    def receive(self, timeout: float) -> list[Up] | None:
        """Return the server's messages that arrive within `timeout` seconds; None if it has closed its end."""
        lines = self._lines.read(timeout)
        if lines is None:
            return None
        messages = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # such as a login script's greeting
                messages.append(_up.decode(line))
        return messages

    def stop_sending(self) -> None:
        """Send nothing more. Call it before other code closes the pipe: its number may then belong to another file."""
        with self._sending:
            self._is_stopped = True
        _HEARTBEATS.remove(self)

    def close(self) -> None:
        """Give up the lease: a server that still runs ends itself. Idempotent."""
        self.stop_sending()
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()

    def _close_in_child(self) -> None:
        """Close the connection in a forked child. An open copy there would hide the owner's end."""
        self._is_stopped = True  # without the lock, which another thread may have held at the fork
        with contextlib.suppress(OSError, ValueError):
            self._stdin.close()


class _Heartbeats:
    """A thread that sends the heartbeats of all leases of this process, and does nothing else."""

    def __init__(self) -> None:
        call_in_child(self._reset)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()  # held briefly, never during a wait
        self._ends: set[OwnerEnd] = set()
        self._thread: threading.Thread | None = None

    def add(self, end: OwnerEnd) -> None:
        """Send heartbeats for a lease until `remove`."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True)
                thread.start()  # raises if no thread can start: the next `add` tries again
                self._thread = thread
            self._ends.add(end)

    def remove(self, end: OwnerEnd) -> None:
        """Send no more heartbeats for a lease."""
        with self._lock:
            self._ends.discard(end)

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            with self._lock:
                ends = list(self._ends)
                if not ends:
                    self._thread = None
                    return
            for end in ends:
                if not end.send_heartbeat():
                    self.remove(end)
            del end, ends


_HEARTBEATS = _Heartbeats()


class ServerEnd:
    """The server's end of the lease. It takes over stdin and stdout: from then on, output to stdout goes to stderr.

    It has two dedicated threads. One reads and one writes, since the owner may have stopped reading.
    """

    def __init__(self) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()
        is_terminal = os.isatty(0)
        self._lines = Lines(os.dup(0))  # `dup` makes both close-on-exec
        self._up = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)  # so that `end_group` kills only this server's processes
        self._sent = threading.Condition()
        self._outgoing: deque[Up] = deque()
        self._is_sending = False
        self._inherited = [self._lines.fd, self._up]
        call_in_child(self._close_in_child)
        self._pending: list[Down] = []
        self._handlers: tuple[Callable[[Down], object], Callable[[], object]] | None = None
        self._handling = threading.Lock()
        self.start_cleanup: Callable[[], object] = lambda: None
        """Called as soon as the owner is gone. This process may be killed next."""
        self.hello = self._read_hello(0.0 if is_terminal else HELLO_SECONDS)
        self.rank = rank_of(self.hello.ranks)
        """The number of this process among those of its server."""
        threading.Thread(target=self._run_reader, name="lease", daemon=True).start()
        threading.Thread(target=self._run_writer, name="lease-sender", daemon=True).start()

    def _close_in_child(self) -> None:
        """Close the connection in a forked child. An open copy there would hide its end.

        Close it only once: in the children of that child, these numbers belong to other files.
        """
        while self._inherited:
            os.close(self._inherited.pop())

    def _read_hello(self, timeout: float) -> Hello:
        silence = Silence(CHECK_SECONDS)
        while silence.update() <= timeout:
            lines = self._lines.read(min(CHECK_SECONDS, timeout))
            if lines is None:
                break
            messages = decode(lines)
            for place, message in enumerate(messages):
                if isinstance(message, Hello):
                    self._pending = messages[place + 1 :]
                    return message
        sys.exit("gserve: --lease was given, but no owner is connected to stdin; omit it to start a server by hand")

    def send(self, message: Up) -> None:
        """Queue a message for the owner. Never waits or raises: `watch` notices an owner that is gone.

        A rank above 0 sends only why it failed. The server's state is that of rank 0.
        """
        if self.rank:
            if not isinstance(message, Failed):
                return
            cause = f"rank {self.rank} on {socket.gethostname()}: {message.cause}"
            message = Failed(cause.encode()[:RANK_CAUSE].decode(errors="ignore"))
        with self._sent:
            if isinstance(message, Pulse) and self._outgoing and isinstance(self._outgoing[-1], Pulse):
                self._outgoing.pop()  # the latest one is enough
            self._outgoing.append(message)
            self._sent.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until the owner has all messages, at most `seconds` seconds."""
        with self._sent:
            self._sent.wait_for(lambda: not self._outgoing and not self._is_sending, seconds)

    def _run_writer(self) -> None:
        """Run the thread that writes."""
        while True:
            with self._sent:
                self._is_sending = False
                self._sent.notify_all()
                self._sent.wait_for(lambda: self._outgoing)
                data = b"".join(map(encode, self._outgoing))
                self._outgoing.clear()
                self._is_sending = True
            try:
                while data:
                    data = data[os.write(self._up, data) :]
            except OSError:  # the owner no longer reads
                continue

    def watch(self, on_message: Callable[[Down], object], on_lost: Callable[[], object]) -> None:
        """Pass the owner's messages to `on_message`: first those received so far, then others, from the lease's thread.

        When the owner is gone, `on_lost` is called. The group is killed `GRACE` seconds later in any case. An owner
        that is gone before `watch` is noticed too. Nothing has to stop in order then, so the group is killed without
        that wait.
        """
        with self._handling:
            self._handlers = on_message, on_lost
            self._handle_messages([])

    def _run_reader(self) -> None:
        """Run the thread that reads."""
        ttl = self.hello.ttl
        silence = Silence(CHECK_SECONDS)
        while (lines := self._lines.read(CHECK_SECONDS)) is not None:
            if lines:
                silence.reset()
                with self._handling:
                    self._handle_messages(decode(lines))
            elif ttl is not None and silence.update() > ttl:
                break
        cleanup = threading.Thread(target=self.start_cleanup, daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread can start: the end matters more
            cleanup.start()
        if self._handlers is not None:
            with contextlib.suppress(Exception):
                self._handlers[1]()
            time.sleep(GRACE)
        if cleanup.is_alive():
            cleanup.join(CLEANUP_SECONDS)
        end_group()

    def _handle_messages(self, messages: list[Down]) -> None:
        self._pending += messages
        if self._handlers is not None:
            pending, self._pending = self._pending, []
            for message in pending:
                with contextlib.suppress(RuntimeError):  # the server is ending: its event loop is closed
                    self._handlers[0](message)


def rank_of(ranks: Ranks | None) -> int:
    """Return the rank of this process, as its launcher has set it."""
    number = "0" if ranks is None else os.environ.get(ranks.variable, "")
    if not number.isdecimal():
        sys.exit(f"gserve: the launcher has set no rank of a server on several nodes: {ranks}")
    return int(number)


def encode(message: Down | Up) -> bytes:
    """Return a message as the line to send."""
    return msgspec.json.encode(message) + b"\n"


def decode(lines: list[bytes]) -> list[Down]:
    """Return the messages to a server in these lines. Other lines are skipped."""
    messages = []
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            messages.append(_down.decode(line))
    return messages


def end_group() -> None:
    """Kill this process and every other process of its group, at once."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(128 + signal.SIGKILL)  # process 1 of a container cannot kill itself
