"""Logging: the loggers below "gserve", and the log of a server.

`GSERVE_LOG_LEVEL` sets the level. Servers inherit it.
"""

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
from .forks import call_in_child
from .redaction import redact

LEVEL_VARIABLE = "GSERVE_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LIMIT = 50 << 20
"""Maximum size of a server's log, in bytes."""
HEAD = 1 << 20
"""Size of the beginning of a log that is never dropped, in bytes. It shows how the server started."""
LONGEST_LINE = 64 << 10
"""Maximum length of a line, in bytes. The rest is cut."""
TAIL_LINES = 50
CLOSE_SECONDS = 1.0
"""Maximum time for a server that ends to write its last lines, in seconds."""
PATIENCE = 1.0
"""Maximum wait for a pipe or a terminal to accept data, in seconds. Then lines are lost."""
BACKLOG_LINES = 10_000
"""Maximum number of lines queued for a stderr without a reader. Beyond it, the oldest lines are dropped."""
_CHUNK = 1 << 20


def setup_logging(level: str | int | None = None, *, waits: bool = False) -> logging.Logger:
    """Write gserve's log to stderr; return its logger.

    level: the lowest level to log (default: `GSERVE_LOG_LEVEL`, else INFO). Servers started later use it too.
    waits: whether the thread that logs writes itself, and waits while stderr accepts nothing. Otherwise another thread
    writes; it then drops lines and counts them.
    Raises ConfigError: the level is unknown.
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
    """Return the level's name: from the logger "gserve" if it is set there, else from the environment, else INFO."""
    own = logging.getLogger("gserve").level
    return logging.getLevelName(own) if own else os.environ.get(LEVEL_VARIABLE, "INFO")


def keep_logging_from_waiting() -> None:
    """Let another thread write the log records of this thread, which must not wait for a handler or stderr. Idempotent.

    Each thread that keeps something alive calls it at its start. It calls it again after the import of a library that
    logs.
    """
    _THREAD.must_not_wait = True
    for it in list(logging.root.manager.loggerDict.values()):  # also the loggers of libraries, such as a transport's
        if isinstance(it, logging.Logger):
            it.addFilter(_hand_over)
    logger = logging.getLogger("gserve")
    if not logger.handlers:
        logger.addHandler(_LastResort(logging.WARNING))


def forward(lines: Iterable[str]) -> None:
    """Queue lines for the thread that writes to stderr.

    Never waits: lines that stderr does not accept are dropped, and counted. The lines stay in order with the lines of
    gserve's log.
    """
    _STDERR.put(lines)


def flush(seconds: float = CLOSE_SECONDS) -> None:
    """Wait until all queued records and lines are written, at most `seconds` seconds for each kind."""
    _RECORDS.flush(seconds)
    _STDERR.flush(seconds)


class _Backlog[T]:
    """A queue of entries, and the thread that writes them.

    write: writes entries, and reports how many were dropped before them. It may wait.
    """

    def __init__(self, name: str, write: Callable[[Sequence[T], int], object]) -> None:
        self._name = name
        self._write = write
        call_in_child(self._reset)
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()  # an RLock inside: a signal handler may log while its thread holds it
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
                thread.start()  # raises if no thread can start: the next entry tries again
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
    """Write a text to stderr, however long it takes.

    It holds no lock of `sys.stderr` while it waits: others need it.
    """
    stream = sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed or missing
        if type(stream) is not io.TextIOWrapper:  # a stream of a notebook or a test
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
    """Pass records to the program's own handlers."""
    if dropped:
        logging.getLogger("gserve").warning("%d records were dropped here: a log handler takes none", dropped)
    for record in records:
        with contextlib.suppress(Exception):
            logging.getLogger(record.name).callHandlers(record)


_RECORDS = _Backlog("gserve-log", _handle)
_THREAD = threading.local()


def _hand_over(record: logging.LogRecord) -> bool:
    """Filter a logger's records: return whether this thread may handle the record. If not, another thread does."""
    if not getattr(_THREAD, "must_not_wait", False) or all(
        isinstance(it, _StderrHandler) for it in _handlers(record.name)
    ):
        return True
    with contextlib.suppress(RuntimeError):  # no thread can start
        _RECORDS.put([record])
    return False


def _handlers(name: str) -> list[logging.Handler]:
    """Return all handlers that receive the records of a logger."""
    found, logger = [], logging.getLogger(name)
    while True:
        found += logger.handlers
        if not logger.propagate or logger.parent is None:
            return found
        logger = logger.parent


