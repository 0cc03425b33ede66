"""The files by which processes of one user on one machine find each other: tokens, and records of services.

Files of mode 0600, written by the owner of a server or service and removed with it. They lie in two places: in
`$XDG_RUNTIME_DIR/gserve`, and in one that every session of the user knows, whatever its environment is.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..errors import GserveError
from . import folders

PLACE_VARIABLE = "_GSERVE_PLACE"
"""For tests: the second place for records and tokens; empty for none. By default it is `PLACE`/gserve-UID."""
PLACE = Path("/tmp")  # noqa: S108 - whatever TMPDIR says: all sessions of a user must meet
LOOK_SECONDS = 0.05
"""Interval between two looks at a lock or a record, in seconds."""
LARGEST = 16 << 20
"""Maximum size of a record, in bytes."""


def folder() -> Path:
    """Return the user's own folder for these files, made if it is missing: the first of `places`.

    Raises GserveError: the folder is somebody else's, or open to others, or cannot be made.
    """
    return places()[0]


def places() -> list[Path]:
    """Return the folders in which these files are kept: all have the same content, unless somebody has emptied one.

    `$XDG_RUNTIME_DIR/gserve`, and `/tmp/gserve-UID`. If neither can be used: `gserve-UID` in the folder for temporary
    files. Raises GserveError: one is somebody else's or open to others, or none can be made.
    """
    found = []
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    if base.is_absolute() and _is_usable(base):
        with contextlib.suppress(OSError):
            found.append(folders.private(base / "gserve"))
    second = os.environ.get(PLACE_VARIABLE, str(PLACE / f"gserve-{os.getuid()}"))
    if second:
        try:
            found.append(folders.private(Path(second)))
        except (OSError, GserveError) as error:
            if not found and isinstance(error, GserveError):
                raise
            folders.note(f"other sessions do not find the services of this one: {error}")
    return found or [folders.temporary()]


def _is_usable(base: Path) -> bool:
    """Say whether a folder of ours may be made there: not where only another user may, though root could."""
    try:
        found = base.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (found.st_uid == os.getuid() or bool(found.st_mode & stat.S_IWOTH))


def write(name: str, value: object) -> None:
    """Write a file of mode 0600 in all places; it appears whole. Raises GserveError: in none it can be written."""
    failed: OSError | None = None
    written, text = 0, ""
    content = msgspec.json.encode(value)
    for place in places():
        try:
            _replace(place / name, content)
            written += 1
        except OSError as error:
            failed, text = error, f"cannot write {place / name}: {error.strerror}"
    if failed is not None:
        if not written:
            raise GserveError(text) from failed
        folders.note(text)


def _replace(path: Path, content: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(scratch).rename(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read(path: Path) -> bytes:
    """Return the content of a file; a folder, a link or a pipe in its place is an OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a file")
        return stream.read(LARGEST)


@contextlib.contextmanager
def locked(places: Sequence[Path], seconds: float) -> Iterator[None]:
    """Change records alone, against all processes of this user. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        for place in sorted(places):  # one order for all: else two could wait for each other
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a fork may have the file too
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"another process has locked {place} for {seconds:g} s") from error
                    time.sleep(LOOK_SECONDS)
        yield


def changed(path: Path) -> int:
    """Return when a file was last changed, in nanoseconds; 0 if it is not there."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0
