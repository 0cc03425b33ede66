"""Locks on files between processes (flock).

A lock belongs to an open file. The kernel frees it when all processes that have the file open, forks included, have
closed it or ended.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

REPORT_SECONDS = 10.0
"""Interval between two reports of a process that waits, in seconds. Without reports it would seem to hang."""


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Lock an open file as soon as other processes allow it. Raises OSError: its file system has no locks."""
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file, without a wait; return False if another process has locked it.

    shared: allow other shared locks beside this one.
    Raises OSError: its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def attempts(descriptor: int, report: Callable[[], object] = lambda: None, *, shared: bool = False) -> Iterator[float]:
    """Try to lock an open file until that succeeds. Before each further attempt, yield the seconds waited so far.

    The caller sleeps between two attempts, or gives up.

    report: called when the wait begins, and then every `REPORT_SECONDS` seconds.
    shared: see `try_lock`.
    Raises OSError: its file system has no locks.
    """
    began = next_report = time.monotonic()
    while not try_lock(descriptor, shared=shared):
        now = time.monotonic()
        if now >= next_report:
            report()
            next_report = now + REPORT_SECONDS
        yield now - began


def unlock(descriptor: int) -> None:
    """Unlock an open file, in forked processes too. To close it would free the lock in this process alone."""
    with contextlib.suppress(OSError):  # its file system has no locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def unlock_and_close(descriptor: int) -> None:
    """Unlock a file, in forked processes too, and close it."""
    unlock(descriptor)
    os.close(descriptor)
