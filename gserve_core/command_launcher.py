"""Launchers that run a command: the job's own, or one with a prefix that forwards stdin and stdout."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from .errors import LaunchError
from .host import processes
from .interfaces import Job, Launcher, Process

GROUP_GRACE = 1.0
"""Time for processes below a server to end after it, in seconds. Some of them free shared memory."""
KILL_SECONDS = 10.0
"""Maximum time for killed processes to disappear, in seconds."""
UNKNOWN = 255
"""Exit code of a process whose real exit code is unknown."""
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


@dataclass(frozen=True, kw_only=True)
class CommandLauncher(Launcher):
    """A launcher with a command prefix (srun, ssh, nice, numactl, a container runtime).

    Subclasses override `command`.
    """

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


def end_group(group: int, grace: float) -> None:
    """Wait until a process group has ended; kill it after `grace` seconds.

    Returns at most `KILL_SECONDS` seconds after that, even if a process remains.
    """
    _wait_for_group(group, grace)
    kill_group(group)
    _wait_for_group(group, KILL_SECONDS)  # a killed process holds its GPU's memory until it is gone


def kill_group(group: int) -> None:
    """Kill all processes of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _wait_for_group(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while group_is_alive(group) and time.monotonic() < deadline:
        time.sleep(0.01)


def group_is_alive(group: int) -> bool:
    """Return whether a process of the group is alive. Zombies, which only wait to be reaped, do not count."""
    return any(processes.process_start(process.pid) is not None for process in processes.group_members(group))


def reap_group(group: int) -> None:
    """Reap the processes of a group that have ended and are children of this process."""
    processes.reap([process.pid for process in processes.group_members(group)])
