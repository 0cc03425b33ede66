"""An srun and the server that it runs, from start to end."""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

from gserve_core.command_launcher import LocalProcess
from gserve_core.errors import StartupTimeout
from gserve_core.host.child_process import KILL_SECONDS, UNKNOWN, describe_rank_end
from gserve_core.host.forks import call_in_child
from gserve_core.interfaces import Job
from gserve_core.lease import Silence

from .command_line import program
from .query import SQUEUE, query_slurm

QUEUE_CHECK_SECONDS = 1.0, 15.0
"""First and maximum interval between two queries about a waiting job, in seconds.

The interval doubles each time, as soon as SLURM has the job.
"""
STEP_SECONDS = 120.0
"""Maximum wait of a step for its place in the allocation, in seconds, unless `queue_timeout` is set."""
FORCE_SECONDS = 10.0
"""Maximum time for srun to kill its job, in seconds."""
SETTLE_SECONDS = 3.0
"""Maximum time for SLURM to notice that a job has ended after its srun has ended, in seconds."""
KILL_WAIT_SECONDS = 60.0
"""Maximum time for SLURM to end a cancelled job, in seconds: its KillWait, 30 s by default, and a margin."""
CHECK_SECONDS = 0.02
"""Interval between two checks of a server that should end, in seconds."""
CHUNK = 1 << 16
"""Maximum size of one read, in bytes."""
END = b"end\n"
"""The line that makes the nursery of a step kill its server."""
TAIL = 1 << 16
"""Size of the end of a log that is searched for messages of srun, in bytes."""
SUSPENDED = "SUSPENDED", "STOPPED"
"""SLURM's states of a job whose processes are stopped."""
STATE_REASONS = {  # SLURM's states of a job that SLURM has ended or suspended, in words
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "its deadline was reached",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it needed more memory than it had requested (mem)",
    "PREEMPTED": "another job preempted it",
    "REVOKED": "it was revoked",
    "SUSPENDED": "it was suspended",
    "TIMEOUT": "its time limit was reached (time)",
}
STATE_MESSAGES = (  # messages of srun and slurmstepd about a step, and the state that each means
    (r"CANCELLED AT \S+ DUE TO TIME LIMIT", "TIMEOUT"),
    (r"CANCELLED AT \S+ DUE TO PREEMPTION", "PREEMPTED"),
    (r"CANCELLED AT \S+ DUE TO NODE FAILURE|Node failure on", "NODE_FAIL"),
    (r"(?i:out.of.memory|oom.kill|exceeded \w+ memory limit)", "OUT_OF_MEMORY"),
    (r"CANCELLED AT", "CANCELLED"),
)
RANK_ENDED = re.compile(r"srun: error: (\S+): task (\d+): (.+)")
"""srun's message that a rank's process has ended with an error: its node, its rank, and how."""
logger = logging.getLogger("gserve.slurm")


