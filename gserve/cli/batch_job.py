"""A command and the service that it uses, from start to end: `gserve run`, and each job of `gserve sbatch`.

Both may have to end early. SIGUSR1 means that a job's time is nearly over; SIGTERM means that it is over. From then on
the service takes no more items, and finishes those in flight. The command gets the others back as errors, and should
end on its own.

The process group of the command ends with it: see `UserCommand`.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gserve_core.batch.output_lock import check_free
from gserve_core.errors import ConfigError, GserveError, PluginError
from gserve_core.host.environment import ATTACH_VARIABLE
from gserve_core.host.logs import setup_logging
from gserve_core.service import records
from gserve_core.service.service import VLLMService
from gserve_core.service.state import State
from gserve_launchers.slurm import batch, query

from .user_command import UserCommand

TICK = 0.1
"""Interval between two checks of the command, in seconds."""
PATIENCE = 80.0
"""Default time for a command to end after SIGUSR1, in seconds."""
LAST_SECONDS = 10.0
"""Time for a command to end after any other signal, in seconds, unless `gserve stop` has set one.

SLURM kills everything 30 s (its KillWait) after SIGTERM, or sooner.
"""
REQUEUES = 10
"""Maximum number of times that a job is requeued. A job without progress ends then."""
NOTICES = {
    signal.SIGUSR1: "its job's time is nearly over",
    signal.SIGTERM: "it was asked to stop, or its job's time limit was reached",
    signal.SIGINT: "it was interrupted",
    signal.SIGHUP: "its terminal was closed",
}
"""The signals that end a command early, and why."""
FORWARDED = signal.SIGINT, signal.SIGHUP
"""Signals that are forwarded to the command's process group, as a terminal would send them to all processes.

The others are not forwarded: they would kill the command, which should end in order.
"""

logger = logging.getLogger("gserve.job")


@dataclass(frozen=True)
class Ended:
    """The end of a command.

    `code`: its exit code, or 128 plus the number of the signal that killed it.
    `notice`: the first signal that asked it to end early; None: no signal did.
    """

    code: int
    notice: int | None = None


class Notices:
    """A collector of the signals that end a command early; SIGUSR1 may be delayed until it is due.

    SLURM sends SIGUSR1 too early if it did not know the job's time limit, or rounds it. A SIGUSR1 that comes much too
    early, or a second time, counts at once.

    `asked`: the requested number of seconds between SIGUSR1 and the time limit; 0: SIGUSR1 counts at once.
    """

    def __init__(self, asked: int = 0) -> None:
        self.counted: list[int] = []
        self.remaining: float | None = None
        self.asked = asked
        self._received: list[int] = []
        self._due: float | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: record its number."""
        self._received.append(number)

    def collect_due(self) -> list[int]:
        """Return the numbers of the signals that have begun to count since the last call."""
        new = []
        while self._received:
            number = self._received.pop(0)
            if number == signal.SIGUSR1:
                wait = 0.0 if self._due is not None else self._seconds_until_due()
                if wait > 0.0 and self.asked and (self.remaining or 0) <= self.asked + batch.EARLY:
                    logger.info("the job reaches its time limit in %.0f s: continuing for %.0f s", self.remaining, wait)
                    self._due = time.monotonic() + wait
                    continue
                self._due = None
            new.append(number)
        if self._due is not None and time.monotonic() >= self._due:
            wait = self._seconds_until_due()  # the job may have got more time, or been suspended
            self._due = time.monotonic() + wait if wait > 1.0 else None
            if self._due is None:
                new.append(signal.SIGUSR1)
        self.counted += new
        return new

    def _seconds_until_due(self) -> float:
        """Ask SLURM for the remaining time; return the seconds until SIGUSR1 is due, 0 if SLURM does not know."""
        job = os.environ.get("SLURM_JOB_ID")
        times = batch.remaining_time(job) if job else None
        if times is None:
            return 0.0
        self.remaining, limit = times
        return self.remaining - batch.notice_seconds(limit)


