"""The end of an engine's processes when its server and the server's owner die at the same instant.

Nobody else is left to end them then: they notice by themselves. An engine calls `watch` in each of its processes.
"""

import contextlib
import functools
import os
import select
import signal
import threading
import time

from ..host import processes, sweep
from ..host.environment import ignore_notices

GRACE = 2.0
"""Seconds that the engine's own way to end gets, which may be the more orderly one."""
LOOK_SECONDS = 0.05
"""Interval between two looks at the owner, in seconds."""
THREAD = "gserve-orphans"


def watch() -> None:
    """Have this process, and those that it forks, end when the server does. Does nothing where there is no server.

    Nothing in the server itself, either, except that its forks are watched. Idempotent. The notices that a scheduler
    sends to all processes of a job do not end this one, too.
    """
    server = os.environ.get(processes.SERVER_VARIABLE)
    if not server:
        return
    _watch_forks()
    ignore_notices()
    pid, started = map(int, server.split(":"))
    if pid != os.getpid() and all(thread.name != THREAD for thread in threading.enumerate()):
        threading.Thread(target=_end_with, args=(pid, started), name=THREAD, daemon=True).start()


@functools.cache
def _watch_forks() -> None:
    """Call `watch` in every forked child: threads do not go along, and vLLM takes its plugins there for loaded."""
    os.register_at_fork(after_in_child=watch)


def _end_with(pid: int, started: int) -> None:
    """Wait for the end of the server; then end this process, and have the server's temporary files removed."""
    end = select.poll()
    with contextlib.suppress(OSError):  # gone already; or a kernel that cannot say so: then we look every second
        end.register(os.pidfd_open(pid), select.POLLIN)
    while not (processes.has_ended(pid, started) or end.poll(1000)):
        pass
    try:
        deadline = time.monotonic() + GRACE
        while _is_owner_here() and time.monotonic() < deadline:  # it ends this process first
            time.sleep(LOOK_SECONDS)
        sweep.start(os.environ.get(processes.ID_VARIABLE, ""))  # also where the owner is stopped: it may never go on
        time.sleep(max(0.0, deadline - time.monotonic()))
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_owner_here() -> bool:
    """Say whether the server's owner is alive, and on this machine; not where that cannot be read for now."""
    mark = os.environ.get(processes.OWNER_VARIABLE, "")
    try:
        return mark.endswith(f":{processes.boot()}") and not processes.is_orphan(mark)
    except OSError:
        return False
