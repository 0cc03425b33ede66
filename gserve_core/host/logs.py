"""Logging: loggers below "gserve", the level by `GSERVE_LOG_LEVEL`, which servers inherit; and the log of a server."""

import atexit
import contextlib
import errno
import faulthandler
import fcntl
import io
import logging
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from ..errors import ConfigError
from .redaction import redact

LEVEL_VARIABLE = "GSERVE_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LIMIT = 50 << 20
"""Bytes that the log of a server may have."""
HEAD = 1 << 20
"""Bytes from its beginning, which tells how the server started, that it never loses."""
LONGEST_LINE = 64 << 10
"""Bytes of a line that are kept."""
TAIL_LINES = 50
CLOSE_SECONDS = 1.0
"""How long a server that ends waits for its last words to be written."""
PATIENCE = 1.0
"""Seconds that a log which is no file may take to make room before lines are lost."""
BACKLOG_LINES = 10_000
"""Lines that may wait to be written to a stderr that nobody reads; of more, the oldest are dropped."""
_CHUNK = 1 << 20


def setup_logging(level: str | int | None = None, *, waits: bool = False) -> logging.Logger:
    """Write gserve's log to stderr, from `level` on (default: `GSERVE_LOG_LEVEL`, else INFO); return its logger.

    The level reaches the servers that are started afterwards. `waits`: the thread that logs writes by itself, and waits
    where stderr takes nothing; else another thread writes, which drops and counts lines then. Raises ConfigError: no
    such level.
    """
    name = logging.getLevelName(level) if isinstance(level, int) else (level or log_level())
    if name.upper() not in _LEVELS:
        raise ConfigError(f"unknown log level '{name}'; expected one of {', '.join(_LEVELS)}")
    logger = logging.getLogger("gserve")
    logger.setLevel(name.upper())
    if all(isinstance(handler, _LastResort) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr) if waits else _StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    return logger


def log_level() -> str:
    """Return the level by name: that of the logger "gserve" where it is set, else the environment's, else INFO."""
    own = logging.getLogger("gserve").level
    return logging.getLevelName(own) if own else os.environ.get(LEVEL_VARIABLE, "INFO")


def keep_logging_from_waiting() -> None:
    """Have another thread write what this one logs: it may wait for the handlers of the program, or stderr. Idempotent.

    Each thread that keeps something alive calls it at its beginning, and again when a library has come that logs.
    """
    _THREAD.must_not_wait = True
    for it in list(logging.root.manager.loggerDict.values()):  # also those of libraries, such as a transport's
        if isinstance(it, logging.Logger):
            it.addFilter(_hand_over)
    logger = logging.getLogger("gserve")
    if not logger.handlers:
        logger.addHandler(_LastResort(logging.WARNING))


def forward(lines: Iterable[str]) -> None:
    """Have lines written to stderr by a thread. Never waits: lines that stderr does not take are dropped, and counted.

    They are in order with those of our log.
    """
    _STDERR.put(lines)


def flush(seconds: float = CLOSE_SECONDS) -> None:
    """Wait until all that is to be handed over and forwarded is written, so many seconds at most for each."""
    _RECORDS.flush(seconds)
    _STDERR.flush(seconds)


class _Backlog[T]:
    """A thread that writes, and what it has not written yet.

    write: writes some entries, and says how many were dropped before them. It may wait.
    """

    def __init__(self, name: str, write: Callable[[Sequence[T], int], object]) -> None:
        self._name = name
        self._write = write
        os.register_at_fork(after_in_child=self._reset)
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()  # a signal handler may log while its thread has the lock: it is an RLock
        self._entries: deque[T] = deque()
        self._dropped = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def put(self, entries: Iterable[T]) -> None:
        with self._changed:
            for entry in entries:
                if len(self._entries) >= BACKLOG_LINES:
                    self._entries.popleft()
                    self._dropped += 1
                self._entries.append(entry)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()  # raises where there can be no more threads: the next entry tries it again
                self._thread = thread
                atexit.unregister(flush)
                atexit.register(flush)
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._entries and not self._is_writing, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._entries)
                entries, self._entries = self._entries, deque()
                dropped, self._dropped = self._dropped, 0
                self._is_writing = True
            self._write(entries, dropped)


