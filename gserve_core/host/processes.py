"""The processes of this machine: when one started, whether an owner is alive, and what belongs to a server."""

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
"""The instance of a server, in the environment of all its processes: what they are found by, even renamed."""
OWNER_VARIABLE = "GSERVE_OWNER"
"""Who has started it, beside that: see `owner_mark`."""
SERVER_VARIABLE = "GSERVE_SERVER"
"""The server itself, for the processes below it: a process's id and its start in clock ticks, as "4711:98765"."""
GONE_SECONDS = 10.0
"""How long killed processes may take to be gone: they free a GPU's memory before."""
REAP_SECONDS = 1.0
"""Maximum time until a process that has ended can be reaped, in seconds."""


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it does not exist or is a zombie."""
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def has_ended(pid: int, started: int) -> bool:
    """Say whether a process has ended; not where that cannot be read for now, as without descriptors."""
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
    """Return what the processes of a server have as OWNER_VARIABLE when this process owns it."""
    return f"{os.getpid()}:{process_start(os.getpid())}:{boot()}"


def is_orphan(mark: str) -> bool:
    """Say whether the owner that a process has as OWNER_VARIABLE is dead; one on another machine counts as alive."""
    pid, started, *where = mark.split(":")
    return where in ([], [boot()]) and process_start(int(pid)) != int(started)


@functools.cache
def boot() -> str:
    """Return an id of this machine since its last start."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def namespace(pid: int | str = "self") -> str:
    """Return the namespace in which the process ids of a process count. Raises OSError."""
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def processes_of(instance: str) -> list[int]:
    """Return the live processes of this machine that carry the id of a server's instance in their environment."""
    mark = f"{ID_VARIABLE}={instance}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and process_start(int(entry.name)):
                    found.append(int(entry.name))
    return found


def end_processes_of(instance: str) -> list[int]:
    """Kill what is left of a server on this machine; return what is still there after `GONE_SECONDS`."""
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
    """Reap those that have ended and have become our children: of process 1 all do whose parents have ended."""
    deadline = time.monotonic() + REAP_SECONDS
    while ended := [pid for pid in pids if (it := stat_fields(pid)) and it[:2] == ["Z", str(os.getpid())]]:
        for pid in ended:  # while a thread of it still ends, there is nothing to reap
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= deadline:
            return
        time.sleep(0.01)


def machine() -> str:
    """Return where process ids of ours count: the machine since its last start, and the namespace of this process."""
    try:
        return f"{boot()} {namespace()}"
    except OSError:
        return boot()


def readable(seconds: float, *descriptors: int, writable: int = -1) -> list[int]:
    """Return those of some descriptors, of which -1 is none, that are readable, or `writable`, within `seconds`."""
    waiting = select.poll()
    if writable >= 0:
        waiting.register(writable, select.POLLOUT)
    for descriptor in descriptors:
        if descriptor >= 0:
            waiting.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in waiting.poll(math.ceil(seconds * 1000))]
