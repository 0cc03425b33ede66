"""Runs a server as the task of a job of its own, and ends the job where nobody else does: `task.py COMMAND …`.

A job ends when its srun does, which ends when the server has. Where srun was killed, and its owner with it, as on a
machine that dies, SLURM keeps the job although nothing is in it, and its GPUs with it. This process hears what the
server hears: once that has ended because its owner is gone, it cancels the job. It is started by its path, and needs
nothing but Python.
"""

import os
import signal
import subprocess
import sys
import threading
import time

SILENCE = 40.0
"""Seconds of silence that say that srun is gone: more than some beats of the lease, less than the time of the lease."""

ENDING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that tell a server to end."""
AGAIN = "--again"
"""The option of a server whose nursery stands in its place."""


class Line:
    """What comes from srun, passed on to a server."""

    def __init__(self, server: int) -> None:
        self._server = server
        self._heard = time.monotonic()
        self._is_closed = False

    @property
    def is_over(self) -> bool:
        """Say whether the owner is gone: it has closed the line before the server ended, or is silent."""
        return self._is_closed or time.monotonic() - self._heard > SILENCE

    def forward(self) -> None:
        """Pass on all that comes, and its end."""
        try:
            while chunk := os.read(0, 1 << 16):
                self._heard = time.monotonic()
                while chunk:
                    chunk = chunk[os.write(self._server, chunk) :]
            self._is_closed = True
            os.close(self._server)
        except BrokenPipeError:  # the server has ended
            pass


def main(command: list[str]) -> int:
    """Run a server, and do what is to be done at its end; return its exit code, as a shell would."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of `scancel --signal=USR1`; the server ignores it from its start
    for number in ENDING:
        signal.signal(number, lambda *_: None)  # SLURM sends it to all processes of the job: the server decides
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        if AGAIN in command:  # or to this one alone, where it has control groups; a nursery may be told twice
            for number in ENDING:
                signal.signal(number, lambda number, _: server.send_signal(number))
        assert server.stdin is not None
        line = Line(os.dup(server.stdin.fileno()))
        server.stdin.close()
        threading.Thread(target=line.forward, daemon=True).start()
        code = server.wait()
    if line.is_over:
        cancel = ["scancel", os.environ["SLURM_JOB_ID"]]
        subprocess.run(cancel, check=False)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
