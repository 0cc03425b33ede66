"""The folders of a user: state, caches, logs of runs, and temporary files of servers."""

import contextlib
import functools
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ..errors import GserveError
from . import processes
from .locks import lock, try_lock, unlock_and_close

LONGEST = 50
"""Maximum length of a temporary folder's path, in bytes. The path of a vLLM socket below it must fit into 107."""
SHORT = Path("/tmp")  # noqa: S108 - everything made in it is private
"""Folder for links to servers' temporary folders whose paths are too long."""
KEPT_RUNS = 50
"""Number of runs whose logs are kept."""
RUN = re.compile(r"\d{8}-\d{6}-.+")
"""Pattern of the names of runs' log folders."""
OWNER_FILE = ".gserve"
"""Name of the file that proves who owns a folder. In a log folder, the owner keeps it locked."""
HOMES = {"state": ("XDG_STATE_HOME", ".local/state"), "cache": ("XDG_CACHE_HOME", ".cache")}

logger = logging.getLogger("gserve.folders")


# ------------------------------------------------------------------------------------------------------ private folders


def private(path: Path) -> Path:
    """Make a private folder of this user if it is missing; return it.

    Raises GserveError: it belongs to another user, is open to others, or is a link. Raises OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise GserveError(f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_RUNTIME_DIR")
    return path


def temporary() -> Path:
    """Return this user's private folder in the temporary folder.

    Raises GserveError: it cannot be made or is not private.
    """
    path = None
    try:
        path = Path(tempfile.gettempdir()) / f"gserve-{os.getuid()}"
        return private(path)
    except OSError as error:
        where = f"{path}: {error.strerror}" if path else str(error)
        raise GserveError(
            f"cannot make a private temporary folder ({where}): set TMPDIR to a folder you own"
        ) from error


def home(kind: Literal["state", "cache"], environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's folder for state or caches, which may not exist.

    Raises GserveError: there is no home folder.
    """
    variable, below = HOMES[kind]
    if (given := environ.get(variable, "")).startswith("/"):
        return Path(given)
    try:
        path = Path.home()
    except RuntimeError as error:
        raise GserveError(f"there is no home folder for the user id {os.getuid()}: set HOME or {variable}") from error
    if not path.is_absolute():
        raise GserveError(f"expected an absolute path in HOME, got '{path}': set HOME or {variable}")
    return path / below


def expanded(path: str) -> Path:
    """Return a path with "~" replaced by the home folder, if there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def writable(kind: Literal["state", "cache"], below: str) -> Path:
    """Return a folder below the user's folder for state or caches. It is made if it is missing.

    The fallback is a private folder in the temporary folder, with one warning in the log.
    Raises GserveError: neither can be made.
    """
    try:
        path = home(kind) / below
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} is not writable")
        return path
    except (OSError, GserveError) as error:
        try:
            path = temporary() / kind / below
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as second:
            raise GserveError(f"cannot make a folder for gserve's {kind}: {error}; {second}") from second
        note(f"cannot use the user's {kind} folder ({error}): using {path}")
        return path


def cache_environment() -> dict[str, str]:
    """Return environment variables for libraries, if the user's cache folder cannot be used, else none.

    Libraries still find the models that Hugging Face has stored there. Raises GserveError: no cache folder can be made.
    """
    path = writable("cache", "")
    found = {HOMES["cache"][0]: str(path)}
    with contextlib.suppress(OSError, GserveError):
        usual = home("cache")
        if usual == path:
            return {}
        if "HF_HOME" not in os.environ and (usual / "huggingface").is_dir():
            found["HF_HOME"] = str(usual / "huggingface")
    return found


@functools.cache
def note(text: str) -> None:
    """Log a warning, once per text in this process."""
    logger.warning("%s", text)


# ----------------------------------------------------------------------------------------------------- folders for logs


_HELD: dict[Path, int] = {}
"""Descriptors of the locked files in the log folders that this process uses."""


def log_folder(run: str) -> Path:
    """Make a folder for the logs of one run; return it. The oldest runs beyond `KEPT_RUNS` are removed.

    It lies below `$XDG_STATE_HOME/gserve/logs`, by default `~/.local/state/gserve/logs`. It is kept until this process
    ends or calls `release_logs`. Raises GserveError: it cannot be made.
    """
    base = writable("state", "gserve/logs")
    try:
        path = Path(tempfile.mkdtemp(dir=base, prefix=f"{time.strftime('%Y%m%d-%H%M%S')}-{run}-"))
        keep_logs(path)
        for old in sorted(base.iterdir())[:-KEPT_RUNS]:
            _remove_logs(old)
    except OSError as error:
        raise GserveError(f"cannot make a folder for logs in {base}: {error.strerror}") from error
    return path


def keep_logs(path: Path) -> None:
    """Make a log folder again if it is missing, and prevent other runs from removing it.

    Raises GserveError: it cannot be made.
    """
    file = path / OWNER_FILE
    with contextlib.suppress(OSError, KeyError):
        if os.path.samestat(os.fstat(_HELD[path]), file.lstat()):
            return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise GserveError(f"cannot make the folder for logs {path}: {error.strerror}") from error
    try:
        try_lock(descriptor, shared=True)
        os.write(descriptor, f"{processes.owner_mark()}\n".encode())
    except OSError:  # locks are not supported there, or the disk is full: log without a lock
        logger.debug("cannot lock %s", file, exc_info=True)
    release_logs(path)
    _HELD[path] = descriptor


def release_logs(path: Path) -> None:
    """Allow other runs to remove a log folder when it is old enough. Idempotent."""
    descriptor = _HELD.pop(path, None)
    if descriptor is not None:
        unlock_and_close(descriptor)


def _remove_logs(path: Path) -> None:
    """Remove the logs of a run that has ended."""
    if path.is_symlink() or not path.is_dir() or not RUN.fullmatch(path.name):
        return
    with contextlib.suppress(OSError), _unlocked(path / OWNER_FILE):
        for file in path.glob("*.log"):
            file.unlink(missing_ok=True)
        (path / OWNER_FILE).unlink(missing_ok=True)
        path.rmdir()


@contextlib.contextmanager
def _unlocked(file: Path) -> Iterator[None]:
    """Lock a file for the block, so that no other process can use its folder.

    Raises OSError: the folder is in use, or its state is unknown.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # made by an older version of gserve
        yield
        return
    try:
        if not try_lock(descriptor):
            raise BlockingIOError
        yield
    finally:
        unlock_and_close(descriptor)


