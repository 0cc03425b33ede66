"""The log of a server: its last lines, and what is written to it afterwards, also after a restart of the server."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gserve_core.errors import GserveError
from gserve_core.host.folders import log_file

BLOCK = 64 << 10
"""Number of bytes that are read at once."""


class LogTail:
    """The log of a server, from the last `lines` lines on.

    A restarted server has another file in the same folder, which continues this log.

    `path`: the log of the server's current generation.

    Raises GserveError: it cannot be read.
    """

    def __init__(self, server: str, path: Path, lines: int) -> None:
        self._server = server
        self.folder = path.parent
        number = path.name.removeprefix(server).removesuffix("log").strip(".")
        self._number = int(number or 1)
        self._rest = b""
        self._stream = _open(path)
        self._stream.seek(_start_of_last(self._stream, lines))

    def read(self) -> Iterator[str]:
        """Yield the lines that have been written since the last call."""
        while True:
            yield from self._read_file(is_complete=False)
            following = log_file(self.folder, self._server, self._number + 1)
            if not following.exists():
                return
            yield from self._read_file(is_complete=True)
            self._stream.close()
            self._stream = _open(following)
            self._number += 1

    def finish(self) -> Iterator[str]:
        """Yield all lines that are left, and close the file."""
        yield from self.read()
        yield from self._read_file(is_complete=True)
        self._stream.close()

    def _read_file(self, *, is_complete: bool) -> Iterator[str]:
        """Yield the lines that have been added to the current file.

        `is_complete`: whether nothing more will be added, so that the last line is one even without its end.
        """
        position = self._stream.tell()
        if (size := self._stream.seek(0, os.SEEK_END)) < position:  # its oldest lines were dropped
            position, self._rest = size, b""
        self._stream.seek(position)
        while block := self._stream.read(BLOCK):
            *lines, last = (self._rest + block).splitlines(keepends=True)
            if last.endswith((b"\n", b"\r")):
                lines.append(last)
                last = b""
            self._rest = last
            yield from map(_text, lines)
        if is_complete and self._rest:
            rest, self._rest = self._rest, b""
            yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise GserveError(f"cannot read the log {path}: {error.strerror}") from error


def _start_of_last(stream: BinaryIO, lines: int) -> int:
    """Return the position of the last `lines` lines of a file."""
    end, size = stream.seek(0, os.SEEK_END), BLOCK
    while True:
        start = stream.seek(max(0, end - size))
        found = stream.read(end - start).splitlines(keepends=True)
        if start == 0 or len(found) > lines:
            return end - sum(map(len, found[max(0, len(found) - lines) :]))
        size *= 4
