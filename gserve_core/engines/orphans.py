"""A watchdog that ends an engine's processes when their server dies.

It is needed if the server and its owner die at the same instant: no other process could end the engine then.
An engine calls `watch` in each of its processes.
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
from ..host.forks import call_in_child

GRACE = 2.0
"""Time for the engine to end in its own, more orderly way, in seconds."""
CHECK_SECONDS = 0.05
"""Interval between two checks of the owner, in seconds."""
THREAD = "gserve-orphans"


def watch() -> None:
    """End this process, and the processes that it forks, when the server ends. Idempotent.

    The process then also ignores the signals that a scheduler sends to all processes of a job as a notice.
    Without a server, this does nothing. In the server itself, only its forks are watched.
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
    """Call `watch` in every forked child."""
    # A fork has none of its parent's threads, and vLLM does not load its plugins again there.
    call_in_child(watch)


def _end_with(pid: int, started: int) -> None:
    """Wait for the end of the server; then remove its temporary files, and end this process."""
    end = select.poll()
    # On OSError the server has ended, or the kernel has no pidfds: then it is checked every second.
    with contextlib.suppress(OSError):
        end.register(os.pidfd_open(pid), select.POLLIN)
    while not (processes.has_ended(pid, started) or end.poll(1000)):
        pass
    try:
        deadline = time.monotonic() + GRACE
        while _is_owner_here() and time.monotonic() < deadline:  # a living owner ends this process first
            time.sleep(CHECK_SECONDS)
        sweep.start(os.environ.get(processes.ID_VARIABLE, ""))  # also if the owner is suspended: it may never continue
        time.sleep(max(0.0, deadline - time.monotonic()))
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_owner_here() -> bool:
    """Return whether the server's owner is alive and on this machine; False if that cannot be read."""
    mark = os.environ.get(processes.OWNER_VARIABLE, "")
    try:
        return mark.endswith(f":{processes.boot()}") and not processes.is_orphan(mark)
    except OSError:
        return False
