"""Batch jobs: what `gserve sbatch` submits. What runs inside such a job is `gserve.cli.batch_job`.

The script of a job is a constant. All else travels in a file of mode 0600 that the job's node sees, too: no value
becomes a part of a script, and neither SLURM nor a list of processes shows it.
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
from typing import Any

import msgspec
from msgspec import Struct

from gserve_core.commands import output_of
from gserve_core.errors import ConfigError, GserveError
from gserve_core.interfaces import Job, Launcher

from .command_line import JOB_OPTIONS
from .launcher import SlurmLauncher
from .query import SQUEUE, ask, environment_for_slurm

SCRIPT = Path(__file__).with_name("batch.sh")
NOTICE = 120
"""Seconds before the end of its time at which a job is told of it."""
EARLY = 65
"""Seconds by which SLURM may tell it too early: 60, and a few more for its answer."""
SEEN_SECONDS = 90.0
"""How long a file may take to be seen on another machine: network file systems remember what was not there."""
SUBMIT_SECONDS = 60.0
"""How long SLURM may take to answer."""
NEW_SECONDS = 2 * SUBMIT_SECONDS
"""Age at which the file of a job that SLURM does not list is left over: before, it may be on its way to SLURM."""
PREFERENCES = {
    f"SBATCH_{name}"
    for name in (
        "ACCOUNT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT", "CONSTRAINT", "WCKEY", "EXCLUSIVE", "CORE_SPEC",
        "THREAD_SPEC", "REQ_SWITCH", "WAIT4SWITCH", "DEBUG",
    )
}  # fmt: skip
"""Variables that say where a user's jobs run. Others would make another kind of job (SBATCH_WAIT, SBATCH_ARRAY_INX)."""


