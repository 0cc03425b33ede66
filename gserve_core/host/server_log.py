"""The log of a server: its output goes to a file of bounded size, which keeps its beginning and its end."""

import contextlib
import errno
import faulthandler
import fcntl
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

from .forks import call_in_child
from .logs import CLOSE_SECONDS, PATIENCE
from .redaction import redact

LIMIT = 50 << 20
"""Maximum size of a server's log, in bytes."""
HEAD = 1 << 20
"""Size of the beginning of a log that is never dropped, in bytes. It shows how the server started."""
LONGEST_LINE = 64 << 10
"""Maximum length of a line, in bytes. The rest is cut."""
TAIL_LINES = 50
"""Number of lines from the end of a log that an error shows. They are kept in memory too."""
PART = 64 << 10
"""Maximum size of a part of a log that `read_part` returns, in bytes."""
_CHUNK = 1 << 20


def read_part(path: Path, after: int | None) -> tuple[str, int]:
    """Return some lines of a log, and the position after them, in bytes. A line is returned once it is complete.

    `after`: the position after which to read; None: return the last lines. The last lines are also returned if the log
    ends before that position, since it has lost its middle. Raises OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        is_tail = after is None or after > size
        start = max(0, size - PART) if is_tail else after or 0
        stream.seek(start)
        data = stream.read(PART)
    begin = data.find(b"\n") + 1 if is_tail and start else 0
    end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    if not end and len(data) == PART:  # a part of a very long line
        end = PART
    return data[begin:end].decode(errors="replace"), start + end


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
