"""Logging: the loggers below "gserve", which write to stderr.

`GSERVE_LOG_LEVEL` sets the level. Servers inherit it.
"""

import atexit
import contextlib
import io
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from ..errors import ConfigError
from .forks import call_in_child

LEVEL_VARIABLE = "GSERVE_LOG_LEVEL"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CLOSE_SECONDS = 1.0
"""Maximum time for a server that ends to write its last lines, in seconds."""
PATIENCE = 1.0
"""Maximum wait for a pipe or a terminal to accept data, in seconds. Then lines are lost."""
BACKLOG_LINES = 10_000
"""Maximum number of lines queued for a stderr without a reader. Beyond it, the oldest lines are dropped."""


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
