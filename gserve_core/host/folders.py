"""The private folders of a user: state, caches, and the logs of runs."""

import contextlib
import functools
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, GserveError
from . import processes
from .locks import try_lock, unlock_and_close

KEPT_RUNS = 50
"""Number of runs whose logs are kept."""
RUN = re.compile(r"\d{8}-\d{6}-.+")
"""Pattern of the names of runs' log folders."""
LOG = re.compile(r"(.+?)(?:\.(\d+))?\.log")
"""Pattern of the names that `log_file` returns."""
NURSERY_LOG = "nursery.log"
"""Name of the log of the process that forks the servers. It stands beside their logs."""
MPS_LOG = re.compile(r"mps-(GPU|MIG)-\w+\.log")
"""Pattern of the names that `mps_log` returns."""
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


@contextlib.contextmanager
def given(path: str, what: str, holder: str) -> Iterator[Path]:
    """Give the folder of a path that a user has named, with links resolved.

    `what`: what is looked for in it, and `holder`: what it is the folder of, for messages.

    Raises ConfigError: it is no folder, or the block cannot read it.
    """
    folder = expanded(path)
    try:
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise ConfigError(f"expected the folder of {holder}, got the file {folder}")
        yield folder
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a null byte, RuntimeError: a loop of links
        raise ConfigError(f"no {what} in {folder}: {getattr(error, 'strerror', None) or error}") from error


def below(root: str, path: str, option: str, find: Callable[[str], tuple[Path, Iterable[Path]]]) -> Path:
    """Return a folder below a root, with links resolved. A relative path starts at the root.

    `option`: name of the option that sets the root.
    `find`: returns a folder with links resolved, and the files in it that will be read.

    Raises ConfigError: the folder or one of these files is not below the root. Raises what `find` raises.
    """
    top = expanded(root).resolve()
    wrong = ConfigError(f"expected a folder below {option}, with its files there, got {path!r:.200}")
    try:
        is_below = (top / path).resolve().is_relative_to(top)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, or a loop of links
        raise wrong from error
    if not is_below:
        raise wrong
    folder, files = find(str(top / path))
    if not all(file.resolve().is_relative_to(top) for file in (folder, *files)):
        raise wrong
    return folder


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


def last_logs(run: str) -> Path | None:
    """Return the newest folder that `log_folder` made for runs of this name; None: there is none."""
    with contextlib.suppress(OSError, GserveError):
        name = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(run)}-.{{8}}")
        found = [it for it in (home("state") / "gserve/logs").iterdir() if name.fullmatch(it.name)]
        return max(found, default=None, key=lambda it: it.name)
    return None


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
        if not try_lock(descriptor, shared=True):
            raise BlockingIOError
        os.write(descriptor, f"{processes.owner_mark()}\n".encode())
    except OSError:  # locks are not supported there, or the disk is full: log without a lock
        logger.debug("cannot lock %s", file, exc_info=True)
    release_logs(path)
    _HELD[path] = descriptor


def log_file(folder: Path, server: str, number: int) -> Path:
    """Return the path of a server's log in a log folder. `number`: counts the starts of the server, from 1."""
    return folder / (f"{server}.log" if number == 1 else f"{server}.{number}.log")


def mps_log(folder: Path, gpu: str) -> Path:
    """Return the path of an MPS daemon's log in a log folder. `gpu`: the UUID of its first GPU."""
    return folder / f"mps-{gpu[:12]}.log"


def newest_logs(folder: Path) -> dict[str, Path]:
    """Return the newest log of each server in a log folder, by the server's name."""
    found: dict[str, tuple[int, Path]] = {}
    for path in folder.glob("*.log"):
        is_other = path.name == NURSERY_LOG or MPS_LOG.fullmatch(path.name)
        if not is_other and (parts := LOG.fullmatch(path.name)) is not None:
            number = int(parts[2] or 1)
            found[parts[1]] = max(found.get(parts[1], (0, path)), (number, path))
    return {server: path for server, (_, path) in sorted(found.items())}


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
