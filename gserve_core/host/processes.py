"""The processes of this machine: when one started, whether an owner is alive, and which ones belong to a server."""

import contextlib
import functools
import math
import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path

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
GONE_SECONDS = 10.0
"""Maximum time for killed processes to disappear, in seconds. They free GPU memory before that."""
REAP_SECONDS = 1.0
"""Maximum time until an ended process can be reaped, in seconds."""


def process_start(pid: int) -> int | None:
    """Return the start of a process, in clock ticks since boot; None if it does not exist or is a zombie."""
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def has_ended(pid: int, started: int) -> bool:
    """Return whether a process has ended; False if that cannot be read now, as without free descriptors."""
    try:
        fields = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        return False
    return fields[0] in "ZX" or int(fields[19]) != started


def stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on: state, parent, group, session, …; None if it is gone."""
    try:
        return _read_stat(pid)
    except OSError:
        return None


def _read_stat(pid: int) -> list[str]:
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    if len(fields) < 20:
        raise ProcessLookupError
    return fields


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
    mark = f"{ID_VARIABLE}={instance}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and process_start(int(entry.name)):
                    found.append(int(entry.name))
    return found


def end_processes_of(instance: str) -> list[int]:
    """Kill the remaining processes of a server on this machine; return those still alive after `GONE_SECONDS`."""
    deadline = time.monotonic() + GONE_SECONDS
    killed: set[int] = set()
    while (left := processes_of(instance)) and time.monotonic() < deadline:
        killed.update(left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    reap(killed)
    return left


def reap(pids: Iterable[int]) -> None:
    """Reap ended children of this process among `pids`. Process 1 gets all children whose parents have ended."""
    deadline = time.monotonic() + REAP_SECONDS
    while ended := [pid for pid in pids if (it := stat_fields(pid)) and it[:2] == ["Z", str(os.getpid())]]:
        for pid in ended:  # it cannot be reaped while one of its threads still ends
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.01)


def machine() -> str:
    """Return the scope of this process's ids: the machine's current boot, and the namespace of this process."""
    try:
        return f"{boot()} {namespace()}"
    except OSError:
        return boot()


def readable(seconds: float, *descriptors: int, writable: int = -1) -> list[int]:
    """Wait at most `seconds` seconds; return the descriptors that are readable, or `writable` if it is writable.

    -1 stands for no descriptor.
    """
    waiting = select.poll()
    if writable >= 0:
        waiting.register(writable, select.POLLOUT)
    for descriptor in descriptors:
        if descriptor >= 0:
            waiting.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in waiting.poll(math.ceil(seconds * 1000))]
