"""The launcher `slurm`: a server is one `srun`, a step of the allocation that we are in, else a job of its own.

The lease of a server goes through srun's stdin and stdout, its log through srun's stderr. That srun lives does not mean
that the server does, and a SIGTERM to srun is a SIGKILL for the server: so what a server is told, and how it fares,
goes over the lease. SLURM is asked why a job does not run yet, why it has ended, and whether it is gone. Where the
owner has died, `guard` ends a job that has no server yet, and `task` one that has no srun any more.

What srun runs is the server's nursery (`gserve_core.process.nursery.stay`), which forks it, and again when it has died:
a step then has many lives of a server, one after the other, and asks SLURM for its place once.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gserve_core.commands import CommandLauncher
from gserve_core.errors import ConfigError
from gserve_core.hookspecs import hookimpl
from gserve_core.interfaces import Finding, Job, Launcher, Process

from .command_line import check_argument, is_server, job_title, srun
from .examination import examine_allocation, examine_nodes, examine_partitions
from .process import Life, SlurmProcess
from .query import COMMANDS_OPTIONS, ask

COMMANDS = ("srun", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
"""What gserve uses of SLURM."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAMES = rf"{NAME}(,{NAME})*"
NODES = r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]{0,1023}"
FORMS = {  # the form of each option that is a text, and an example of it
    "partition": (NAMES, "gpu"),
    "account": (NAME, "my-project"),
    "qos": (NAME, "normal"),
    "time": (r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}", "02:00:00 (hours, minutes, seconds)"),
    "gpu_type": (NAME, "a100"),
    "mem": (r"[1-9][0-9]*[KMGT]", "64G"),
    "constraint": (r"[A-Za-z0-9(\[][A-Za-z0-9._()\[\]&|*,:-]{0,255}", "a100&nvlink"),
    "reservation": (NAMES, "course"),
    "nodelist": (NODES, "n[1-4]"),
    "exclude": (NODES, "n7"),
    "job_name": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", "gserve"),
    "comment": (r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}", "evaluation of Monday"),
}
SHAPING = re.compile(
    r"SLURM_(CPUS?_.*|GPUS?_?.*|GRES.*|TRES_.*|MEM_.*|NNODES|N?TASKS.*|NPROCS|DIST.*|HINT|THREADS.*|EXACT|EXCLUSIVE|OVERLAP"
    r"|OVERCOMMIT|OPEN_MODE|LABELIO|STD\w+MODE|UNBUFFEREDIO|WAIT|EXPORT_ENV|STEP_.*|STEPID|IMMEDIATE|KILL_BAD_EXIT|MPI_TYPE"
    r"|PROCID|LOCALID|NODEID|TASK_.*|PROLOG|EPILOG|SPREAD_JOB|NO_KILL|WHOLE|JOB_NAME|JOB_NUM_NODES|TIMELIMIT)"
)
"""What srun would read as options: in a batch job they are those of the job, not of a server."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""What SLURM sets in a step to the GPUs that it has bound; ours are not those of another machine."""


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(CommandLauncher):
    """Starts each server by `srun`: inside an allocation as a step of it, elsewhere as a job of its own.

    `gpus_per_server`: None asks for as many as the engine wants, 0 for none. `cpus_per_server` and `mem` (as "64G"):
    None takes, of an allocation, a server's share of the CPUs and what memory it needs, else SLURM's default.
    `queue_timeout`: seconds that a server may wait in the queue; None: no limit. `nursery`: have a server that has died
    forked again in the same step or job, by a process there that has imported vLLM; false gives each life an srun of
    its own, which imports it anew. `srun_args`: more options, each as one
    word ("--switches=1"). `nodes` and `requeue` are for `gserve sbatch`: how many nodes its job has, and whether SLURM
    runs it again where it was preempted or did not finish in its time. All other options are srun's own; those about
    jobs say nothing inside an allocation.
    """

    name: ClassVar[str] = "slurm"
    owner_variable: ClassVar[str | None] = "SLURM_LAUNCH_NODE_IPADDR"

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | int | None = None  # of a number, which is refused, SLURM would think in minutes
    gpus_per_server: int | None = None
    gpu_type: str | None = None
    cpus_per_server: int | None = None
    mem: str | None = None
    nodes: int | None = None
    requeue: bool = False
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    job_name: str = "gserve"
    comment: str | None = None
    srun_args: list[str] = field(default_factory=list)
    queue_timeout: float | None = None
    nursery: bool = True

    def __post_init__(self) -> None:
        for option, (form, example) in FORMS.items():
            value = getattr(self, option)
            if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
                raise ConfigError(f"expected something like {example}, got {value!r}", at=f"$.{option}")
        for option, least in (("gpus_per_server", 0), ("cpus_per_server", 1), ("nodes", 1), ("queue_timeout", 0)):
            value = getattr(self, option)
            if value is not None and not least <= value < 1 << 31:
                raise ConfigError(f"expected a number from {least} up, got {value}", at=f"$.{option}")
        for place, word in enumerate(self.srun_args):
            check_argument(word, f"$.srun_args[{place}]")

    def command(self, job: Job) -> list[str]:
        """Return the command line of srun for `job`. Raises ConfigError: SLURM cannot give it what it wants."""
        return srun(self, job, os.environ)

    def environment(self, job: Job) -> dict[str, str]:
        """Return our environment without what srun would read as options, and without the GPUs of this machine."""
        return {
            name: value
            for name, value in super().environment(job).items()
            if not SHAPING.fullmatch(name) and not name.startswith(COMMANDS_OPTIONS) and name not in DEVICES
        }

    def launch(self, job: Job) -> Process:
        """Begin another life in the step of `job.previous`, or start srun: that may wait in SLURM's queue then."""
        if isinstance(job.previous, Life):
            with contextlib.suppress(OSError):
                if job.previous.is_kept:
                    return job.previous.next(job)
            job.previous.release()
            job.previous.stop(0.0)
        if not (self.nursery and is_server(job)):
            return self._srun(job)
        own = uuid.uuid4().hex  # what stays is found by an id of its own, not by that of one life
        env = {name: own if value == job.instance else value for name, value in job.env.items()}
        return Life(self._srun(replace(job, env=env)), job.instance)

    def release(self, process: Process) -> None:
        """Have the step of an ended server end, or that of a living one with it."""
        if isinstance(process, Life):
            process.release()

    def _srun(self, job: Job) -> "SlurmProcess":
        return SlurmProcess(
            self.popen(job), job_title(self, job), os.environ.get("SLURM_JOB_ID"), self.queue_timeout, job.log
        )

    def examine(self) -> Iterator[Finding]:
        """Yield what there is of SLURM: its commands, the allocation that we are in, and the partitions with GPUs."""
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            hint = "log in where SLURM's commands are, or load the module that brings them"
            yield Finding("SLURM", "problem", f"not found here: {', '.join(missing)}", hint)
            return
        version, rows = ask("srun", "--version"), ask("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%T")
        hint = "run sinfo and scontrol ping to see why, and tell those who run the cluster"
        if not version:
            yield Finding("SLURM", "problem", "it is installed, but srun does not run", hint)
            return
        yield Finding("SLURM", "ok", f"{version[0][0]}: {', '.join(COMMANDS)}")
        if rows is None:
            yield Finding("controller", "problem", "slurmctld, the controller of SLURM, does not answer", hint)
            return
        if (job := os.environ.get("SLURM_JOB_ID")) is not None:
            yield examine_allocation(job)
            yield from examine_partitions(rows, None)
            return
        yield from examine_partitions(rows, self.partition.split(",") if self.partition else [])
        if self.nodelist:
            yield examine_nodes(self.nodelist)


@hookimpl
def gserve_register_launchers() -> list[type[Launcher]]:
    """Bring the launcher for SLURM."""
    return [SlurmLauncher]
