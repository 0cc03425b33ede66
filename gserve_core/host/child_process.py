"""Commands as child processes, whose unknown exit code is never taken for success."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

KILL_SECONDS = 10.0
"""Maximum time for killed processes to disappear, in seconds."""
UNKNOWN = 255
"""Exit code of a process whose real exit code is unknown."""
FAILED = 1
"""The exit code of a server that has reported why it failed."""
POLL_SECONDS = 0.01
"""Interval between two checks of a process that must end, in seconds."""


class Child(subprocess.Popen[bytes]):
    """A `Popen` whose exit code is `UNKNOWN`, not 0, if other code reaped it, as when SIGCHLD is ignored."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._polling = threading.Lock()
        super().__init__(*args, **options)

    def poll(self) -> int | None:
        """Return the exit code once the process has ended, else None."""
        if self.returncode is None and self._polling.acquire(blocking=False):  # otherwise another thread is taking it
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self.returncode = UNKNOWN
            else:
                super().poll()
            finally:
                self._polling.release()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once the process has ended. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL_SECONDS)
        return code


def output_of(command: Sequence[str], environ: Mapping[str, str], seconds: float) -> str:
    """Run a command to its end; return its output.

    Raises OSError: it cannot be started.
    Raises subprocess.TimeoutExpired: it takes longer than `seconds`.
    Raises subprocess.CalledProcessError: it fails. If its exit code is unknown because SIGCHLD is ignored, it has
    failed if it wrote only to stderr.
    """
    with Child(
        command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = (it.decode(errors="replace") for it in process.communicate(timeout=seconds))
        except BaseException:
            process.kill()
            raise
    is_known = process.returncode != UNKNOWN or signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN
    if process.returncode if is_known else errors and not output:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return output


def describe_rank_end(code: int) -> str | None:
    """Return in words how a rank of a server on several nodes has ended; None: it has reported the reason, if any.

    `code`: its exit code; negative: a signal's number.
    """
    if code in (0, FAILED):
        return None
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"was killed by {name}{', most likely since memory ran out there' * (-code == signal.SIGKILL)}"
