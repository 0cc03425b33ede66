"""The launcher `slurm`: it starts each server by one `srun`, as a step of our allocation, or else as a job of its own.

The lease of a server uses srun's stdin and stdout; its log uses srun's stderr. A running srun does not mean a running
server, and SIGTERM to srun kills the server with SIGKILL. So commands and state always travel over the lease. SLURM is
asked only why a job waits, why it has ended, and whether it has ended. If the owner has died, `guard` ends a job
without a server, and `task` ends a job without an srun.

srun runs the server's nursery (`gserve_core.process.nursery.run_in_place`), which forks the server, and forks it again
when it dies. So one step runs several generations of a server, and waits only once in SLURM's queue.

A server on several nodes is one task on each. srun passes its stdin on to all of them, and its stdout has the lines of
all. Each generation has an srun of its own, since SLURM ends all tasks when one fails.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from msgspec import Meta

from gserve_core.command_launcher import CommandLauncher
from gserve_core.config import check
from gserve_core.hookspecs import hookimpl
from gserve_core.interfaces import Finding, Job, Launcher, Process

from .command_line import check_argument, has_nursery, job_title, srun
from .examination import examine_allocation, examine_nodes, examine_partitions
from .process import ServerInStep, SlurmProcess
from .query import COMMANDS_OPTIONS, query_slurm

COMMANDS = ("srun", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
"""The commands of SLURM that gserve uses."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAMES = rf"{NAME}(,{NAME})*"
NODES = r"[A-Za-z0-9][A-Za-z0-9._,\[\]-]{0,1023}"
Name = Annotated[str, Meta(pattern=rf"\A{NAME}\Z", description="a name such as normal")]
Names = Annotated[str, Meta(pattern=rf"\A{NAMES}\Z", description="names such as gpu")]
Time = Annotated[
    str,
    Meta(
        pattern=r"\A([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}\Z", description="a time such as 02:00:00 (hours, minutes, seconds)"
    ),
]
Memory = Annotated[str, Meta(pattern=r"\A[1-9][0-9]*[KMGT]\Z", description="a size such as 64G")]
Constraint = Annotated[
    str,
    Meta(pattern=r"\A[A-Za-z0-9(\[][A-Za-z0-9._()\[\]&|*,:-]{0,255}\Z", description="a constraint such as a100&nvlink"),
]
Nodes = Annotated[str, Meta(pattern=rf"\A{NODES}\Z", description="nodes such as n[1-4]")]
Title = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z", description="a name such as gserve")]
Comment = Annotated[
    str,
    Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}\Z", description="a text such as evaluation of Monday"),
]
Number = Annotated[int, Meta(ge=0, lt=1 << 31, description="a number from 0 up")]
Positive = Annotated[int, Meta(ge=1, lt=1 << 31, description="a number from 1 up")]
Seconds = Annotated[float, Meta(ge=0, lt=1 << 31, description="seconds from 0 up, or null for no limit")]
SHAPING = re.compile(
    r"SLURM_(CPUS?_.*|GPUS?_?.*|GRES.*|TRES_.*|MEM_.*|NNODES|N?TASKS.*|NPROCS|DIST.*|HINT|THREADS.*|EXACT|EXCLUSIVE|OVERLAP"
    r"|OVERCOMMIT|OPEN_MODE|LABELIO|STD\w+MODE|UNBUFFEREDIO|WAIT|EXPORT_ENV|STEP_.*|STEPID|IMMEDIATE|KILL_BAD_EXIT|MPI_TYPE"
    r"|PROCID|LOCALID|NODEID|TASK_.*|PROLOG|EPILOG|SPREAD_JOB|NO_KILL|WHOLE|JOB_NAME|JOB_NUM_NODES|TIMELIMIT)"
)
"""Variables that srun would read as options. In a batch job they describe the job, not a server."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""Variables that SLURM sets in a step to the GPUs that it has bound. Their values here are wrong on other machines."""


