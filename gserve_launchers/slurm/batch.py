"""The batch jobs that `gserve sbatch` submits. `gserve.cli.batch_job` runs inside such a job.

The script of a job is constant. Everything else travels in a file of mode 0600, which the job's node can read too.
So no value becomes part of a script, and neither SLURM nor a list of processes shows any.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec import Struct, structs

from gserve_core.errors import ConfigError, GserveError
from gserve_core.host.child_process import output_of
from gserve_core.interfaces import Job, Launcher

from .command_line import sbatch
from .launcher import SlurmLauncher
from .query import SQUEUE, environment_for_slurm, query_slurm

SCRIPT = Path(__file__).with_name("batch.sh")
COMMAND_SHARE = 2 / 3
"""Maximum part of the remaining time in which the command may end. The servers end in the rest."""
NOTICE = 120
"""Maximum time between the notice (SIGUSR1) and a job's time limit, in seconds."""
EARLY = 65
"""Maximum number of seconds that SLURM may send the notice too early: 60, and a margin for its answer."""
SEEN_SECONDS = 90.0
"""Maximum time until another machine sees a new file, in seconds. Network file systems cache that it was missing."""
SUBMIT_SECONDS = 60.0
"""Timeout of SLURM's commands that submit or requeue a job, in seconds."""
NEW_SECONDS = 2 * SUBMIT_SECONDS
"""Age in seconds from which the file of a job that SLURM does not list is stale. A newer one may still be submitted."""
TASK = "%TASK%"
"""Stands for the number of a task in the order of a job array."""
PREFERENCES = {
    f"SBATCH_{name}"
    for name in (
        "ACCOUNT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT", "CONSTRAINT", "WCKEY", "EXCLUSIVE", "CORE_SPEC",
        "THREAD_SPEC", "REQ_SWITCH", "WAIT4SWITCH", "DEBUG",
    )
}  # fmt: skip
"""Variables with a user's defaults for where jobs run. Others would change the kind of job (SBATCH_WAIT, for one)."""


class Order(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The task of a job: start the service of `config`, and run `command`, which uses it.

    `config`: the path of the config file.
    `overrides`: changes to the config, as "KEY.KEY=VALUE".
    `patience`: time for the command to end after the notice that the job's time is nearly over, in seconds.
    `requeue`: whether the work continues in another run of the job after that.
    `notice`: the requested time between notice and time limit, in seconds; 0: the notice counts whenever it comes.
    `output`: the file to which the command writes its results; "": unknown.
    `tasks`: numbers of the tasks of a job array, which share this; empty: no array. Each puts its own number for `TASK`
    in `command` and `output`.
    """

    config: str
    overrides: list[str]
    command: list[str]
    patience: float
    requeue: bool
    notice: int = 0
    output: str = ""
    tasks: list[int] = []

    def of_task(self, number: str) -> Self:
        """Return the order of one task of the array. `number`: as in $SLURM_ARRAY_TASK_ID."""
        if not self.tasks:
            return self
        command = [word.replace(TASK, number) for word in self.command]
        return structs.replace(self, command=command, output=self.output.replace(TASK, number))


def configured(launcher: Launcher, options: Mapping[str, Any]) -> SlurmLauncher:
    """Return the options of a job: `options`, and below them the options of the config's launcher, if that is SLURM's.

    Raises ConfigError: an option is invalid.
    """
    own = isinstance(launcher, SlurmLauncher)
    try:
        chosen = replace(launcher if isinstance(launcher, SlurmLauncher) else SlurmLauncher(), **options)
    except ConfigError as error:
        error.at = error.at.replace("$.", "--").replace("_", "-")
        raise
    if not own and chosen.nodes not in (None, 1):
        raise ConfigError(f"the launcher '{launcher.name}' starts all servers on one node: remove --nodes")
    return chosen


def notice(launcher: SlurmLauncher) -> int:
    """Return how many seconds before its time limit a job gets its notice; `NOTICE` if the limit is not known."""
    if launcher.time is None:
        return NOTICE
    text = str(launcher.time)
    minutes = int(text) if text.isdecimal() else -(-seconds(text) // 60)  # SLURM rounds up
    return notice_seconds(60 * minutes)


def notice_seconds(limit: float) -> int:
    """Return how many seconds before its time limit, in seconds, a job gets its notice: at most a quarter of it."""
    return min(NOTICE, int(limit) // 4) or NOTICE  # 0 means no limit


def seconds(text: str) -> int:
    """Return the seconds in "minutes:seconds", "hours:minutes:seconds" or "days-hours[:minutes[:seconds]]".

    Raises ValueError: any other text.
    """
    days, _, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def remaining_time(job: str) -> tuple[int, int] | None:
    """Return a running job's remaining time and its time limit, in seconds.

    None: it has no limit, or SLURM does not answer.
    """
    (remaining, limit), *_ = query_slurm(*SQUEUE, f"--jobs={job}", "--format=%L|%l") or [["", ""]]
    try:
        return seconds(remaining), seconds(limit)
    except ValueError:  # UNLIMITED, INVALID
        return None


def folder() -> Path:
    """Return the folder for the files of jobs. The nodes must share it, as they share homes.

    Raises GserveError: there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gserve" / "jobs"
    except RuntimeError as error:
        raise GserveError("there is no home folder for the files of jobs: set HOME or XDG_STATE_HOME") from error


def write(order: Order) -> Path:
    """Write the file of a job, readable only by its user; return its path.

    Raises GserveError: it cannot be written. Raises ConfigError: an argument is not UTF-8 text.
    """
    try:
        text = msgspec.json.encode(order)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the arguments are not UTF-8 text: {error.reason}") from error
    path = ""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        folder().chmod(0o700)
        descriptor, path = tempfile.mkstemp(dir=folder(), prefix=f"job-{_cluster()}-", suffix=".json")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text)
            os.fsync(stream.fileno())  # another machine will read it
    except OSError as error:
        if path:
            Path(path).unlink(missing_ok=True)
        raise GserveError(f"cannot write the job's file in {folder()}: {error.strerror}") from error
    return Path(path)


