"""Run files: tokens, and records of services.

With them, processes of one user on one machine find each other. They have mode 0600. The owner of a server or service
writes them, and removes them with it. They are kept in two
folders: `$XDG_RUNTIME_DIR/gserve`, and one that every session of the user knows, whatever its environment.
"""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..errors import GserveError
from . import folders
from .locks import attempts, unlock_and_close

PLACE_VARIABLE = "_GSERVE_PLACE"
"""Variable with the second folder for records and tokens, for tests. Empty: none. Default: `PLACE`/gserve-UID."""
PLACE = Path("/tmp")  # noqa: S108 - not TMPDIR: all sessions of a user must use the same folder
LOOK_SECONDS = 0.05
"""Interval between two checks of a lock or a record, in seconds."""
LARGEST = 16 << 20
"""Maximum size of a record, in bytes."""


def folder() -> Path:
    """Return the user's own folder for run files, the first of `places`. It is made if it is missing.

    Raises GserveError: the folder belongs to another user, is open to others, or cannot be made.
    """
    return places()[0]


def places() -> list[Path]:
    """Return the folders of the run files. All have the same content, unless somebody has emptied one.

    They are `$XDG_RUNTIME_DIR/gserve` and `/tmp/gserve-UID`. If neither can be used, `gserve-UID` in the temporary
    folder is returned. Raises GserveError: one belongs to another user or is open to others, or none can be made.
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
    """Return whether we may make a folder in `base`. False if only another user may, even where root could."""
    try:
        found = base.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (found.st_uid == os.getuid() or bool(found.st_mode & stat.S_IWOTH))


def write(name: str, value: object) -> None:
    """Write a file of mode 0600 to all folders, atomically. Raises GserveError: it cannot be written to any of them."""
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
    """Return the content of a file. Raises OSError: it cannot be read, or is a folder, a link or a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a file")
        return stream.read(LARGEST)


@contextlib.contextmanager
def locked(places: Sequence[Path], seconds: float) -> Iterator[None]:
    """Lock the records for the block, against all processes of this user.

    Raises TimeoutError: another process keeps them locked for `seconds` seconds.
    """
    with contextlib.ExitStack() as stack:
        for place in sorted(places):  # the same order for all prevents a deadlock
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(unlock_and_close, descriptor)
            for waited in attempts(descriptor):
                if waited >= seconds:
                    raise TimeoutError(f"another process has locked {place} for {seconds:g} s")
                time.sleep(LOOK_SECONDS)
        yield


def changed(path: Path) -> int:
    """Return the time of a file's last change, in nanoseconds; 0 if it does not exist."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0
