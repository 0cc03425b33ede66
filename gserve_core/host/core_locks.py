"""Core locks: the services of one user that compute on the CPU divide the cores of a machine.

The process that owns the servers locks the cores, for all of its servers together. The kernel frees the locks when that
process has ended, however it ends.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Sequence

from . import gpu_locks
from .folders import note
from .forks import call_in_child
from .locks import try_lock, unlock_and_close

logger = logging.getLogger("gserve.server")


class Claim:
    """The cores that one server may use, until `release`.

    `cores`: those that no other process of this user has locked; all if there is none.
    `is_shared`: whether other processes use them too.
    """

    def __init__(self, cores: Sequence[int], *, is_shared: bool) -> None:
        self.cores = list(cores)
        self.is_shared = is_shared
        self._is_released = False

    def release(self) -> None:
        """Stop to use the cores. The last server of this process unlocks them. Idempotent."""
        with _LOCK:
            if not self._is_released:
                self._is_released = True
                _CLAIMS.remove(self)
                if not _CLAIMS:
                    _OWN.clear()
                    while _HELD:
                        unlock_and_close(_HELD.popitem()[1])


_LOCK = threading.Lock()
_CLAIMS: list[Claim] = []
_OWN: list[int] = []
"""The cores of this process."""
_HELD: dict[int, int] = {}
"""The descriptors of the lock files of the cores that this process has locked, by core."""


def claim(cores: Sequence[int]) -> Claim:
    """Lock those of `cores` that no other process has locked, or return those that this process has locked before.

    If other processes have locked all, they are shared, with one warning. A core whose lock cannot be used is free.
    """
    other = None
    with _LOCK:
        if not _CLAIMS:
            call_in_child(_forget)
        if not _OWN:  # otherwise the shares of the servers that run stay as they are
            taken = {core: it for core in cores if (it := _lock_core(core)) is not None}
            _OWN.extend(core for core in cores if core not in taken)
            other = next(iter(taken.values()), None)
        own = [core for core in cores if core in _OWN]
        made = Claim(own or cores, is_shared=not own)
        _CLAIMS.append(made)
    if other and not own:
        note(
            f"{other} uses all cores that this service may use: both share them, and are slow. To divide them, start"
            " both under taskset, or set VLLM_CPU_OMP_THREADS_BIND in serve.env"
        )
    return made


def _lock_core(core: int) -> str | None:
    """Lock a core for this process. Return a description of the process that has locked it, if another one has."""
    path = gpu_locks.FOLDER / f"gserve-core-{os.getuid()}-{core}.lock"
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        if try_lock(descriptor):
            _HELD[core] = descriptor
            return None
        other = gpu_locks.describe(gpu_locks.holder(descriptor))
    except OSError as error:  # another user has made the file, or the file system has no locks
        logger.debug("cannot lock core %d: %s", core, error)
        other = None
    if descriptor >= 0:
        os.close(descriptor)
    return other


def _forget() -> None:
    """In a forked process: close the copies of the locks, which are the parent's."""
    while _HELD:
        with contextlib.suppress(OSError):
            os.close(_HELD.popitem()[1])
    _CLAIMS.clear()
    _OWN.clear()