class Order(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job is to do: start the service of a config, and run a command that uses it.

    `patience`: seconds that the command may take to end once the job is told that its time is nearly over. `requeue`:
    whether it goes on in another run of the job then. `notice`: how many seconds before its end SLURM was asked to tell
    the job; 0: whenever it does. `output`: the file that the command writes its results to; "": unknown.
    """

    config: str
    overrides: list[str]
    command: list[str]
    patience: float
    requeue: bool
    notice: int = 0
    output: str = ""


def configured(launcher: Launcher, options: Mapping[str, Any]) -> SlurmLauncher:
    """Return the options of a job: those of a config's launcher where that is SLURM's, and over them `options`.

    Raises ConfigError: one of them is wrong.
    """
    own = isinstance(launcher, SlurmLauncher)
    try:
        chosen = replace(launcher if isinstance(launcher, SlurmLauncher) else SlurmLauncher(), **options)
    except ConfigError as error:
        error.at = error.at.replace("$.", "--").replace("_", "-")
        raise
    if not own and chosen.nodes not in (None, 1):
        raise ConfigError(f"the launcher '{launcher.name}' starts all servers on one node: leave --nodes out")
    return chosen


def sbatch(launcher: SlurmLauncher, jobs: Sequence[Job], *script: str) -> list[str]:
    """Return the command line that submits `script`, a path and its arguments, as a job with room for all of `jobs`.

    Raises ConfigError.
    """
    nodes = launcher.nodes or 1
    if nodes > len(jobs):
        raise ConfigError(f"{nodes} nodes are more than there are servers: {len(jobs)} (serve.servers)")
    on_a_node = -(-len(jobs) // nodes)
    words = ["sbatch", "--parsable", f"--job-name={launcher.job_name}"]
    options = [(option, getattr(launcher, option)) for option in JOB_OPTIONS]
    words += [f"--{option}={value}" for option, value in options if value is not None]
    words += [f"--nodes={nodes}", f"--ntasks-per-node={on_a_node}"]
    if launcher.cpus_per_server is not None:
        words.append(f"--cpus-per-task={launcher.cpus_per_server}")
    if launcher.mem is not None:
        words.append(f"--mem={int(launcher.mem[:-1]) * on_a_node}{launcher.mem[-1]}")
    if gpus := _gpus(launcher, jobs, on_a_node):
        words.append(f"--gres=gpu:{launcher.gpu_type}:{gpus}" if launcher.gpu_type else f"--gres=gpu:{gpus}")
    words += [
        f"--signal=B:USR1@{notice(launcher)}", "--requeue" if launcher.requeue else "--no-requeue",
        "--open-mode=append", "--export=ALL", f"--output={_output(Path.cwd())}",
    ]  # fmt: skip
    return [*words, *script]


def _gpus(launcher: SlurmLauncher, jobs: Sequence[Job], on_a_node: int) -> int:
    """Return how many GPUs a node of the job needs; ids count all that the job has, which then is on one, from 0 on."""
    ids = [gpu for job in jobs for gpu in job.gpu_ids or ()]
    if ids:
        return max(ids) + 1
    return on_a_node * (jobs[0].gpus if launcher.gpus_per_server is None else launcher.gpus_per_server)


def _output(folder: Path) -> str:
    """Return the file for a job's output in `folder`, as SLURM wants it written. Raises ConfigError: it cannot be."""
    if "\\" in str(folder):  # SLURM takes it out of a path, and then no % for the job's number
        raise ConfigError(
            f"SLURM cannot write a job's output to a folder with a backslash in its path: {folder}; submit from another"
        )
    return f"{str(folder).replace('%', '%%')}/slurm-%j.out"


def notice(launcher: SlurmLauncher) -> int:
    """Return how many seconds before its end SLURM is to tell a job, as far as its time is known."""
    if launcher.time is None:
        return NOTICE
    text = str(launcher.time)
    minutes = int(text) if text.isdecimal() else -(-seconds(text) // 60)  # SLURM rounds up
    return ahead(60 * minutes)


def ahead(limit: float) -> int:
    """Return how many seconds before its end a job of so much time is told: at most a quarter of it."""
    return min(NOTICE, int(limit) // 4) or NOTICE  # a time of 0 is no limit


def seconds(text: str) -> int:
    """Return how long "minutes:seconds", "hours:minutes:seconds" or "days-hours[:minutes[:seconds]]" is."""
    days, _, rest = text.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def time_left(job: str) -> tuple[int, int] | None:
    """Return the seconds that a running job has left, and in all; None: it has no limit, or SLURM does not answer."""
    (left, limit), *_ = ask(*SQUEUE, f"--jobs={job}", "--format=%L|%l") or [["", ""]]
    try:
        return seconds(left), seconds(limit)
    except ValueError:  # UNLIMITED, INVALID
        return None


def folder() -> Path:
    """Return where the files of jobs lie: a folder that the nodes see, as they do homes. Raises GserveError."""
    try:
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gserve" / "jobs"
    except RuntimeError as error:
        raise GserveError("there is no home folder for the files of jobs: set HOME or XDG_STATE_HOME") from error


def write(order: Order) -> Path:
    """Write the file of a job, which nobody else can read; return its path. Raises GserveError."""
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
            os.fsync(stream.fileno())  # another machine reads it
    except OSError as error:
        if path:
            Path(path).unlink(missing_ok=True)
        raise GserveError(f"cannot write the file of the job in {folder()}: {error.strerror}") from error
    return Path(path)


def read(path: Path, *, is_again: bool = False) -> Order:
    """Read the file of a job, as soon as this machine sees it. Raises GserveError.

    `is_again`: this is not the job's first run. If the file is gone then, an earlier run has removed it.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists() and not is_again and time.monotonic() < deadline:
        time.sleep(1.0)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # has a network file system look anew
    try:
        return msgspec.json.decode(path.read_bytes(), type=Order)
    except FileNotFoundError as error:
        if not is_again:
            raise GserveError(f"cannot read what this job is to do: {error}") from error
        raise GserveError(
            "SLURM runs this job again, but an earlier run has done all, or was not to be repeated (--requeue):"
            " submit the command again"
        ) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise GserveError(f"cannot read what this job is to do: {error}") from error


def stale_orders() -> list[Path]:
    """Return the files of jobs that SLURM does not have any more: they were cancelled, or never got there."""
    try:
        place = folder()
    except GserveError:  # without a home folder there are no files of jobs
        return []
    old = [path for path in place.glob("job-*.json") if _age(path) > NEW_SECONDS]
    cluster = _cluster() if old else ""
    found = [path for path in old if cluster and path.name.startswith(f"job-{cluster}-")]
    commands = ask(*SQUEUE, "--me", "--format=%o") if found else None
    if commands is None:  # SLURM does not answer
        return []
    text = "\n".join("|".join(words) for words in commands)
    return sorted(path for path in found if path.name not in text)  # the way there may have another name now


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # its job has removed it
        return 0.0


def _cluster() -> str:
    """Return the name of SLURM's cluster, as several may share a home; "" where there is none."""
    rows = ask("scontrol", "show", "config") or ()
    return next((line.split()[-1] for line, *_ in rows if line.startswith("ClusterName ")), "")


def submit(launcher: SlurmLauncher, jobs: Sequence[Job], order: Order) -> str:
    """Submit a job; return its number. Raises GserveError: SLURM does not take it."""
    for old in stale_orders():
        old.unlink(missing_ok=True)
    path = write(order)
    try:
        told = _told(sbatch(launcher, jobs, str(SCRIPT), sys.executable, str(path)), _environment())
    except BaseException as error:
        if not isinstance(error.__cause__, subprocess.TimeoutExpired):  # else it may have reached SLURM
            path.unlink(missing_ok=True)
        raise
    return told.partition(";")[0]


def _environment() -> dict[str, str]:
    """Return the environment of sbatch: of a job that we may be in, nothing is meant for another."""
    kept = {name: value for name, value in os.environ.items() if name in PREFERENCES or name == "SLURM_CONF"}
    return kept | {name: value for name, value in environment_for_slurm().items() if not name.startswith("SLURM_")}


def is_over(job: str) -> bool:
    """Return whether SLURM knows that a job has ended, or knows it no more; False where SLURM does not answer."""
    return state(job) == ""


def state(job: str) -> str | None:
    """Return SLURM's state of a job, as "RUNNING"; "": it has ended; None: SLURM does not answer."""
    rows = ask(*SQUEUE, f"--jobs={job},{job}", "--format=%T")  # of one alone, no row is an error
    return None if rows is None else rows[0][0] if rows else ""


def requeue(job: str) -> None:
    """Have SLURM run a job again from its beginning, and end this run of it. Raises GserveError: it refuses."""
    _told(["scontrol", "requeue", job], environment_for_slurm())


def _told(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return what a command of SLURM prints. Raises GserveError: it fails."""
    try:
        return output_of(command, environ, SUBMIT_SECONDS).strip()
    except OSError as error:
        raise GserveError(f"cannot run '{command[0]}': {error.strerror}; is this a machine with SLURM?") from error
    except subprocess.CalledProcessError as error:
        raise GserveError(f"SLURM refuses: {' '.join(error.stderr.split())}") from error
    except subprocess.TimeoutExpired as error:
        raise GserveError(f"SLURM did not answer within {SUBMIT_SECONDS:g} s: see squeue --me") from error
