"""The folders of a user: state, caches, logs of runs, and temporary files of servers."""

import contextlib
import fcntl
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

LONGEST = 50
"""Maximum length of a temporary folder's path, in bytes: that of a socket of vLLM below it must fit into 107."""
SHORT = Path("/tmp")  # noqa: S108 - what is made in it is private
"""Where a link stands for a server's temporary folder whose path is too long."""
KEPT_RUNS = 50
"""Number of runs whose logs are kept."""
RUN = re.compile(r"\d{8}-\d{6}-.+")
"""Names of the folders for the logs of a run."""
OWNER_FILE = ".gserve"
"""Name of the file in a folder of ours that proves whose it is; its owner keeps the logs' one locked."""
HOMES = {"state": ("XDG_STATE_HOME", ".local/state"), "cache": ("XDG_CACHE_HOME", ".cache")}

logger = logging.getLogger("gserve.folders")


# ------------------------------------------------------------------------------------------------------ private folders


def private(path: Path) -> Path:
    """Make a folder of this user alone if it is missing; return it.

    Raises GserveError: it belongs to somebody else, is open to others, or is a link. Raises OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise GserveError(f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_RUNTIME_DIR")
    return path


def temporary() -> Path:
    """Return this user's private folder in the folder for temporary files. Raises GserveError."""
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
    """Return the user's folder for state or caches. It may not exist. Raises GserveError: there is no home folder."""
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
    """Return a folder below the user's folder for state or caches, made if it is missing.

    Falls back to a private folder in the temporary folder, with one note in the log. Raises GserveError.
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
    """Return what the environment of libraries needs where the user's folder for caches cannot be used.

    Models that Hugging Face has in it are still found. Raises GserveError.
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
    """Log a warning once in this process."""
    logger.warning("%s", text)


# ----------------------------------------------------------------------------------------------------- folders for logs


_HELD: dict[Path, int] = {}
"""The locked files of the log folders that this process uses."""


def log_folder(run: str) -> Path:
    """Make and return the folder for the logs of one run; the oldest runs beyond `KEPT_RUNS` are removed.

    It lies below `$XDG_STATE_HOME/gserve/logs`, by default `~/.local/state/gserve/logs`. It stays while this process
    lives, or until `release_logs`. Raises GserveError.
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
    """Make a log folder again if it is missing, and keep other runs from removing it. Raises GserveError."""
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
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.write(descriptor, f"{processes.owner_mark()}\n".encode())
    except OSError:  # locks are not supported there, or the disk is full: the logs are made even so
        logger.debug("cannot lock %s", file, exc_info=True)
    release_logs(path)
    _HELD[path] = descriptor


def release_logs(path: Path) -> None:
    """Let other runs remove a log folder when its time has come. Idempotent."""
    descriptor = _HELD.pop(path, None)
    if descriptor is not None:
        _unlock(descriptor)


def _unlock(descriptor: int) -> None:
    """Free the lock of a file, and close it: closing is not enough where a fork has the file too."""
    with contextlib.suppress(OSError):  # locks are not supported there
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


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
    """Lock a file for the block; nobody can use its folder then. Raises OSError: somebody does, or nobody can know."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # made by an older version of gserve
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _unlock(descriptor)


# --------------------------------------------------------------------------------------- temporary folders of servers


class ScratchOwner(Struct, frozen=True):
    """Whose a temporary folder is: an instance of a server, and its process, which leads or is in a session."""

    instance: str
    pid: int
    started: int
    session: int
    boot: str


def scratch_folder(instance: str, temporary: str = "") -> Path:
    """Return where a server keeps its temporary files: it makes the folder, and its owner sees to it that it goes.

    temporary: the server's folder for temporary files; "": it is ours.
    """
    return (Path(temporary) if temporary else _temporary()) / f"gserve-{instance[:12]}"


def _temporary() -> Path:
    """Return the folder for temporary files; if no such folder can be written, the usual one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return SHORT


def short_path(folder: Path) -> Path:
    """Return a path of a scratch folder below which sockets fit: a link to it if its own path is too long."""
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
    """Remove a scratch folder, and the link to it. Nothing is raised."""
    shutil.rmtree(folder, ignore_errors=True)
    for base in _short_bases():
        with contextlib.suppress(OSError):
            if (base / folder.name).readlink() == folder:
                (base / folder.name).unlink()


def make_scratch_folder(instance: str) -> Path:
    """Make that folder, which counts as used while this process lives. Raises OSError, GserveError."""
    path = private(scratch_folder(instance))
    me = os.getpid()
    owner = ScratchOwner(instance, me, processes.process_start(me) or 0, os.getsid(0), processes.boot())
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path / OWNER_FILE, flags, 0o600), "wb") as file:
        file.write(msgspec.json.encode(owner))
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)  # stays open until the process ends
    return path


def scratch_owner(path: Path) -> ScratchOwner | None:
    """Return whose temporary folder it is; None if it is not proved to be one of this user's servers."""
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
    """Return the owner of a server's temporary folder, which may lie below other folders too; None: there is none."""
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
    """Return the scratch folders of this user that no living server uses, and links to folders that are gone.

    `instances` are known to live. Only what is proved to be a server's is returned.
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        _unlock(descriptor)
    return True
