"""A command and the service that it uses, from start to end: `gserve run`, and each job of `gserve sbatch`.

Both may have to end early: SIGUSR1 says that a job's time is nearly over, SIGTERM that it is. The service takes no
more items then; what it has may finish; the command is given the rest back as errors, and ends by itself.
"""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from gserve_core.errors import ConfigError, GserveError, PluginError
from gserve_core.log_utils import setup_logging
from gserve_core.server import State
from gserve_core.service import ATTACH_VARIABLE, VLLMService
from gserve_launchers import batch

TICK = 0.1
"""Seconds between two looks at the command."""
PATIENCE = 80.0
"""Seconds that a command may take to end once its time is nearly over, unless it is said how long that is."""
LAST_SECONDS = 10.0
"""The same once its time is over: SLURM kills all 30 s (its KillWait) after SIGTERM, or sooner."""
FAREWELL = 5.0
"""Seconds between SIGTERM and SIGKILL for a command that does not end."""
REQUEUES = 10
"""How often a job is run again: one that gets nowhere ends."""
NOTICES = {
    signal.SIGUSR1: "its job's time is nearly over",
    signal.SIGTERM: "it was told to, or its job's time is over",
    signal.SIGINT: "it was interrupted",
    signal.SIGHUP: "its terminal is gone",
}
"""The signals that end a command early, and why."""

logger = logging.getLogger("gserve.job")


@dataclass(frozen=True)
class Ended:
    """How a command has ended: with an exit code, 128 and its number for a signal; `notice` had cut it short."""

    code: int
    notice: int | None = None


def run(config: Path | str, overrides: Sequence[str], command: Sequence[str], patience: float = PATIENCE) -> Ended:
    """Start the service of a config, run `command` with $GSERVE_ATTACH set, and end both.

    Raises LaunchError, ConfigError, PluginError: the service or the command cannot be started.
    """
    setup_logging()
    if shutil.which(command[0]) is None:
        raise ConfigError(f"cannot run '{command[0]}': there is no such program here")
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:
        os.environ.pop("XDG_RUNTIME_DIR", None)  # a login has it, here or elsewhere, and it goes when that ends
    name = "-".join(filter(None, ("run", job, str(os.getpid()))))
    service = VLLMService.from_yaml(config, overrides=overrides, name=name)
    notices: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: notices.append(number))
        for number in NOTICES
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        _start(service, notices)
        if notices:
            return Ended(128 + notices[0], notices[0])
        return _accompany(service, name, command, patience, notices)
    finally:
        service.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start(service: VLLMService, notices: list[int]) -> None:
    """Start a service and say how that goes, unless a notice comes first."""
    said: dict[str, str] = {}
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(service.start)
        while not wait([starting], TICK).done:
            for server in service.status():
                if server.state == State.STARTING and server.phase and said.get(server.name) != server.phase:
                    said[server.name] = server.phase
                    logger.info("%s: %s", server.name, server.phase)
            if notices:
                service.shutdown()
        if not notices:
            starting.result()


def _accompany(service: VLLMService, name: str, command: Sequence[str], patience: float, notices: list[int]) -> Ended:
    """Run a command to its end; once a notice comes, have the service drain, and wait no longer than there is time."""
    logger.info("%d servers are ready: running the command", sum(it.state == State.READY for it in service.status()))
    heard, deadline = 0, math.inf
    with subprocess.Popen(command, env=os.environ | {ATTACH_VARIABLE: name}) as process:
        while process.poll() is None and time.monotonic() < deadline:
            for number in notices[heard:]:
                heard += 1
                seconds = patience if number == signal.SIGUSR1 else LAST_SECONDS
                deadline = min(deadline, time.monotonic() + seconds)
                why = NOTICES[signal.Signals(number)]
                logger.warning("the service is ending: %s; the command has %g s to end", why, seconds)
                service.drain(why)
            time.sleep(TICK)
        if process.poll() is None:
            logger.warning("the command does not end: it is ended")
            process.terminate()
            try:
                process.wait(FAREWELL)
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
    return Ended(128 - code if code < 0 else code, notices[0] if heard else None)


def _do(file: Path) -> int:
    """Do what the file of a job says; return the exit code. The file stays while the job may be run again."""
    order = batch.read(file)
    if not order.requeue:
        file.unlink()
    ended = run(order.config, order.overrides, order.command, order.patience)
    if order.requeue and ended.notice is None:
        file.unlink()
    elif order.requeue and ended.notice == signal.SIGUSR1 and ended.code:
        _requeue(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0))
    return ended.code


def _requeue(job: str, times: int) -> None:
    if times >= REQUEUES:
        logger.error("job %s was run again %d times, which is enough: it ends unfinished", job, times)
        return
    logger.info("job %s is not finished: it is run again", job)
    batch.requeue(job)


def main() -> None:
    """Be the program of a job of `gserve sbatch`."""
    try:
        sys.exit(_do(Path(sys.argv[1])))
    except (GserveError, OSError) as error:
        logger.error("%s", error)
        sys.exit(2 if isinstance(error, (ConfigError, PluginError)) else 1)


if __name__ == "__main__":
    main()
