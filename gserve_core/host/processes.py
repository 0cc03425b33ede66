"""The processes of this machine: when one started, whether an owner is alive, and which ones belong to a server."""

import contextlib
import functools
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from .child_process import KILL_SECONDS

ID_VARIABLE = "GSERVE_ID"
"""Variable with the instance of a server, in the environment of all its processes.

They are found by it, even when they are renamed.
"""
OWNER_VARIABLE = "GSERVE_OWNER"
"""Variable with the owner of the server, beside `ID_VARIABLE`: see `owner_mark`."""
SERVER_VARIABLE = "GSERVE_SERVER"
"""Variable with the server itself, in the environment of the processes below it.

Its value is the server's process id and its start in clock ticks, as "4711:98765".
"""
REAP_SECONDS = 1.0
"""Maximum time until an ended process can be reaped, in seconds."""


def process_start(pid: int) -> int | None:
    """Return the start of a process, in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return None
    return None if state in "ZX" else started


def has_ended(pid: int, started: int) -> bool:
    """Return whether a process has ended; False if that cannot be read now, as without free descriptors."""
    try:
        state, found = _state_and_start(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return state in "ZX" or found != started


def _state_and_start(pid: int) -> tuple[str, int]:
    """Return the state of a process, and its start in clock ticks since boot. Raises OSError: it cannot be read."""
    # psutil gives the start in seconds by the clock, which differs for two readers if the clock is set between them.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    if len(fields) < 20:
        raise ProcessLookupError
    return fields[0], int(fields[19])


def owner_mark() -> str:
    """Return the value of OWNER_VARIABLE for the servers that this process owns."""
    return f"{os.getpid()}:{process_start(os.getpid())}:{boot()}"


def is_orphan(mark: str) -> bool:
    """Return whether the owner in a process's OWNER_VARIABLE is dead. One on another machine counts as alive."""
    pid, started, *where = mark.split(":")
    return where in ([], [boot()]) and process_start(int(pid)) != int(started)


@functools.cache
def boot() -> str:
    """Return the id of this machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def namespace(pid: int | str = "self") -> str:
    """Return the namespace of a process's process ids. Raises OSError: it cannot be read."""
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def processes_of(instance: str) -> list[int]:
    """Return the live processes of this machine with this server instance in their environment."""
    return [pid for pid, environ in environments(instance) if environ.get(ID_VARIABLE) == instance]


def environments(text: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the ids of the live processes that this user may read, each with its environment at its start.

    `text`: leave out the processes whose environment does not contain it. This is faster than to look through all.
    """
    part = os.fsencode(text)
    for pid in psutil.pids():
        try:
            block = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # this one has ended, or is another user's; the others count all the same
            continue
        if part not in block:
            continue
        # psutil would stop at the first empty entry, which a process may make when it changes its title.
        entries = (entry.partition("=") for entry in os.fsdecode(block).split("\0"))
        if environ := {name: value for name, separator, value in entries if separator}:  # a zombie has none
            yield pid, environ


def descendants() -> list[psutil.Process]:
    """Return the processes below this one, as far as this user may see them."""
    children: defaultdict[int, list[psutil.Process]] = defaultdict(list)
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):  # `Process.children` would raise if one cannot be read
            process = psutil.Process(pid)
            children[process.ppid()].append(process)
    below = [*children[os.getpid()]]
    for process in below:
        below += children[process.pid]
    return below


def group_members(group: int) -> Iterator[psutil.Process]:
    """Yield the processes of a process group, zombies included."""
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(pid) == group:
                yield psutil.Process(pid)


def end_processes_of(instance: str) -> list[int]:
    """Kill the remaining processes of a server on this machine; return those still alive after `KILL_SECONDS`."""
    deadline = time.monotonic() + KILL_SECONDS
    killed: set[int] = set()
    while (left := processes_of(instance)) and time.monotonic() < deadline:
        killed.update(left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    reap(killed)
    return left


def cpu_seconds_below() -> float:
    """Return the CPU time that the live processes below this one have used, in seconds. Raises OSError."""
    used = 0.0
    for process in descendants():
        with contextlib.suppress(psutil.Error):
            used += sum(process.cpu_times()[:2])
    return used


def reap(pids: Iterable[int]) -> None:
    """Reap ended children of this process among `pids`. Process 1 gets all children whose parents have ended."""
    deadline = time.monotonic() + REAP_SECONDS
    while ended := [pid for pid in pids if _can_be_reaped(pid)]:
        for pid in ended:  # it cannot be reaped while one of its threads still ends
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.01)


def _can_be_reaped(pid: int) -> bool:
    """Return whether a process has ended and is a child of this one."""
    try:
        process = psutil.Process(pid)
        return process.ppid() == os.getpid() and process.status() == psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def machine() -> str:
    """Return the scope of this process's ids: the machine's current boot, and the namespace of this process."""
    try:
        return f"{boot()} {namespace()}"
    except OSError:
        return boot()