@dataclass(frozen=True, kw_only=True)
class SlurmLauncher(CommandLauncher):
    """A launcher that starts each server by `srun`: inside an allocation as a step, elsewhere as a job of its own.

    `gpus_per_server`: number of GPUs to request, on all nodes of a server; None: as many as the engine needs; 0: none.
    `cpus_per_server`: CPUs on each of its nodes; None: its share of the allocation, or SLURM's default for a new job.
    `mem`: memory on each of its nodes, as "64G"; None: any memory of the allocation, or SLURM's default for a new job.
    `queue_timeout`: maximum wait in the queue, in seconds; None: no limit, but 120 s for a step.
    `nursery`: restart a server in the same step or job, forked from a process there that has imported vLLM. If false,
    or on several nodes, each generation has an srun of its own, and imports vLLM again.
    `srun_args`: more options of srun, each as one word ("--switches=1").
    `nodes`: number of nodes of a job of `gserve sbatch`.
    `requeue`: whether SLURM runs a job of `gserve sbatch` again after preemption or its time limit.
    All other options are srun's own. Options about jobs are ignored inside an allocation.
    """

    name: ClassVar[str] = "slurm"
    owner_variable: ClassVar[str | None] = "SLURM_LAUNCH_NODE_IPADDR"
    rank_variable: ClassVar[str | None] = "SLURM_PROCID"

    partition: Names | None = None
    account: Name | None = None
    qos: Name | None = None
    time: Time | None = None
    gpus_per_server: Number | None = None
    gpu_type: Name | None = None
    cpus_per_server: Positive | None = None
    mem: Memory | None = None
    nodes: Positive | None = None
    requeue: bool = False
    constraint: Constraint | None = None
    reservation: Names | None = None
    nodelist: Nodes | None = None
    exclude: Nodes | None = None
    job_name: Title = "gserve"
    comment: Comment | None = None
    srun_args: list[str] = field(default_factory=list)
    queue_timeout: Seconds | None = None
    nursery: bool = True

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()
        for place, word in enumerate(self.srun_args):
            check_argument(word, f"$.srun_args[{place}]")

    def command(self, job: Job) -> list[str]:
        """Return the command line of srun for `job`. Raises ConfigError: the job does not fit SLURM or the options."""
        return srun(self, job, os.environ)

    def environment(self, job: Job) -> dict[str, str]:
        """Return the environment of srun, without variables that are srun's options or name this machine's GPUs."""
        return {
            name: value
            for name, value in super().environment(job).items()
            if not SHAPING.fullmatch(name) and not name.startswith(COMMANDS_OPTIONS) and name not in DEVICES
        }

    def launch(self, job: Job) -> Process:
        """Start the next generation in the step of `job.previous`, or start srun, which may wait in SLURM's queue.

        Raises LaunchError: srun could not be started.
        """
        if isinstance(job.previous, ServerInStep):
            with contextlib.suppress(OSError):
                if job.previous.can_start_next:
                    return job.previous.start_next(job)
            job.previous.release()
            job.previous.stop(0.0)
        if not has_nursery(self, job):
            return self._start_srun(job)
        own = uuid.uuid4().hex  # the nursery outlives a generation, so its processes have an id of their own
        env = {name: own if value == job.instance else value for name, value in job.env.items()}
        return ServerInStep(self._start_srun(replace(job, env=env)), job.instance)

    def release(self, process: Process) -> None:
        """End the step of `process` once its server has ended."""
        if isinstance(process, ServerInStep):
            process.release()

    def _start_srun(self, job: Job) -> "SlurmProcess":
        return SlurmProcess(
            self.popen(job), job_title(self, job), os.environ.get("SLURM_JOB_ID"), self.queue_timeout, job.log,
            has_ranks=job.nodes > 1,
        )  # fmt: skip

    def examine(self) -> Iterator[Finding]:
        """Yield findings about SLURM: its commands, our allocation, the partitions with GPUs, and the chosen nodes."""
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            hint = "log in to a machine with SLURM's commands, or load the module that provides them"
            yield Finding("SLURM", "problem", f"not found here: {', '.join(missing)}", hint)
            return
        version, rows = (
            query_slurm("srun", "--version"),
            query_slurm("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%T"),
        )
        hint = "run sinfo and scontrol ping to see the cause, and inform the cluster's administrators"
        if not version:
            yield Finding("SLURM", "problem", "SLURM is installed, but srun does not run", hint)
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
    """Register the launcher `slurm`."""
    return [SlurmLauncher]
