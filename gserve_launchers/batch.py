"""Batch jobs: what `gserve sbatch` submits. What runs inside such a job is `gserve.batch_job`.

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

from gserve_core.errors import ConfigError, GserveError
from gserve_core.interfaces import Job, Launcher

from .slurm import JOB_OPTIONS, SlurmLauncher, ask

SCRIPT = Path(__file__).with_name("batch.sh")
NOTICE = 120
"""Seconds before the end of its time at which a job is told of it. SLURM may do so up to 60 s earlier."""
SEEN_SECONDS = 90.0
"""How long a file may take to be seen on another machine: network file systems remember what was not there."""
SUBMIT_SECONDS = 60.0
"""How long SLURM may take to answer."""


class Order(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job is to do: start the service of a config, and run a command that uses it.

    `patience`: seconds that the command may take to end once the job is told that its time is nearly over. `requeue`:
    whether it goes on in another run of the job then.
    """

    config: str
    overrides: list[str]
    command: list[str]
    patience: float
    requeue: bool


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
        "--open-mode=append", "--export=ALL", "--output=slurm-%j.out",
    ]  # fmt: skip
    return [*words, *script]


def _gpus(launcher: SlurmLauncher, jobs: Sequence[Job], on_a_node: int) -> int:
    """Return how many GPUs a node of the job needs; ids count all that the job has, which then is on one, from 0 on."""
    ids = [gpu for job in jobs for gpu in job.gpu_ids or ()]
    if ids:
        return max(ids) + 1
    return on_a_node * (jobs[0].gpus if launcher.gpus_per_server is None else launcher.gpus_per_server)


def notice(launcher: SlurmLauncher) -> int:
    """Return how many seconds before its end a job is told: at most a quarter of its time."""
    if launcher.time is None:
        return NOTICE
    days, _, rest = str(launcher.time).rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return min(NOTICE, seconds // 4) or NOTICE  # a time of 0 is no limit


def folder() -> Path:
    """Return where the files of jobs lie: a folder that the nodes see, as they do homes."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gserve" / "jobs"


def write(order: Order) -> Path:
    """Write the file of a job, which nobody else can read; return its path. Raises ConfigError: not UTF-8."""
    try:
        text = msgspec.json.encode(order)
    except UnicodeEncodeError as error:
        raise ConfigError(f"the arguments are not UTF-8 text: {error.reason}") from error
    folder().mkdir(parents=True, exist_ok=True)
    folder().chmod(0o700)
    descriptor, path = tempfile.mkstemp(dir=folder(), prefix="job-", suffix=".json")
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text)
        os.fsync(stream.fileno())  # another machine reads it
    return Path(path)


def read(path: Path) -> Order:
    """Read the file of a job, as soon as this machine sees it. Raises GserveError."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1.0)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # has a network file system look anew
    try:
        return msgspec.json.decode(path.read_bytes(), type=Order)
    except (OSError, msgspec.MsgspecError) as error:
        raise GserveError(f"cannot read what this job is to do: {error}") from error


def submit(launcher: SlurmLauncher, jobs: Sequence[Job], order: Order) -> str:
    """Submit a job; return its number. Raises GserveError: SLURM does not take it."""
    environ = {  # of a job that we may be in, nothing is meant for another
        name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }
    path = write(order)
    try:
        told = _told(sbatch(launcher, jobs, str(SCRIPT), sys.executable, str(path)), environ)
    except BaseException:
        path.unlink()
        raise
    return told.partition(";")[0]


def is_over(job: str) -> bool:
    """Return whether SLURM knows that a job has ended, or knows it no more; False where SLURM does not answer."""
    return ask("squeue", "--noheader", f"--jobs={job},{job}", "--format=%T") == []  # of one alone, no row is an error


def requeue(job: str) -> None:
    """Have SLURM run a job again from its beginning, and end this run of it. Raises GserveError: it refuses."""
    _told(["scontrol", "requeue", job], os.environ)


def _told(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return what a command of SLURM prints. Raises GserveError: it fails."""
    try:
        told = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=SUBMIT_SECONDS, check=True,
        )  # fmt: skip
    except OSError as error:
        raise GserveError(f"cannot run '{command[0]}': {error.strerror}; is this a machine with SLURM?") from error
    except subprocess.CalledProcessError as error:
        raise GserveError(f"SLURM refuses: {' '.join(error.stderr.split())}") from error
    except subprocess.TimeoutExpired as error:
        raise GserveError(f"SLURM did not answer within {SUBMIT_SECONDS:g} s: see squeue --me") from error
    return told.stdout.strip()
