"""A command that a user has gserve run, from start to end: that of `gserve run`, and that of `gserve watch`.

It leads a process group. At a terminal it stays in our group, as the shell's job control and Ctrl-C require. Processes
that it leaves are then not ended.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from gserve_core.host.child_process import KILL_SECONDS
from gserve_core.host.process_groups import end_group

TERM_GRACE = 5.0
"""Time between SIGTERM and SIGKILL for a command that does not end, and for its other processes, in seconds."""


class UserCommand:
    """A running command. `environ`: variables that it has besides ours.

    Raises OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._has_group = not _is_at_terminal()
        self._process = subprocess.Popen(
            command, env=os.environ | environ, process_group=0 if self._has_group else None
        )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait for its end; return its exit code, or 128 plus the number of the signal that killed it."""
        return _shown_code(self._process.wait())

    def forward(self, number: int) -> None:
        """Send a signal to its process group, if that is its own."""
        if self._has_group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def end(self) -> int:
        """End it if it is still running, and the rest of its group if that is its own; return its code: see `wait`."""
        process = self._process
        if self.is_running:
            if self._has_group:
                self.forward(signal.SIGTERM)
            else:
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_GRACE)
            process.kill()
        try:
            code = process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # killed, but the kernel has not ended it yet
            code = -signal.SIGKILL
        if self._has_group:
            self.forward(signal.SIGTERM)
            end_group(process.pid, TERM_GRACE)
        return _shown_code(code)


def _shown_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _is_at_terminal() -> bool:
    """Return whether stdin is a terminal and our process group is in its foreground."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
