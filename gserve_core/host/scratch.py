"""The scratch folders of servers: each has one of its own for its temporary files, and removes it at its end.

The folders in which an owner keeps weights for its servers are made, and found when the owner was killed, likewise.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

import msgspec
from msgspec import Struct

from . import processes
from .folders import OWNER_FILE, note, private
from .locks import lock, try_lock, unlock_and_close

LONGEST = 50
"""Maximum length of a temporary folder's path, in bytes. The path of a vLLM socket below it must fit into 107."""
SHORT = Path("/tmp")  # noqa: S108 - everything made in it is private
"""Folder for links to servers' temporary folders whose paths are too long."""
SHARED = Path("/dev/shm")  # noqa: S108
"""Folder whose files are in memory."""
PREFIX, WEIGHTS = "gserve-", "gserve-weights-"
"""The beginnings of the names of a server's folder, and of one for weights. The owner's instance follows."""
DIGITS = 12
"""Number of digits of the instance in a name."""


class Owner(Struct, frozen=True):
    """The owner of a temporary folder: a server's instance, and its process, which leads or is in a session."""

    instance: str
    pid: int
    started: int
    session: int
    boot: str


def path_of(instance: str, temporary: str = "") -> Path:
    """Return the path of a server's folder for temporary files. The server makes it; its owner ensures its removal.

    temporary: the server's temporary folder; "": the same as in this process.
    """
    return (Path(temporary) if temporary else _temporary()) / f"{PREFIX}{instance[:DIGITS]}"


def _temporary() -> Path:
    """Return the temporary folder, or the usual one if none is writable."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return SHORT


def short_path(folder: Path) -> Path:
    """Return a path to a scratch folder that is short enough for sockets: a link if its own path is too long."""
    if len(os.fsencode(folder.parent)) <= LONGEST:
        return folder
    for base in _short_bases():
        with contextlib.suppress(OSError):
            if len(os.fsencode(base)) <= LONGEST:
                link = base / folder.name
                link.symlink_to(folder)
                return link
    note(f"the sockets of servers may not fit below {folder.parent}: set TMPDIR to a path of at most {LONGEST} bytes")
    return folder


def _short_bases() -> list[Path]:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")
    return [SHORT, runtime] if runtime.is_absolute() and runtime.is_dir() else [SHORT]


def remove(folder: Path) -> None:
    """Remove a scratch folder and the link to it. Never raises."""
    shutil.rmtree(folder, ignore_errors=True)
    for base in _short_bases():
        with contextlib.suppress(OSError):
            if (base / folder.name).readlink() == folder:
                (base / folder.name).unlink()


def make(instance: str) -> Path:
    """Make the scratch folder of a server. It counts as used until this process ends. Raises OSError, GserveError."""
    path, _ = hold(instance)  # until the process ends
    return path


def hold(instance: str) -> tuple[Path, int]:
    """Make a scratch folder. Raises OSError, GserveError.

    Return it, and a descriptor. It counts as used until this process ends or closes the descriptor.
    """
    path = path_of(instance)
    return path, _hold(path, instance)


def weight_bases() -> list[Path]:
    """Return the folders in which a folder for weights can be: shared memory if there is any, and a temporary one."""
    return [*([SHARED] if os.access(SHARED, os.W_OK | os.X_OK) else []), _temporary()]


def make_for_weights(base: Path, instance: str) -> tuple[Path, int]:
    """Make a private folder for weights. Raises OSError, GserveError.

    Return it, and a descriptor. It counts as used until this process ends or closes the descriptor.
    """
    path = base / f"{WEIGHTS}{instance[:DIGITS]}"
    return path, _hold(path, instance)


def _hold(path: Path, instance: str) -> int:
    """Make a private folder that counts as used while the descriptor is open that is returned."""
    private(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, shared=True)  # first: nobody finds it unused
        me = os.getpid()
        owner = Owner(instance, me, processes.process_start(me) or 0, os.getsid(0), processes.boot())
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(path / OWNER_FILE, flags, 0o600), "wb") as file:
            file.write(msgspec.json.encode(owner))
    except BaseException:
        os.close(descriptor)
        remove(path)
        raise
    return descriptor


def _owner_of(path: Path) -> Owner | None:
    """Return the owner of a temporary folder; None if it is not proved to be a server of this user."""
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        descriptor = os.open(path / OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            owner = msgspec.json.decode(file.read(4096), type=Owner)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return owner if path.name in {f"{it}{owner.instance[:DIGITS]}" for it in (PREFIX, WEIGHTS)} else None


def find_owner(instance: str, *more: Path) -> Owner | None:
    """Return the owner of a server's temporary folder; None if there is none.

    more: other folders that may contain it.
    """
    name = f"{PREFIX}{instance[:DIGITS]}"
    for base in (_temporary(), *_short_bases(), *more):
        path = base if base.name == name else base / name
        with contextlib.suppress(OSError):
            path = path.readlink()
        owner = _owner_of(path)
        if owner is not None and owner.instance == instance:
            return owner
    return None


def unused(instances: Collection[str]) -> list[Path]:
    """Return this user's scratch folders that no live server uses, and links to folders that are gone.

    Only folders proved to be a server's are returned.
    instances: servers known to be alive.
    """
    temporary = _temporary()
    pattern = PREFIX + "[0-9a-f]" * DIGITS
    found = [path for path in temporary.glob(pattern) if _is_unused(path, instances)]
    for link in (link for base in _short_bases() for link in base.glob(pattern) if link.is_symlink()):
        with contextlib.suppress(OSError):
            target = link.readlink()
            is_ours = link.lstat().st_uid == os.getuid() and target == temporary / link.name
            if is_ours and not os.path.lexists(target):
                found.append(link)
    return sorted(found)


def unused_weights() -> list[Path]:
    """Return this user's folders for weights whose owner has ended."""
    pattern = WEIGHTS + "[0-9a-f]" * DIGITS
    return sorted(path for base in {*weight_bases()} for path in base.glob(pattern) if _is_unused(path, ()))


def _is_unused(path: Path, instances: Collection[str]) -> bool:
    owner = _owner_of(path)
    try:
        return owner is not None and owner.instance not in instances and _is_free(path)
    except OSError:
        return False


def _is_free(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        return try_lock(descriptor)
    finally:
        unlock_and_close(descriptor)
