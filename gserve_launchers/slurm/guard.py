"""Ends an srun whose owner is gone: `python guard.py PID`, which is srun's, and with the same stdin as srun.

A job that waits in SLURM's queue has no server yet that could notice the end of the lease: it would wait on, and take
a place in the cluster for nothing. This process lives as long as srun does, and reads nothing: that the owner is gone
is told by the pipe itself. It is started by its path, and needs nothing but Python.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE = 10.0
"""Seconds that a server has to end by itself, and srun with it."""
LOOK = 1.0
"""Seconds between two looks at srun."""


def guard(srun: int) -> None:
    """Wait for the end of srun; where that of the owner comes first, terminate srun, which takes its job along."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # may come to all processes of a batch job
    began = start(srun)
    line = select.poll()
    line.register(sys.stdin.fileno(), 0)  # tells no more than that it is closed at the other end
    while start(srun) == began and not line.poll(LOOK * 1000):
        pass
    deadline = time.monotonic() + GRACE
    while start(srun) == began and time.monotonic() < deadline:
        time.sleep(LOOK)
    if began is not None and start(srun) == began:
        os.kill(srun, signal.SIGTERM)


def start(pid: int) -> str | None:
    """Return when a process began, which tells it from another that has its id later; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    guard(int(sys.argv[1]))
