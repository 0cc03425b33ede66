"""The processes and files that dead services have left behind on this machine, and their removal.

A server ends itself when its owner ends. It leaves something behind only if it could not: it was suspended, stuck in
the kernel, or killed together with its owner.
"""

import contextlib
import os
import select
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from .host import processes, scratch
from .service import records

GRACE = 5.0
"""Time for a process to end after SIGTERM, and again to disappear after SIGKILL, in seconds."""
SHOWN = 100
"""Maximum number of characters of a command in a message."""
PROGRAMS = "/vllm_server.py", "/mps_keeper.py"
"""Ends of the paths of the programs of servers and of what runs beside them, which are in their commands."""
NURSERY = ["gserve", "nursery"]
"""Beginning of a nursery's command."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A live process with the marks of a server. It may have inherited all of them: see `orphans`.

    started: start of the process, in clock ticks since boot.
    instance, owner, server: values of ID_VARIABLE, OWNER_VARIABLE and SERVER_VARIABLE in its environment. `server` is
    empty in the server itself.
    """

    pid: int
    started: int
    parent: int
    session: int
    instance: str
    owner: str
    server: str = ""
    temporary: Path

    def __str__(self) -> str:
        with contextlib.suppress(OSError, psutil.Error):
            command = " ".join(psutil.Process(self.pid).cmdline())
            return f"process {self.pid} ({command.strip()[:SHOWN]})"
        return f"process {self.pid}"


def orphans() -> list[Process]:
    """Return this user's server processes whose owner is dead; for root, the processes of all users.

    A process that only inherited a server's environment is left out. It must be the server, be in a session of the
    server, or descend from such a process.
    """
    ours = processes.namespace()  # in a container, the owners' process ids mean other processes
    marked: dict[int, Process] = {}
    for process in _processes():
        with contextlib.suppress(OSError, ValueError):
            if processes.is_orphan(process.owner) and processes.namespace(process.pid) == ours:
                marked[process.pid] = process
    sessions = {(process.session, process.instance) for process in marked.values() if _is_server(process)}
    found = {pid for pid, process in marked.items() if (process.session, process.instance) in sessions}
    found |= {pid for pid, process in marked.items() if _is_in_session(process)}
    while more := {pid for pid, process in marked.items() if _descends(process, found, marked)} - found:
        found |= more
    return [process for pid, process in marked.items() if pid in found]


def _is_server(process: Process) -> bool:
    """Return whether it is a server, a nursery, the keeper of an MPS daemon, or a launcher's process before one."""
    if process.server:
        return False
    owner = scratch.find_owner(process.instance, process.temporary)
    if owner is not None and (owner.pid, owner.started) == (process.pid, process.started):
        return True
    with contextlib.suppress(OSError, psutil.Error):
        words = psutil.Process(process.pid).cmdline()
        return words[:2] == NURSERY or any(word.endswith(PROGRAMS) for word in words)
    return False


def _is_in_session(process: Process) -> bool:
    """Return whether a process is in the session of a server, which may have ended."""
    leader, _, started = process.server.partition(":")
    if leader == str(process.session) and started.isdecimal() and process.started >= int(started):
        return True  # an id is not reused while its session exists
    owner = scratch.find_owner(process.instance, process.temporary)
    return owner is not None and owner.session == process.session and process.started >= owner.started


def _descends(process: Process, found: Collection[int], marked: Mapping[int, Process]) -> bool:
    return process.parent in found and marked[process.parent].instance == process.instance


def _processes() -> Iterator[Process]:
    for pid, environ in processes.environments(processes.ID_VARIABLE):
        with contextlib.suppress(OSError, psutil.Error):
            started = processes.process_start(pid)
            if started is not None and processes.ID_VARIABLE in environ:
                yield Process(
                    pid=pid, started=started, parent=psutil.Process(pid).ppid(), session=os.getsid(pid),
                    instance=environ[processes.ID_VARIABLE], owner=environ.get(processes.OWNER_VARIABLE, ""),
                    server=environ.get(processes.SERVER_VARIABLE, ""),
                    temporary=Path(environ.get("TMPDIR") or tempfile.gettempdir()),
                )  # fmt: skip


def end(left: Collection[Process]) -> list[Process]:
    """End processes, by force after `GRACE` seconds; return those still alive after that."""
    with contextlib.ExitStack() as stack:
        alive: dict[int, Process] = {}
        for process in left:
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                if processes.process_start(process.pid) == process.started:  # otherwise its id was reused
                    alive[descriptor] = process
        for number in (signal.SIGTERM, signal.SIGKILL):
            for descriptor in alive:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(descriptor, number)
            deadline = time.monotonic() + GRACE
            while alive and (remaining := deadline - time.monotonic()) > 0:
                ended = select.poll()
                for descriptor in alive:
                    ended.register(descriptor, select.POLLIN)
                for descriptor, _ in ended.poll(remaining * 1000):
                    del alive[descriptor]
    return list(alive.values())


def unused_files() -> list[Path]:
    """Return this user's temporary folders and state files that no live server or service uses."""
    unused = scratch.unused({process.instance for process in _processes()})
    return unused + scratch.unused_weights() + records.stale_files()


def unreadable() -> list[records.Unreadable]:
    """Return the unreadable files among the services' records. They are not removed."""
    return records.unreadable()


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content and the link to it."""
    if path.is_dir() and not path.is_symlink():
        scratch.remove(path)
    else:
        path.unlink(missing_ok=True)
