"""The task of a server's own job, which cancels the job if its owner is gone: `task.py COMMAND …`.

A job ends when its srun ends, and srun ends when the server has ended. If srun and its owner are killed, for example
when their machine fails, SLURM keeps the empty job and its GPUs. This process reads all that the owner sends to the
server. If the server ends because the owner is gone, this process cancels the job. It is started by its path, and
needs nothing but Python.
"""

import os
import signal
import subprocess
import sys
import threading
import time

SILENCE = 40.0
"""Time without input after which srun counts as gone, in seconds.

It is longer than several heartbeats of the lease, and shorter than the lease's time limit.
"""

ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that make a server end."""
AGAIN = "--again"
"""The option of a server whose nursery runs in its step."""


class OwnerInput:
    """The input from srun, which is passed on to a server."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._last_input = time.monotonic()
        self._is_closed = False

    @property
    def is_owner_gone(self) -> bool:
        """Return whether the owner is gone: it closed its connection before the server ended, or sends nothing."""
        return self._is_closed or time.monotonic() - self._last_input > SILENCE

    def forward(self) -> None:
        """Pass on all input, and its end."""
        try:
            while chunk := os.read(0, 1 << 16):
                self._last_input = time.monotonic()
                while chunk:
                    chunk = chunk[os.write(self._server, chunk) :]
            self._is_closed = True
            os.close(self._server)
        except BrokenPipeError:  # the server has ended
            pass


def main(command: list[str]) -> int:
    """Run a server, and cancel the job afterwards if the owner is gone. Returns the exit code, as a shell would."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # from `scancel --signal=USR1`; the server ignores it from its start
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # SLURM sends it to all processes of the job: the server decides
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        # With control groups, SLURM may signal only this process. A nursery may get the same signal twice.
        if AGAIN in command:
            for number in ENDING:
                signal.signal(number, lambda number, _: server.send_signal(number))
        assert server.stdin is not None
        owner = OwnerInput(os.dup(server.stdin.fileno()))
        server.stdin.close()
        threading.Thread(target=owner.forward, daemon=True).start()
        code = server.wait()
    if owner.is_owner_gone:
        cancel = ["scancel", os.environ["SLURM_JOB_ID"]]
        subprocess.run(cancel, check=False)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