def _write_lines(lines: Sequence[str], dropped: int) -> None:
    note = f"[gserve: {dropped} lines were dropped here: nobody read stderr]\n" if dropped else ""
    _write_to_stderr(note + "".join(f"{line}\n" for line in lines))


def _write_to_stderr(text: str) -> None:
    """Write a text, and wait as long as it takes. Holds no lock of `sys.stderr` while it waits: others need it."""
    stream = sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or there is none
        if type(stream) is not io.TextIOWrapper:  # a notebook's, or a test's
            stream.write(text)
            stream.flush()
            return
        data = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))
        room = select.poll()
        room.register(stream.fileno(), select.POLLOUT)
        while data:
            room.poll()
            data = data[os.write(stream.fileno(), data[: select.PIPE_BUF]) :]


_STDERR = _Backlog("stderr", _write_lines)


def _handle(records: Sequence[logging.LogRecord], dropped: int) -> None:
    """Pass records on to the program's own handlers."""
    if dropped:
        logging.getLogger("gserve").warning("%d records were dropped here: a log handler takes none", dropped)
    for record in records:
        with contextlib.suppress(Exception):
            logging.getLogger(record.name).callHandlers(record)


_RECORDS = _Backlog("gserve-log", _handle)
_THREAD = threading.local()


def _hand_over(record: logging.LogRecord) -> bool:
    """Be the filter of a logger: say whether this thread may pass a record on; else another one does that."""
    if not getattr(_THREAD, "must_not_wait", False) or all(
        isinstance(it, _StderrHandler) for it in _handlers(record.name)
    ):
        return True
    with contextlib.suppress(RuntimeError):  # there can be no more threads
        _RECORDS.put([record])
    return False


def _handlers(name: str) -> list[logging.Handler]:
    """Return all handlers that get what a logger is told."""
    found, logger = [], logging.getLogger(name)
    while True:
        found += logger.handlers
        if not logger.propagate or logger.parent is None:
            return found
        logger = logger.parent


class _StderrHandler(logging.Handler):
    """Has a thread write to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            forward([self.format(record)])
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        flush()


class _LastResort(_StderrHandler):
    """Does what `logging` does itself where a program has no handler, but does not wait."""

    def emit(self, record: logging.LogRecord) -> None:
        if all(isinstance(handler, _LastResort) for handler in _handlers("gserve")):
            super().emit(record)


class ServerLog:
    """The log of this process and all below it: what they write to descriptors 1 and 2, which it takes over.

    A thread reads that from a pipe and writes it to what was descriptor 2, line by line and without the values of
    `secrets`. A log that cannot be written never stops a server: lines are lost, and counted. A file is kept below
    `limit` bytes: of a larger log it has the beginning and the newest part.
    """

    def __init__(self, secrets: Collection[str] = (), limit: int = LIMIT) -> None:
        self._secrets = secrets
        self._raw = os.dup(2)  # as all descriptors here it is closed when a program is executed
        self._sink = _Sink(self._raw, limit)
        self._rest = b""
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._pipe, ours = os.pipe()
        with contextlib.suppress(OSError):  # more than a user may have in pipes: it stays smaller
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _CHUNK)
        self._closing = os.eventfd(0)
        for number in (1, 2):
            os.dup2(ours, number)
        os.close(ours)
        faulthandler.enable(self._raw)
        self._inherited = [self._pipe]
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._pump, name="log", daemon=True)
        self._thread.start()

    def _forget(self) -> None:
        """Close the pipe in a forked child, so that it breaks when we are gone; once, see `lease.ServerEnd._forget`."""
        while self._inherited:
            os.close(self._inherited.pop())

    def tail(self) -> list[str]:
        """Return the last lines, 50 at most, also where they could not be written."""
        return [line.decode(errors="replace") for line in list(self._tail)]

    def close(self) -> None:
        """Write what has come so far, in a second at most; what comes later goes by us. Idempotent."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.eventfd_write(self._closing, 1)
        self._thread.join(CLOSE_SECONDS)

    def _pump(self) -> None:
        """Be the thread: pass on what comes until `close`, and then what is still there."""
        waiting = select.poll()
        for descriptor in (self._pipe, self._closing):
            waiting.register(descriptor, select.POLLIN)
        try:
            while self._closing not in dict(waiting.poll()) and (chunk := os.read(self._pipe, _CHUNK)):
                self._take(chunk)
            deadline = time.monotonic() + CLOSE_SECONDS
            os.set_blocking(self._pipe, False)
            with contextlib.suppress(BlockingIOError):
                while time.monotonic() < deadline and (chunk := os.read(self._pipe, _CHUNK)):
                    self._take(chunk)
            if self._rest:
                self._take(b"\n")
        finally:  # whatever happens: nobody may wait for a pipe that nobody reads
            for number in (1, 2):
                os.dup2(self._raw, number)
            os.close(self._pipe)

    def _take(self, chunk: bytes) -> None:
        """Write the whole lines that there are with `chunk`; the last one waits for its end."""
        data = self._rest + chunk
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1  # a progress bar has only the latter
        self._rest = data[end : end + 2 * LONGEST_LINE]
        text = redact(data[:end].decode(errors="surrogateescape"), self._secrets)
        lines = text.encode(errors="surrogateescape").splitlines(keepends=True)
        lines = [it if len(it) <= LONGEST_LINE else it[:LONGEST_LINE] + b" [cut]\n" for it in lines]
        self._tail += [line.rstrip() for line in lines[-TAIL_LINES:]]
        self._sink.put(b"".join(lines))