class SlurmProcess(LocalProcess):
    """An srun, and the job or step that it has created. Implements `interfaces.Process`.

    `title`: the name of the job or step.
    `allocation`: the id of the job that the step belongs to; None: srun creates a job of its own.
    `limit`: maximum wait in the queue, in seconds; None: `STEP_SECONDS` for a step, else no limit.
    `log`: the file to which srun writes its stderr.
    `has_ranks`: whether srun starts a process on each of several nodes.
    """

    def __init__(
        self,
        popen: "subprocess.Popen[bytes]",
        title: str,
        allocation: str | None,
        limit: float | None,
        log: Path,
        *,
        has_ranks: bool = False,
    ) -> None:
        super().__init__(popen)
        self._guard = _guard(popen)
        self._title = title
        self._allocation = allocation
        self._limit = STEP_SECONDS if allocation and limit is None else limit
        self._log = log
        self._has_ranks = has_ranks
        self._waited = Silence(QUEUE_CHECK_SECONDS[0])
        self._awaited = "a free place in its job" if allocation else "SLURM's answer"
        self._runs = False
        self._was_forced = False
        self._was_suspended = False
        self._is_gone = False
        call_in_child(self.close_stdin)  # a fork that keeps the pipe open would hide the end of this process
        threading.Thread(target=self._watch_queue, name=title, daemon=True).start()

    def poll(self) -> int | None:
        """Return the exit code of the server once srun has ended (negative: a signal's number), else None."""
        code = super().poll()
        return code if code is None or not 128 < code <= 192 else 128 - code  # srun returns 128 plus a signal's number

    def waiting(self) -> str | None:
        """Return the reason why the job waits, in SLURM's words; None once it runs.

        Raises StartupTimeout: it has waited too long.
        """
        if self._runs:
            return None
        if self._limit is not None and self._waited.update() > self._limit:
            hint = (
                "other steps of the job use the resources that it requests"
                if self._allocation
                else "request less, or wait longer"
            )
            raise StartupTimeout(
                f"{self._title} waited {self._limit:g} s (queue_timeout) for {self._awaited}:"
                f" {hint} (log: {self._log})",
                log=self._log,
            )
        return f"waiting for {self._awaited}"

    def why(self) -> str | None:
        """Return how SLURM has ended the job; None if it ended on its own, or if `stop` has ended it.

        A job that runs without progress, or that `stop` has ended because of that, may have been suspended by SLURM.
        Then this returns that.
        """
        has_ended = self._popen.poll() is not None
        if self._was_suspended or (not has_ended and self._is_suspended()):
            return self._describe_state("SUSPENDED", self._allocation or self._title)
        if self._was_forced or not has_ended:
            return None
        if self._popen.returncode < 0:
            return f"its srun was killed by {signal.Signals(-self._popen.returncode).name}"
        rows = self._query_job("--states=all")
        number, state, _ = rows[-1] if rows else (self._allocation or self._title, "", "")
        # A cancelled job has ranks that were killed too, and srun may report these first.
        if self._has_ranks and state != "CANCELLED" and (end := self._read_rank_end()) is not None:
            return end or None
        if state not in STATE_REASONS:
            state = self._query_accounting() or self._read_last_state() or ""
        return self._describe_state(state, number) if state in STATE_REASONS else None

    def _describe_state(self, state: str, number: str) -> str:
        what = f"its step of job {number}" if self._allocation else f"its job {number}"
        return f"SLURM reports {state} for {what}: {STATE_REASONS[state]}"

    def stop(self, grace: float) -> int:
        """Wait `grace` seconds for the server to end as it was asked to; then kill it. Returns the exit code."""
        if not self._is_gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace)
            if self._popen.poll() is None:
                self._was_forced = True
                self._was_suspended = self._is_suspended()
                self._popen.terminate()  # makes srun kill the server and end its job
                try:
                    self._popen.wait(FORCE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._kill_group()
            self._end_job()
            self._is_gone = True
        self.close_stdin()
        self.stdout.close()
        self._guard.kill()
        for process in (self._popen, self._guard):
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed, but the kernel has not ended it yet
                process.wait(KILL_SECONDS)
        code = self.poll()
        return UNKNOWN if code is None else code

    def _is_suspended(self) -> bool:
        return any(state in SUSPENDED for _, state, *_ in self._query_job() or ())

    def close_stdin(self) -> None:
        """Close srun's stdin, which makes the server, or its nursery, end."""
        with contextlib.suppress(OSError):
            self.stdin.close()

    def write_to(self, log: Path) -> None:
        """Make srun write its stderr to the file `log` from now on. Raises OSError."""
        # srun keeps its log open: so the old text moves to another file, and the open file gets the new name.
        shutil.copyfile(self._log, log)
        os.truncate(self._log, 0)  # srun appends, so its next line is the first one
        between = log.with_name(f"{log.name}.new")
        self._log.rename(between)
        log.rename(self._log)
        between.rename(log)
        self._log = log

    def _end_job(self) -> None:
        """Wait until SLURM no longer lists the job; cancel it if it continues although its srun has ended."""
        began = time.monotonic()
        # A job that ended on its own is not cancelled at once: SLURM would record it as cancelled.
        patience = 0.0 if self._was_forced or self._popen.returncode < 0 else SETTLE_SECONDS
        while (rows := self._query_active()) != []:
            # A cancelled step is killed at once. One that remains has lost its slurmstepd, and remains forever.
            if time.monotonic() - began > (FORCE_SECONDS if rows is None or self._allocation else KILL_WAIT_SECONDS):
                logger.warning("SLURM may not have ended %s: see squeue --name=%s", self._title, self._title)
                break
            for number, state, *_ in rows or ():
                if state != "COMPLETING" and time.monotonic() - began >= patience:
                    query_slurm("scancel", number)
            time.sleep(QUEUE_CHECK_SECONDS[0] / 2)

    def _watch_queue(self) -> None:
        """Ask SLURM why the job waits, until it runs. Runs in a thread of its own."""
        pause = QUEUE_CHECK_SECONDS[0]
        while not self._runs and self._popen.poll() is None:
            rows = self._query_active()
            for number, state, reason in rows or ():
                self._runs = state not in ("PENDING", "CONFIGURING")
                self._awaited = f"SLURM's queue (job {number}, {reason})"
            time.sleep(pause)
            if rows != [] or self._allocation:  # else SLURM does not have the job yet
                pause = min(2 * pause, QUEUE_CHECK_SECONDS[1])

    def _query_active(self) -> list[list[str]] | None:
        """Return a row with id, state and reason for our job or step; no row if SLURM has none; None: unknown."""
        if self._allocation is None:
            return self._query_job()
        steps = query_slurm(*SQUEUE, "--steps", f"--jobs={self._allocation}", "--format=%i|%j")
        if steps is None:  # the allocation may have ended, and the step with it
            return [] if query_slurm(*SQUEUE, "--jobs=1,1", "--format=%i") is not None else None
        return [[number, "RUNNING", ""] for number, title in steps if title == self._title]

    def _query_job(self, *options: str) -> list[list[str]] | None:
        """Return rows with id, state and reason for our job, or for the job of our step; None: unknown."""
        which = f"--jobs={self._allocation}" if self._allocation else f"--name={self._title}"
        return query_slurm(*SQUEUE, which, "--format=%i|%T|%r", *options)

    def _query_accounting(self) -> str | None:
        """Return the final state of the job or step from SLURM's accounting; None if it has none."""
        which = f"--jobs={self._allocation}" if self._allocation else f"--name={self._title}"
        rows = query_slurm("sacct", "--noheader", "--parsable2", "--delimiter=|", which, "--format=JobName,State") or ()
        return next((state.split()[0] for name, state in rows if name == self._title and state), None)

    def _read_rank_end(self) -> str | None:
        """Return how a rank has ended, if that was the first event; None if SLURM has ended all.

        "": the rank has reported the reason itself. After the first one, SLURM ends the others.
        """
        for line in self._read_messages():
            if any(re.search(words, line) for words, _ in STATE_MESSAGES):
                return None
            if ended := RANK_ENDED.match(line):
                node, rank, text = ended.groups()
                how = _describe_end(text)
                return f"rank {rank} on {node} {how}" if how else ""
        return None

    def _read_last_state(self) -> str | None:
        """Return the state that the last messages of srun in the log mean; None if they mean none."""
        messages = self._read_messages()
        return next(
            (state for words, state in STATE_MESSAGES if any(re.search(words, line) for line in messages)), None
        )

    def _read_messages(self) -> list[str]:
        """Return the last messages of srun and slurmstepd in the log."""
        try:
            with self._log.open("rb") as stream:
                stream.seek(max(0, self._log.stat().st_size - TAIL))
                text = stream.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if re.match(r"(srun|slurmstepd\S*): ", line)]


