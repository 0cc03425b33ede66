"""What dead services have left behind on this machine, and its end.

A server ends by itself when its owner does. Something is left only where it could not: it was stopped, or stuck in the
kernel, or killed together with its owner.
"""

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import runtime

GRACE = 5.0
"""Seconds that a process has to end by itself, before it is killed; and then, to be gone."""
SHOWN = 100
"""Characters of a command that are shown."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A live process of a server. `started` is in clock ticks since boot, `owner` is the mark of the server's owner."""

    pid: int
    started: int
    instance: str
    owner: str

    def __str__(self) -> str:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            return f"process {self.pid} ({command.strip()[:SHOWN]})"
        return f"process {self.pid}"


def orphans() -> list[Process]:
    """Return the processes whose server's owner is dead: those of this user, for root of all."""
    ours = Path("/proc/self/ns/pid").readlink()  # in a container, the ids of owners stand for other processes
    found = []
    for process in _processes():
        with contextlib.suppress(OSError, ValueError):
            if runtime.is_orphan(process.owner) and Path(f"/proc/{process.pid}/ns/pid").readlink() == ours:
                found.append(process)
    return found


def _processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            started = runtime.process_start(pid)
            lines = os.fsdecode((entry / "environ").read_bytes()).split("\0")
            environ = {name: value for name, _, value in (line.partition("=") for line in lines)}
            if started is not None and runtime.ID_VARIABLE in environ:
                yield Process(
                    pid=pid, started=started,
                    instance=environ[runtime.ID_VARIABLE], owner=environ.get(runtime.OWNER_VARIABLE, ""),
                )  # fmt: skip


def end(processes: Collection[Process]) -> list[Process]:
    """End processes, by force after `GRACE` seconds; return those that live on even so."""
    with contextlib.ExitStack() as stack:
        alive: dict[int, Process] = {}
        for process in processes:
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                if runtime.process_start(process.pid) == process.started:  # else another one has the id now
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
    """Return the temporary folders and the state files of this user that no living server or service uses."""
    return runtime.unused_scratch_folders({process.instance for process in _processes()}) + runtime.stale_files()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
