"""Launchers that are a command line: a job's own, or one with a prefix that forwards stdin and stdout."""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .errors import LaunchError
from .interfaces import Job, Launcher, Process

FAREWELL = 1.0
"""Seconds that processes below a server have to end by themselves after it: some free shared memory."""
GONE = 10.0
"""Seconds that killed processes may take to be gone."""


@dataclass(frozen=True, kw_only=True)
class CommandLauncher(Launcher):
    """A launcher that is a command prefix (srun, ssh, nice, numactl, a container runtime): override `command`."""

    def environment(self, job: Job) -> dict[str, str]:
        """Return the environment that `launch` gives the command."""
        return {**os.environ, **job.env}

    def launch(self, job: Job) -> Process:
        """Start `command(job)` in a session of its own."""
        return LocalProcess(self.popen(job))

    def popen(
        self, job: Job, *, stdin: int | IO[Any] = subprocess.PIPE, stdout: int | IO[Any] = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        """Start `command(job)`; stdin and stdout are pipes unless others are given. Raises LaunchError."""
        command = self.command(job)
        try:
            with job.log.open("ab") as log:
                return subprocess.Popen(
                    command,
                    env=self.environment(job),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            raise LaunchError(f"cannot start '{command[0]}' for {job.name}: {error}", log=job.log) from error


class LocalProcess:
    """A process of this machine that leads a process group. Implements `interfaces.Process`."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        assert popen.stdin is not None
        assert popen.stdout is not None
        self._popen = popen
        self.stdin: IO[bytes] = popen.stdin
        self.stdout: IO[bytes] = popen.stdout
        self._group_ended = False

    @property
    def pid(self) -> int:
        """The process id, which is that of the group too."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Return the exit code once the process has ended, else None."""
        return self._popen.poll()

    def stop(self, grace: float) -> int:
        """End the whole group: TERM to the process, KILL to the group after `grace` seconds. Returns the exit code."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._popen.terminate()
            try:
                self._popen.wait(grace)
            except subprocess.TimeoutExpired:
                self._kill_group()
        if not self._group_ended:
            end_group(self.pid, min(FAREWELL, grace))
            self._group_ended = True
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.stdout.close()
        return self._popen.wait()

    def waiting(self) -> str | None:
        """Return None: a process of this machine runs at once."""
        return None

    def why(self) -> str | None:
        """Return None: the exit code is all that is known."""
        return None

    def _kill_group(self) -> None:
        kill_group(self.pid)


def end_group(group: int, grace: float) -> None:
    """See a group of processes end, by force after `grace` seconds; return once it has, or `GONE` seconds later."""
    _wait_for_group(group, grace)
    kill_group(group)
    _wait_for_group(group, GONE)  # a killed process holds its GPU's memory until it is gone


def kill_group(group: int) -> None:
    """Kill all processes of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _wait_for_group(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while group_is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def group_is_alive(group: int) -> bool:
    """Say whether a process of the group is alive; zombies, which only wait to be reaped, are not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(of) == group and state not in "ZX":
                    return True
    return False