def _describe_end(text: str) -> str | None:
    """Return in words how a task ended, from srun's message; None if the server itself has chosen to end."""
    if exited := re.match(r"Exited with exit code (\d+)", text):
        code = int(exited[1])
        return describe_rank_end(128 - code if 128 < code <= 192 else code)
    number = next((it for it in signal.Signals if text.startswith(str(signal.strsignal(it)))), None)
    return f"ended: {text}" if number is None else describe_rank_end(-number)


class ServerInStep:
    """One generation of a server, in a step that may run several. Implements `interfaces.Process`.

    Its stdin is srun's stdin. Its stdout is srun's stdout, without the nursery's line that the server has ended.
    """

    def __init__(self, step: SlurmProcess, instance: str) -> None:
        self._step = step
        self._ended = re.compile(rf"ended {instance} (-?\d+)".encode())
        self.stdin: IO[bytes] = os.fdopen(os.dup(step.stdin.fileno()), "wb", 0)
        stdout, write = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb", 0)
        self._pipe: IO[bytes] = os.fdopen(write, "wb", 0)
        for descriptor in (step.stdout.fileno(), write):
            os.set_blocking(descriptor, False)
        self._line = b""
        self._unread = b""
        self._code: int | None = None
        self._has_output = False
        self._has_ended = False
        self._is_stopped = False
        self._is_last = False

    @property
    def can_start_next(self) -> bool:
        """Return whether the step may start another generation: this one has ended, and the step has not."""
        return self._has_ended and not self._is_last and self._step.poll() is None

    def start_next(self, job: Job) -> "ServerInStep":
        """Start the next generation, for `job`. Raises OSError: the log cannot be switched to `job.log`."""
        self._step.write_to(job.log)
        return ServerInStep(self._step, job.instance)

    def release(self) -> None:
        """Make the step end with this generation."""
        self._is_last = True
        if self._is_stopped:
            self._step.close_stdin()

    def poll(self) -> int | None:
        """Return the exit code of the server once it or srun has ended, else None. Also forwards output to `stdout`."""
        self._read_output()
        if self._unread:
            with contextlib.suppress(BlockingIOError):
                self._unread = self._unread[os.write(self._pipe.fileno(), self._unread) :]
        return None if self._unread else self._code

    def waiting(self) -> str | None:
        """Return the reason why the job waits, in SLURM's words; None once it runs.

        Raises StartupTimeout: it has waited too long.
        """
        return self._step.waiting()

    def why(self) -> str | None:
        """Return how SLURM has ended the job; None if only the server has ended."""
        return None if self._has_ended else self._step.why()

    def stop(self, grace: float) -> int:
        """Wait `grace` seconds for the server to end, then kill it. Returns the exit code.

        Also ends the step, if this is its last generation, or if the server cannot be killed alone.
        """
        if self._wait(grace) is None and self._has_output and not self._is_last:
            with contextlib.suppress(OSError):
                os.write(self._step.stdin.fileno(), END)
            self._wait(FORCE_SECONDS)
        for stream in (self.stdin, self.stdout, self._pipe):
            with contextlib.suppress(OSError):
                stream.close()
        self._unread = b""
        self._is_stopped = True
        if not self._has_ended:
            self._code = self._step.stop(0.0)
        elif self._is_last:
            self._step.close_stdin()
            self._step.stop(FORCE_SECONDS)
        assert self._code is not None
        return self._code

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self._code is None and time.monotonic() < deadline:
            self._read_output()
            time.sleep(CHECK_SECONDS)
        return self._code

    def _read_output(self) -> None:
        """Read srun's output, and set the exit code if the server or srun has ended."""
        if self._code is not None:
            return
        code = self._step.poll()  # before the read, so that all output until the end is read
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._step.stdout.fileno(), CHUNK):
                self._has_output = True
                *lines, self._line = (self._line + chunk).split(b"\n")
                for line in lines:
                    if ended := self._ended.fullmatch(line):
                        self._has_ended, code = True, int(ended[1])
                    else:
                        self._unread += line + b"\n"
        self._code = code


def _guard(srun: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
    """Start a process that ends srun when this process has ended."""
    assert srun.stdin is not None
    with Path(f"/proc/self/fd/{srun.stdin.fileno()}").open("rb", buffering=0) as line:  # srun's end of the pipe
        return subprocess.Popen(
            [*program("guard.py"), str(srun.pid)],
            stdin=line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
