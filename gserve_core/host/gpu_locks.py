"""GPU locks: each server locks its GPUs on this machine, also against other services and other users.

The kernel frees a lock when all processes that share it have ended, however they end. These are the server and the
processes that it has forked.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..errors import LaunchError
from ..interfaces import Report
from .locks import attempts, try_lock, unlock_and_close

FOLDER = Path("/tmp")  # noqa: S108 - not TMPDIR: all users must use the same folder
LOOK_SECONDS = 0.1
"""Interval between two attempts to lock a GPU, in seconds."""
SHOWN = 100
"""Maximum number of characters of another process's command in a message."""


class Hold:
    """Locked GPUs, until `release` or the end of this process."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = sorted(set(devices))  # the same order for all prevents a deadlock
        self._locks: list[int] = []
        self._turns: list[int] = []

    def _take(self, share: bool) -> None:
        for device in self._devices:
            descriptor = _open(device, "lock")
            self._locks.append(descriptor)
            if not try_lock(descriptor, shared=share):
                raise LaunchError(
                    f"{_name(device)} is held by {describe(holder(descriptor))}: stop that, choose other gpu_ids,"
                    " or set share_gpu: true for all that use it"
                )
            if share:
                self._turns.append(_open(device, "start.lock"))

    async def turn(self, report: Report, *, shared: bool = False) -> None:
        """Wait until no other server starts on one of these GPUs. Returns at once if they are not shared.

        shared: whether other servers that say so may start at the same time.
        """
        for device, descriptor in zip(self._devices, self._turns, strict=False):

            def tell(device: str = device, descriptor: int = descriptor) -> None:
                report(f"waiting for process {holder(descriptor) or '?'}, which starts on {_name(device)}")

            for _ in attempts(descriptor, tell, shared=shared):
                await asyncio.sleep(LOOK_SECONDS)

    def started(self) -> None:
        """Allow the next server that shares these GPUs to start. Idempotent."""
        _free(self._turns)

    def release(self) -> None:
        """Unlock the GPUs, even if forked processes are still alive. Idempotent."""
        _free(self._turns)
        _free(self._locks)


def hold(devices: Sequence[str], *, share: bool) -> Hold:
    """Lock GPUs for this process.

    share: whether other processes that share them may lock them too. They start one after the other: await `turn`
    before the engine starts, and call `started` when it is ready.
    Raises LaunchError: another process has locked a GPU, or its lock cannot be used.
    """
    held = Hold(devices)
    try:
        held._take(share)
    except BaseException:
        held.release()
        raise
    return held


def _open(device: str, kind: str) -> int:
    """Open the lock file of a GPU. It may be another user's: locking needs no write permission."""
    path = FOLDER / f"gserve-gpu-{re.sub(r'[^A-Za-z0-9._-]', '_', device)}.{kind}"
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(descriptor, 0o644)  # whatever the umask: other users must be able to open it
            return descriptor
        return os.open(path, flags)
    except OSError as error:
        raise LaunchError(
            f"cannot lock {_name(device)} against other services: {path}: {error.strerror}; it must be a file that all"
            " users can read"
        ) from error


def _free(descriptors: list[int]) -> None:
    while descriptors:
        unlock_and_close(descriptors.pop())


def _name(device: str) -> str:
    return device if device.startswith(("GPU-", "MIG-")) else f"GPU {device}"


def holder(descriptor: int) -> int | None:
    """Return the id of the process that has locked a file; None if the kernel does not show it."""
    found = os.fstat(descriptor)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, pid, where, *_ = line.split()  # the line of a waiting process has other fields
            if (kind, where) == ("FLOCK", place) and int(pid) > 0:  # otherwise it is in a container, and has no id here
                return int(pid)
    return None


def describe(pid: int | None) -> str:
    """Return a description of a process: its id, user and command."""
    if pid is None:
        return "another process"
    try:
        process = psutil.Process(pid)
        user, command = process.username(), " ".join(process.cmdline()).strip()
    except (OSError, psutil.Error):
        user = command = ""
    if not command:  # it has ended, but a process that it forked has not
        return f"what process {pid} has left behind (see: gserve reap)"
    owner = f"user {user}" if user.isdigit() else user
    return f"process {pid} of {owner} ({command[:SHOWN]}{' …' * (len(command) > SHOWN)})"
