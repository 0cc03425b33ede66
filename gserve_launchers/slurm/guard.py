"""A guard that ends an srun whose owner is gone: `python guard.py PID`, with srun's process id and srun's stdin.

A job in SLURM's queue has no server yet that could notice the end of the lease. Without a guard it would keep waiting,
and then take a place in the cluster for nothing. The guard runs as long as srun. It reads nothing from stdin: the
closed pipe shows that the owner is gone. It is started by its path, and needs nothing but Python.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE = 10.0
"""Time for the server and srun to end on their own, in seconds."""
CHECK_SECONDS = 1.0
"""Interval between two checks of srun, in seconds."""


def guard(srun: int) -> None:
    """Wait for the end of srun. If the owner ends first, terminate srun, which also ends its job."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM may send it to all processes of a batch job
    began = start_time(srun)
    pipe = select.poll()
    pipe.register(sys.stdin.fileno(), 0)  # reports only that the other end is closed
    while start_time(srun) == began and not pipe.poll(CHECK_SECONDS * 1000):
        pass
    deadline = time.monotonic() + GRACE
    while start_time(srun) == began and time.monotonic() < deadline:
        time.sleep(CHECK_SECONDS)
    if began is not None and start_time(srun) == began:
        os.kill(srun, signal.SIGTERM)


def start_time(pid: int) -> str | None:
    """Return the start time of a process, in clock ticks since boot; None if it has ended."""
    # The time distinguishes it from a later process with the same id.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


if __name__ == "__main__":
    guard(int(sys.argv[1]))