def read(path: Path, *, is_again: bool = False) -> Order:
    """Read the file of a job, as soon as this machine sees it.

    `is_again`: this is not the job's first run. If the file is missing, an earlier run has removed it.
    Raises GserveError: the file cannot be read.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists() and not is_again and time.monotonic() < deadline:
        time.sleep(1.0)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # makes a network file system refresh its cache
    try:
        return msgspec.json.decode(path.read_bytes(), type=Order)
    except FileNotFoundError as error:
        if not is_again:
            raise GserveError(f"cannot read this job's file: {error}") from error
        raise GserveError(
            "SLURM runs this job again, but its file was removed: an earlier run has finished, or must not be repeated"
            " (launcher.requeue); submit the command again"
        ) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise GserveError(f"cannot read this job's file: {error}") from error


def stale_orders() -> list[Path]:
    """Return the files of jobs that SLURM no longer has, or never had: cancelled, or not submitted."""
    try:
        place = folder()
    except GserveError:  # no home folder, so no files of jobs
        return []
    old = [path for path in place.glob("job-*.json") if _age(path) > NEW_SECONDS]
    cluster = _cluster() if old else ""
    found = [path for path in old if cluster and path.name.startswith(f"job-{cluster}-")]
    commands = query_slurm(*SQUEUE, "--me", "--format=%o") if found else None
    if commands is None:  # SLURM does not answer
        return []
    text = "\n".join("|".join(words) for words in commands)
    return sorted(path for path in found if path.name not in text)  # compare names: the folder's path may have changed


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # its job has removed it by now
        return 0.0


def _cluster() -> str:
    """Return the name of SLURM's cluster; "" if it is not known."""
    # Several clusters may share a home folder.
    rows = query_slurm("scontrol", "show", "config") or ()
    return next((line.split()[-1] for line, *_ in rows if line.startswith("ClusterName ")), "")


def command(launcher: SlurmLauncher, jobs: Sequence[Job], order: Order, file: str) -> list[str]:
    """Return the command line that submits a job with room for all of `jobs`. `file`: the path of the order's file."""
    return sbatch(launcher, jobs, str(SCRIPT), sys.executable, file, notice=order.notice, tasks=order.tasks)


def submit(launcher: SlurmLauncher, jobs: Sequence[Job], order: Order) -> str:
    """Submit a job; return its id. Raises GserveError: the file cannot be written, or SLURM refuses the job."""
    for old in stale_orders():
        old.unlink(missing_ok=True)
    path = write(order)
    try:
        output = _run_slurm(command(launcher, jobs, order, str(path)), _environment())
    except BaseException as error:
        if not isinstance(error.__cause__, subprocess.TimeoutExpired):  # after a timeout, SLURM may have the job
            path.unlink(missing_ok=True)
        raise
    return output.partition(";")[0]


def _environment() -> dict[str, str]:
    """Return the environment of sbatch, without the variables of a job that this process may run in."""
    kept = {name: value for name, value in os.environ.items() if name in PREFERENCES or name == "SLURM_CONF"}
    return kept | {name: value for name, value in environment_for_slurm().items() if not name.startswith("SLURM_")}


def requeue(job: str) -> None:
    """Make SLURM end this run of a job, and run it again from the start. Raises GserveError: SLURM refuses."""
    _run_slurm(["scontrol", "requeue", job], environment_for_slurm())


def _run_slurm(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the output of a command of SLURM. Raises GserveError: it cannot run, it fails, or it times out."""
    try:
        return output_of(command, environ, SUBMIT_SECONDS).strip()
    except OSError as error:
        raise GserveError(f"cannot run '{command[0]}': {error.strerror}; is this a machine with SLURM?") from error
    except subprocess.CalledProcessError as error:
        raise GserveError(f"SLURM refused the command: {' '.join(error.stderr.split())}") from error
    except subprocess.TimeoutExpired as error:
        raise GserveError(f"SLURM did not answer within {SUBMIT_SECONDS:g} s: see squeue --me") from error