def run(
    config: Path | str, overrides: Sequence[str], command: Sequence[str], patience: float | None = None, asked: int = 0
) -> Ended:
    """Start the service of a config, run `command` with $GSERVE_ATTACH set, and end both.

    `overrides`: changes to the config, as "KEY.KEY=VALUE".
    `patience`: time for the command to end after SIGUSR1, in seconds; None: `PATIENCE`, or less if the job's remaining
    time is shorter.
    `asked`: the requested number of seconds between SIGUSR1 and the job's time limit; 0: unknown. SIGUSR1 then counts
    at once, unless `patience` is None: in that case `batch.NOTICE` is assumed.

    Raises LaunchError, ConfigError, PluginError: the service or the command cannot be started.
    """
    setup_logging()
    if shutil.which(command[0]) is None:
        raise ConfigError(f"cannot run '{command[0]}': no such program on this machine")
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        os.environ.pop("XDG_RUNTIME_DIR", None)  # it belongs to a login, maybe on another machine, and ends with it
    name = "-".join(filter(None, ("run", job, str(os.getpid()))))
    service = VLLMService.from_yaml(config, overrides=overrides, name=name)
    notices = Notices(asked or (batch.NOTICE if patience is None else 0))
    handlers = {
        number: signal.signal(number, notices)
        for number in NOTICES
        if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        _start(service, notices)
        if notices.counted:
            return Ended(128 + notices.counted[0], notices.counted[0])
        return _run_command(service, name, command, patience, notices)
    finally:
        service.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(service: VLLMService, notices: Notices) -> None:
    """Start a service and log its phases; shut it down if a notice comes first."""
    shown: dict[str, str] = {}
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(service.start)
        while not wait([starting], TICK).done:
            for server in service.status():
                if server.state == State.STARTING and server.phase and shown.get(server.name) != server.phase:
                    shown[server.name] = server.phase
                    logger.info("%s: %s", server.name, server.phase)
            notices.collect_due()
            if notices.counted:  # repeated, since the service may not have begun to start
                service.shutdown()
        if not notices.counted:
            starting.result()


def _run_command(
    service: VLLMService, name: str, command: Sequence[str], patience: float | None, notices: Notices
) -> Ended:
    """Run a command to its end. After a notice, drain the service, and end the command when its time is over."""
    logger.info("%d servers are ready: running the command", sum(it.state == State.READY for it in service.status()))
    deadline = math.inf
    running = UserCommand(command, {ATTACH_VARIABLE: name})
    try:
        while running.is_running and time.monotonic() < deadline:
            for number in notices.collect_due():
                seconds = _seconds(number, patience, notices)
                deadline = min(deadline, time.monotonic() + seconds)
                why = NOTICES[signal.Signals(number)]
                logger.warning("the service is ending: %s; the command has %.0f s to end", why, seconds)
                service.drain(why)
                if number in FORWARDED:
                    running.forward(number)
            time.sleep(TICK)
        if running.is_running:
            logger.warning("the command did not end in time: terminating it")
    finally:
        code = running.end()
    return Ended(code, notices.counted[0] if notices.counted else None)


def _seconds(number: int, patience: float | None, notices: Notices) -> float:
    """Return the time for a command to end after the signal `number`, in seconds."""
    if number == signal.SIGUSR1:
        return _patience(patience, notices)
    asked = None
    if number == signal.SIGTERM:
        with contextlib.suppress(GserveError):
            asked = records.take_stop()
    return LAST_SECONDS if asked is None else asked


def _patience(patience: float | None, notices: Notices) -> float:
    """Return the time for a command to end after SIGUSR1, in seconds."""
    seconds = PATIENCE if patience is None else patience
    # unknown remaining time, or a user's choice
    if notices.remaining is None or not (patience is None or notices.asked):
        return seconds
    return min(seconds, batch.COMMAND_SHARE * notices.remaining)


def _run_task(file: Path) -> int:
    """Run the task in the file of a job; return the exit code. The file remains while the job may be run again."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    order = batch.read(file, is_again=restarts > 0).of_task(os.environ.get("SLURM_ARRAY_TASK_ID", ""))
    job = os.environ["SLURM_JOB_ID"]
    is_ours = not order.tasks  # the tasks of an array share the file: the next submission removes it
    if is_ours and not order.requeue:
        file.unlink()
    try:
        if order.output:
            check_free(Path(order.output), query.is_over)
        ended = run(order.config, order.overrides, order.command, order.patience, order.notice)
    except (GserveError, OSError):
        if is_ours and not _is_ended_by_slurm(job):
            file.unlink(missing_ok=True)
        raise
    if order.requeue and ended.notice == signal.SIGUSR1 and ended.code:
        _requeue(job, restarts)
    elif is_ours and order.requeue and ended.notice in (None, signal.SIGUSR1) and not _is_ended_by_slurm(job):
        file.unlink(missing_ok=True)
    return ended.code


def _is_ended_by_slurm(job: str) -> bool:
    """Return whether SLURM is ending a job, and may run it again, or does not answer."""
    # SLURM changes the state before it sends a signal. A command may die of that signal before it reaches us.
    return query.state(job) != "RUNNING"


def _requeue(job: str, times: int) -> None:
    if times >= REQUEUES:
        logger.error("job %s was requeued %d times, which is the maximum: it ends unfinished", job, times)
        return
    logger.info("job %s is not finished: requeueing it", job)
    batch.requeue(job)


def main() -> None:
    """Run as the program of a job of `gserve sbatch`, and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, the exit code of the command is lost
    try:
        sys.exit(_run_task(Path(sys.argv[1])))
    except (GserveError, OSError) as error:
        logger.error("%s", error)
        sys.exit(2 if isinstance(error, (ConfigError, PluginError)) else 1)


if __name__ == "__main__":
    main()