# --------------------------------------------------------------------------------------- temporary folders of servers


class ScratchOwner(Struct, frozen=True):
    """The owner of a temporary folder: a server's instance, and its process, which leads or is in a session."""

    instance: str
    pid: int
    started: int
    session: int
    boot: str


def scratch_folder(instance: str, temporary: str = "") -> Path:
    """Return the path of a server's folder for temporary files. The server makes it; its owner ensures its removal.

    temporary: the server's temporary folder; "": the same as in this process.
    """
    return (Path(temporary) if temporary else _temporary()) / f"gserve-{instance[:12]}"


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


def remove_scratch(folder: Path) -> None:
    """Remove a scratch folder and the link to it. Never raises."""
    shutil.rmtree(folder, ignore_errors=True)
    for base in _short_bases():
        with contextlib.suppress(OSError):
            if (base / folder.name).readlink() == folder:
                (base / folder.name).unlink()


def make_scratch_folder(instance: str) -> Path:
    """Make the scratch folder of a server. It counts as used until this process ends. Raises OSError, GserveError."""
    path = private(scratch_folder(instance))
    me = os.getpid()
    owner = ScratchOwner(instance, me, processes.process_start(me) or 0, os.getsid(0), processes.boot())
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path / OWNER_FILE, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(owner))
    lock(os.open(path, os.O_RDONLY), shared=True)  # stays open until the process ends
    return path


def scratch_owner(path: Path) -> ScratchOwner | None:
    """Return the owner of a temporary folder; None if it is not proved to be a server of this user."""
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return None
        descriptor = os.open(path / OWNER_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            owner = msgspec.json.decode(file.read(4096), type=ScratchOwner)
    except (OSError, msgspec.MsgspecError, ValueError):
        return None
    return owner if path.name == f"gserve-{owner.instance[:12]}" else None


def find_scratch(instance: str, *more: Path) -> ScratchOwner | None:
    """Return the owner of a server's temporary folder; None if there is none.

    more: other folders that may contain it.
    """
    name = f"gserve-{instance[:12]}"
    for base in (_temporary(), *_short_bases(), *more):
        path = base if base.name == name else base / name
        with contextlib.suppress(OSError):
            path = path.readlink()
        owner = scratch_owner(path)
        if owner is not None and owner.instance == instance:
            return owner
    return None


def unused_scratch_folders(instances: Collection[str]) -> list[Path]:
    """Return this user's scratch folders that no live server uses, and links to folders that are gone.

    Only folders proved to be a server's are returned.
    instances: servers known to be alive.
    """
    temporary = _temporary()
    pattern = "gserve-" + "[0-9a-f]" * 12
    found = [path for path in temporary.glob(pattern) if _is_unused(path, instances)]
    for link in (link for base in _short_bases() for link in base.glob(pattern) if link.is_symlink()):
        with contextlib.suppress(OSError):
            target = link.readlink()
            is_ours = link.lstat().st_uid == os.getuid() and target == temporary / link.name
            if is_ours and not os.path.lexists(target):
                found.append(link)
    return sorted(found)


def _is_unused(path: Path, instances: Collection[str]) -> bool:
    owner = scratch_owner(path)
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
