"""Process groups: the processes that a server has started below it, and their end."""

import contextlib
import os
import signal
import time

from . import processes
from .child_process import KILL_SECONDS

GROUP_GRACE = 1.0
"""Time for processes below a server to end after it, in seconds. Some of them free shared memory."""


def end_group(group: int, grace: float) -> None:
    """Wait until a process group has ended; kill it after `grace` seconds.

    Returns at most `KILL_SECONDS` seconds after that, even if a process remains.
    """
    _wait_for_group(group, grace)
    kill_group(group)
    _wait_for_group(group, KILL_SECONDS)  # a killed process holds its GPU's memory until it is gone


def kill_group(group: int) -> None:
    """Kill all processes of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _wait_for_group(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while group_is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def group_is_alive(group: int) -> bool:
    """Return whether a process of the group is alive. Zombies, which only wait to be reaped, do not count."""
    return any(processes.process_start(process.pid) is not None for process in processes.group_members(group))


def reap_group(group: int) -> None:
    """Reap the processes of a group that have ended and are children of this process."""
    processes.reap([process.pid for process in processes.group_members(group)])