class _StderrHandler(logging.Handler):
    """A handler whose lines are written to stderr by another thread."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            forward([self.format(record)])
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        flush()


class _LastResort(_StderrHandler):
    """The fallback of `logging` for a program without handlers, but without waiting."""

    def emit(self, record: logging.LogRecord) -> None:
        if all(isinstance(handler, _LastResort) for handler in _handlers("gserve")):
            super().emit(record)


class ServerLog:
    """The log of this process and all processes below it: their output to descriptors 1 and 2, which it takes over.

    A thread reads the output from a pipe and writes it to the former descriptor 2. It works line by line and redacts
    the values of `secrets`. A log that cannot be written never stops a server: lines are lost, and counted. A file is
    kept below `limit` bytes. A larger log keeps its beginning and its newest part.
    """

    def __init__(self, secrets: Collection[str] = (), limit: int = LIMIT) -> None:
        self._secrets = secrets
        self._raw = os.dup(2)  # close-on-exec, as all descriptors here
        self._sink = _Sink(self._raw, limit)
        self._rest = b""
        self._tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._pipe, ours = os.pipe()
        with contextlib.suppress(OSError):  # the user's limit for pipes is reached: it stays smaller
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _CHUNK)
        self._closing = os.eventfd(0)
        for number in (1, 2):
            os.dup2(ours, number)
        os.close(ours)
        faulthandler.enable(self._raw)
        self._inherited = [self._pipe]
        call_in_child(self._forget)
        self._thread = threading.Thread(target=self._pump, name="log", daemon=True)
        self._thread.start()

    def _forget(self) -> None:
        """Close the pipe in a forked child, so that it breaks when the parent is gone.

        Close it only once: see `lease.ServerEnd._close_in_child`.
        """
        while self._inherited:
            os.close(self._inherited.pop())

    def tail(self) -> list[str]:
        """Return the last lines, at most 50, even those that could not be written."""
        return [line.decode(errors="replace") for line in list(self._tail)]

    def close(self) -> None:
        """Write the output so far, within a second. Later output goes directly to the log. Idempotent."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.eventfd_write(self._closing, 1)
        self._thread.join(CLOSE_SECONDS)

    def _pump(self) -> None:
        """Run the thread: copy the output until `close`, then the rest."""
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
        finally:  # always: no process may wait for a pipe without a reader
            for number in (1, 2):
                os.dup2(self._raw, number)
            os.close(self._pipe)

    def _take(self, chunk: bytes) -> None:
        """Write the complete lines of the output so far, including `chunk`.

        An incomplete last line waits for its end.
        """
        data = self._rest + chunk
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1  # a progress bar has only the latter
        self._rest = data[end : end + 2 * LONGEST_LINE]
        text = redact(data[:end].decode(errors="surrogateescape"), self._secrets)
        lines = text.encode(errors="surrogateescape").splitlines(keepends=True)
        lines = [it if len(it) <= LONGEST_LINE else it[:LONGEST_LINE] + b" [cut]\n" for it in lines]
        self._tail += [line.rstrip() for line in lines[-TAIL_LINES:]]
        self._sink.put(b"".join(lines))


class BoundedLog:
    """A log kept below `limit` bytes for a process that cannot do so, such as srun. Its owner calls `look` for it.

    Lines appended at the very moment of a drop may be lost.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        with path.open("rb") as stream:
            self._sink = _Sink(stream.fileno(), limit)

    def look(self) -> None:
        """Drop lines from the middle of the file if it is too large. Raises OSError."""
        self._sink.keep_below(0)

    def close(self) -> None:
        """Release the file."""
        self._sink.close()


class _Sink:
    """The target of a log: a file, kept below `limit` bytes, or a pipe or terminal, which cannot be shortened."""

    def __init__(self, descriptor: int, limit: int) -> None:
        self._descriptor = descriptor
        self._limit = limit
        self._is_file = False
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            with contextlib.suppress(OSError):  # reopened, since it was opened for appending only
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
        """Write lines. Never raises: lines that cannot be written are lost.

        A note gives their number once writing works again.
        """
        if self._lost:
            note = f"[gserve: {self._lost} lines could not be written here: {self._why}]\n"
            if self._write(("\n" * self._is_torn + note).encode()):
                self._lost += lines.count(b"\n")
                return
            self._lost = 0
        if unwritten := self._write(lines):
            self._lost = max(1, unwritten.count(b"\n"))

    def _write(self, data: bytes) -> bytes:
        """Write as much of the data as possible; return the rest."""
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
        """Write a part of `data`; return its number of bytes."""
        if self._is_file:
            return os.pwrite(self._descriptor, data, self.keep_below(len(data)))
        room = select.poll()
        room.register(self._descriptor, select.POLLOUT)
        if not room.poll(0 if self._lost else PATIENCE * 1000):
            raise BlockingIOError(errno.EAGAIN, "nobody reads it")
        return os.write(self._descriptor, data[: select.PIPE_BUF])  # after `poll`, a write of this size never waits

    def keep_below(self, more: int) -> int:
        """Shrink the file if `more` bytes would exceed the limit; return its size."""
        size = os.fstat(self._descriptor).st_size
        return size if size + more <= self._limit else self._shrink(size)

    def _shrink(self, size: int) -> int:
        """Drop lines from the middle of the file, so that half of it is free; return its new size."""
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
