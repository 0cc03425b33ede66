"""Leftovers of tests: live processes, shared memory and state files of gserve."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from ..host import processes, run_files

RUN_VARIABLE = "GSERVE_TEST_RUN"
KILL_SECONDS = 20.0
"""Maximum time for killed processes to disappear, in seconds."""
END_SECONDS = 15.0
"""Maximum time for processes to end after a test, in seconds. Those alive after it are leftovers, and are killed."""


def our_processes() -> dict[int, str]:
    """Return the live processes that gserve has started on this machine: process id, command line.

    If the environment has `RUN_VARIABLE`, return only those that inherited it. Two test runs must not see each other.
    """
    found = {}
    run = os.environ.get(RUN_VARIABLE)
    for pid, environ in processes.environments(processes.ID_VARIABLE):
        if pid != os.getpid() and processes.ID_VARIABLE in environ and run in (None, environ.get(RUN_VARIABLE)):
            with suppress(OSError, psutil.Error):
                found[pid] = " ".join(psutil.Process(pid).cmdline()).strip()
    return found


def our_shared_memory() -> set[Path]:
    """Return the files in /dev/shm that our live processes have mapped. Files of other programs are left out."""
    found = set()
    for pid in our_processes():
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = line.partition("/dev/shm/")[2]  # noqa: S108 - where POSIX shared memory is on Linux
                if path and not path.endswith(" (deleted)"):
                    found.add(Path("/dev/shm") / path)  # noqa: S108
    return found


def our_files() -> set[Path]:
    """Return the state files of servers and services, in the runtime directory and in the second folder for them."""
    return {path for place in run_files.places() for path in place.iterdir()}


def end_leftovers(before: dict[int, str]) -> dict[int, str]:
    """Wait for the end of our processes that are not in `before`; kill and return those still alive then."""

    def new() -> dict[int, str]:
        return {pid: command for pid, command in our_processes().items() if pid not in before}

    left: dict[int, str] = {}
    deadline = time.monotonic() + END_SECONDS
    while (found := new()) and time.monotonic() < deadline:
        time.sleep(0.05)
    deadline += KILL_SECONDS
    while found and time.monotonic() < deadline:  # a process may have started another before it died
        left |= found
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        found = new()
    return left
