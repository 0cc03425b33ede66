"""Launchers that run a command: the job's own, or one with a prefix that forwards stdin and stdout."""

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import IO, Any

from .errors import ConfigError, LaunchError
from .host.child_process import KILL_SECONDS, UNKNOWN, Child
from .host.process_groups import GROUP_GRACE, end_group, kill_group, reap_group
from .interfaces import Job, Launcher, Process


@dataclass(frozen=True, kw_only=True)
class CommandLauncher(Launcher):
    """A launcher with a command prefix (srun, ssh, nice, numactl, a container runtime).

    Subclasses override `command`.

    `prefix`: words before the command of each server, such as those of a container runtime.

    Raises ConfigError: a word of `prefix` is empty.
    """

    prefix: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for number, word in enumerate(self.prefix):
            if not word:
                raise ConfigError("this word is empty: remove it", at=f"$.prefix[{number}]")

    def environment(self, job: Job) -> dict[str, str]:
        """Return the environment in which `launch` runs the command."""
        return {**(os.environ if job.inherited is None else job.inherited), **job.env}

    def launch(self, job: Job) -> Process:
        """Start `command(job)` in a session of its own."""
        return LocalProcess(self.popen(job))

    def popen(
        self, job: Job, *, stdin: int | IO[Any] = subprocess.PIPE, stdout: int | IO[Any] = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        """Start `command(job)`. Stdin and stdout are pipes unless given. Raises LaunchError: it cannot be started."""
        command = self.command(job)
        try:
            with job.log.open("ab") as log:
                return Child(
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
    """A process of this machine that leads a process group. Implements `interfaces.Process`.

    `resources`: closed when the process has been stopped.
    """

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        assert popen.stdin is not None
        assert popen.stdout is not None
        self._popen = popen
        self.stdin: IO[bytes] = popen.stdin
        self.stdout: IO[bytes] = popen.stdout
        self._group_ended = False
        self.resources = contextlib.ExitStack()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its group."""
        return self._popen.pid

    def poll(self) -> int | None:
        """Return the exit code once the process has ended, else None."""
        return self._popen.poll()

    def stop(self, grace: float) -> int:
        """End the whole group: SIGTERM to the process, SIGKILL to the group after `grace` seconds.

        Return the exit code.
        """
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._popen.terminate()
            try:
                self._popen.wait(grace)
            except subprocess.TimeoutExpired:
                self._kill_group()
        if not self._group_ended:
            end_group(self.pid, min(GROUP_GRACE, grace))
            self._group_ended = True
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.stdout.close()
        try:
            code = self._popen.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # killed, but stuck in the kernel
            code = UNKNOWN
        reap_group(self.pid)
        self.resources.close()
        return code

    def waiting(self) -> str | None:
        """Return None: a process of this machine runs at once."""
        return None

    def why(self) -> str | None:
        """Return a sentence if the exit code is unknown because SIGCHLD is ignored, else None."""
        if self._popen.poll() == UNKNOWN and signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            return "its process has ended with an unknown exit code, since SIGCHLD is ignored in this program"
        return None

    def _kill_group(self) -> None:
        kill_group(self.pid)