class BoundedLog:
    """A file to which a process appends that cannot keep it below `limit` bytes, as srun: its owner does, by `look`.

    What is appended in the very moment in which lines are dropped may be lost.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        with path.open("rb") as stream:
            self._sink = _Sink(stream.fileno(), limit)

    def look(self) -> None:
        """Drop lines from the middle where the file has grown too large. Raises OSError."""
        self._sink.keep_below(0)

    def close(self) -> None:
        """Release the file."""
        self._sink.close()


class _Sink:
    """Where a log goes: a file, which it keeps below `limit` bytes, or what cannot be cut, a pipe or a terminal."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self._descriptor = descriptor
        self._limit = limit
        self._is_file = False
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with contextlib.suppress(OSError):  # it was opened for appending only
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
                self._is_file = True
        self._head: int | None = None
        self._note = b""
        self._dropped = 0
        self._lost = 0
        self._why = ""
        self._is_torn = False

    def close(self) -> None:
        """Release the file."""
        if self._is_file:
            os.close(self._descriptor)

    def put(self, lines: bytes) -> None:
        """Write lines. Never raises: what cannot be written is lost, which is told when writing works again."""
        if self._lost:
            note = f"[gserve: {self._lost} lines could not be written here: {self._why}]\n"
            if self._write(("\n" * self._is_torn + note).encode()):
                self._lost += lines.count(b"\n")
                return
            self._lost = 0
        if unwritten := self._write(lines):
            self._lost = max(1, unwritten.count(b"\n"))

    def _write(self, data: bytes) -> bytes:
        """Write as much as can be; return the rest."""
        done = 0
        try:
            while done < len(data):
                done += self._append(memoryview(data)[done:])
        except OSError as error:
            self._why = error.strerror or str(error)
        if done:
            self._is_torn = not data.endswith(b"\n", 0, done)
        return data[done:]

    def _append(self, data: memoryview) -> int:
        """Write some of `data`; return how many bytes."""
        if self._is_file:
            return os.pwrite(self._descriptor, data, self.keep_below(len(data)))
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        if not room.poll(0 if self._lost else PATIENCE * 1000):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        return os.write(self._descriptor, data[: select.PIPE_BUF])  # so much never has to wait then

    def keep_below(self, more: int) -> int:
        """See to it that the file stays below the limit with `more` bytes behind it; return its size then."""
        size = os.fstat(self._descriptor).st_size
        return size if size + more <= self._limit else self._shrink(size)

    def _shrink(self, size: int) -> int:
        """Drop lines from the middle of the file, so that half of it is free; return its size then."""
        if self._head is None:
            self._head = os.pread(self._descriptor, HEAD, 0).rfind(b"\n") + 1
        source = size - (self._limit - self._head) // 2
        source += os.pread(self._descriptor, LONGEST_LINE, source).find(b"\n") + 1
        self._dropped += source - self._head - len(self._note)
        self._note = f"[gserve: {self._dropped} bytes of this log were dropped here]\n".encode()
        target = self._head + os.pwrite(self._descriptor, self._note, self._head)
        while chunk := os.pread(self._descriptor, _CHUNK, source):
            source += len(chunk)
            target += os.pwrite(self._descriptor, chunk, target)
        os.ftruncate(self._descriptor, target)
        return target
