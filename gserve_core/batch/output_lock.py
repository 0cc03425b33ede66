"""A lock that allows one writer per results file, also if several machines share the file system.

The lock is a file beside the output, `.NAME.lock`, since the output itself may be replaced. It exists while a process
writes, and names that process. It holds a kernel lock (flock), which ends with its process, however that ends. If a
file system has no such locks, or other machines cannot see them, the content of the file decides.
"""

import contextlib
import errno
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ..host import processes
from ..host.locks import try_lock

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
"""Error numbers of a file system without flock."""
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}
"""Error numbers of a file system without hard links."""
ATTEMPTS = 10
"""Number of attempts to take the lock.
Its holder may be about to release it, or may only be checking whether it is free."""
RETRY_SECONDS = 0.02
"""Time between two attempts, in seconds."""


class Holder(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The process that writes an output.

    `mark`: identifies the process on its machine, see `processes.owner_mark`.
    `namespace`: its PID namespace.
    `job`: its SLURM job; "" if none.
    `restarts`: number of times that SLURM has requeued the job.
    """

    host: str
    pid: int
    mark: str
    namespace: str
    job: str = ""
    restarts: int = 0

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def this_process() -> Holder:
    """Return the description of this process for other processes."""
    return Holder(
        host=socket.gethostname(), pid=os.getpid(), mark=processes.owner_mark(), namespace=processes.namespace(),
        job=os.environ.get("SLURM_JOB_ID", ""), restarts=_restarts(),
    )  # fmt: skip


@contextlib.contextmanager
def only_writer(output: Path, is_over: Callable[[str], bool] = lambda _job: False) -> Iterator[None]:
    """Be the only writer of `output` within the context. Devices and pipes have no lock.

    `is_over`: returns whether a SLURM job is known to have ended.

    Raises ConfigError: another process writes the file (the message names it), or the lock cannot be written.
    """
    if (path := _lock_path(output)) is None:
        yield
        return
    try:
        descriptor = _acquire(path, output, is_over)
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror}", file=output) from error
    try:
        yield
    finally:
        if _is_file(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(output: Path, is_over: Callable[[str], bool] = lambda _job: False) -> None:
    """Check that no process writes `output` now. Raises ConfigError: one does, or the lock cannot be written."""
    path = _lock_path(output)
    if path is not None and path.exists():
        with only_writer(output, is_over):
            pass


def _lock_path(output: Path) -> Path | None:
    path = output.resolve()
    return None if path.exists() and not path.is_file() else path.with_name(f".{path.name}.lock")


def _acquire(path: Path, output: Path, is_over: Callable[[str], bool]) -> int:
    """Take the lock and return its descriptor.

    Raises ConfigError: another process has it.
    Raises OSError: it cannot be written.
    """
    for attempt in range(1, ATTEMPTS + 1):
        if (descriptor := _create(path)) is not None:
            return descriptor
        with contextlib.suppress(FileNotFoundError), path.open("r+b", buffering=0) as found:
            is_locked = _flock(found.fileno())
            holder = _parse_holder(found.read())
            if is_locked is False:
                if attempt == ATTEMPTS:
                    raise _refusal(output, holder)
            elif holder is not None and _is_alive(holder, is_locked, is_over):
                raise _refusal(output, holder, f" (if that has ended, remove {path})")
            elif _is_file(found.fileno(), path):  # only we remove it, since we have its lock
                path.unlink(missing_ok=True)
        time.sleep(RETRY_SECONDS)
    raise _refusal(output, None)


def _refusal(output: Path, holder: Holder | None, hint: str = "") -> ConfigError:
    who = holder or "another process"
    return ConfigError(
        f"already being written by {who}: wait for its end, or choose another --output{hint}", file=output
    )


def _create(path: Path) -> int | None:
    """Create the lock and return its descriptor; None if there already is one.

    The lock is complete and locked from its first moment.
    """
    content = msgspec.json.encode(this_process())
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        os.write(descriptor, content)
        os.fchmod(descriptor, 0o644)  # other users of the folder may read who holds it
        os.fsync(descriptor)
        _flock(descriptor)
        os.link(scratch, path)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, FileExistsError):
            return None
        if error.errno in NO_LINKS:
            return _create_plainly(path, content)
        raise
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        Path(scratch).unlink()
    return descriptor


def _create_plainly(path: Path, content: bytes) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    is_locked = _flock(descriptor)
    os.write(descriptor, content)
    if is_locked is False or not _is_file(descriptor, path):  # another process found it empty, and locked it first
        os.close(descriptor)
        return None
    return descriptor


def _flock(descriptor: int) -> bool | None:
    """Lock a file and return whether its kernel lock was free; None if its file system has no such locks."""
    try:
        return try_lock(descriptor)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def _parse_holder(content: bytes) -> Holder | None:
    try:
        return msgspec.json.decode(content, type=Holder)
    except msgspec.MsgspecError:
        return None


def _is_alive(holder: Holder, is_locked: bool | None, is_over: Callable[[str], bool]) -> bool:
    """Return whether a holder may still write.

    `is_locked`: True: the kernel lock was free, and is ours now. None: the file system has no such locks.
    """
    own = this_process()
    if holder.mark.rpartition(":")[2] == own.mark.rpartition(":")[2]:  # the same machine, not rebooted since
        return is_locked is None and (holder.namespace != own.namespace or not processes.is_orphan(holder.mark))
    if holder.host == own.host:  # the machine was rebooted
        return False
    if holder.job and holder.job == own.job:
        return holder.restarts >= own.restarts
    return not (holder.job and is_over(holder.job))


def _is_file(descriptor: int, path: Path) -> bool:
    """Return whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _restarts() -> int:
    text = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0
