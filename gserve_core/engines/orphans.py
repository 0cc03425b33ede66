"""The end of an engine's processes when its server and the server's owner die at the same instant.

Nobody else is left to end them then: they notice by themselves. An engine calls `watch` in each of its processes.
"""

import contextlib
import functools
import os
import re
import select
import signal
import threading
import time
from pathlib import Path

from .. import runtime
from ..environment import ignore_notices

GRACE = 2.0
"""Seconds that the engine's own way to end gets, which may be the more orderly one."""
THREAD = "gserve-orphans"
SCRATCH = re.compile("gserve-[0-9a-f]{12}")
"""The name of a server's folder of temporary files."""


def watch() -> None:
    """Have this process, and those that it forks, end when the server does. Does nothing where there is no server.

    Nothing in the server itself, either, except that its forks are watched. Idempotent. The notices that a scheduler
    sends to all processes of a job do not end this one, too.
    """
    server = os.environ.get(runtime.SERVER_VARIABLE)
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
    """Wait for the end of the server; then end this process, and remove the server's folder of temporary files."""
    end = select.poll()
    with contextlib.suppress(OSError):  # gone already; or a kernel that cannot say so: then we look every second
        end.register(os.pidfd_open(pid), select.POLLIN)
    while not (runtime.has_ended(pid, started) or end.poll(1000)):
        pass
    folder = scratch = Path(os.environ.get("TMPDIR", ""))
    is_ours = SCRATCH.fullmatch(scratch.name)
    with contextlib.suppress(OSError):  # it is no link; or another process of the engine has removed it by now
        folder = scratch.readlink()
    for pause in (0.0, GRACE):  # at once, as this process may end by itself; and what it has written meanwhile
        time.sleep(pause)
        if is_ours:
            runtime.remove_scratch(folder)
    os.kill(os.getpid(), signal.SIGKILL)
