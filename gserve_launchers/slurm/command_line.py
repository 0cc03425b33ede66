"""The command lines of SLURM: srun for a server, sbatch for a batch job."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gserve_core.errors import ConfigError
from gserve_core.interfaces import Job

if TYPE_CHECKING:
    from .launcher import SlurmLauncher


JOB_OPTIONS = ("partition", "account", "qos", "time", "constraint", "reservation", "nodelist", "exclude", "comment")
"""Options that shape a new job. For a step, its allocation has decided them already."""
OURS = (
    "ntasks", "nodes", "job-name", "jobid", "input", "output", "error", "label", "pty", "export", "multi-prog",
    "kill-on-bad-exit", "het-group", "pack-group", "ntasks-per-node", "parsable", "test-only", "no-allocate", "help",
    "version", "usage", "chdir", "open-mode", "attach", "clusters", "prolog", "epilog", "task-prolog", "task-epilog",
    "wait",
)  # fmt: skip
"""Options of srun that gserve sets for a server and its lease, or that run other programs."""
END_SECONDS = 30
"""Maximum time for all ranks of a server to end after the first one has ended, in seconds."""


def check_argument(word: str, at: str) -> None:
    """Raise ConfigError, with `at` as its place, if `word` is no option of srun, or conflicts with ours."""
    option = re.fullmatch(r"--([a-z][a-z0-9-]*)(=.*)?", word)  # short options may hide others: -uJx is -u -J x
    if option is None or not word.isprintable():
        raise ConfigError(f'expected a long option of srun as one word, as "--switches=1", got {word!r}', at=at)
    if any(ours.startswith(option[1]) for ours in OURS):  # srun accepts abbreviated options
        raise ConfigError(
            f"'--{option[1]}' is not allowed in srun_args: gserve sets it itself, or it would run another program",
            at=at,
        )


def job_title(launcher: "SlurmLauncher", job: Job) -> str:
    """Return SLURM's name for `job`. It is unique if the job has an instance, as every started job has."""
    return "-".join([launcher.job_name, job.name, *([job.instance[:12]] if job.instance else [])])


def srun(launcher: "SlurmLauncher", job: Job, environ: Mapping[str, str]) -> list[str]:
    """Return the command line that starts `job`, in the allocation named in `environ`, or else as a job of its own.

    Raises ConfigError: the job has GPU ids or a lone ":", or needs more GPUs than `gpus_per_server`.
    """
    if job.gpu_ids is not None:
        raise ConfigError(
            "SLURM chooses the GPUs: set the number of servers (serve.servers) instead of gpu_ids",
            at="$.serve.gpu_ids",
        )
    if ":" in job.command:
        raise ConfigError("srun reads a lone ':' as the end of a command: no name or path may be only ':'")
    gpus = job.gpus if launcher.gpus_per_server is None else launcher.gpus_per_server
    if gpus % job.nodes:
        raise ConfigError(
            f"{gpus} GPUs cannot be divided evenly over the {job.nodes} nodes of a server (nodes_per_server)",
            at="$.launcher.gpus_per_server",
        )
    if 0 < gpus < job.gpus:
        raise ConfigError(
            f"a server needs {job.gpus} GPUs (tensor_parallel_size times pipeline_parallel_size), but gpus_per_server"
            f" is {gpus}",
            at="$.launcher.gpus_per_server",
        )
    gpus //= job.nodes  # SLURM counts those of a node
    words = ["srun", f"--nodes={job.nodes}", f"--ntasks={job.nodes}", f"--job-name={job_title(launcher, job)}"]
    if job.nodes > 1:
        words += ["--ntasks-per-node=1", f"--wait={END_SECONDS}"]
    cpus, mem = launcher.cpus_per_server, launcher.mem
    if "SLURM_JOB_ID" in environ:
        words += ["--exact"]  # a step takes only what it requests, so that other steps can run beside it
        cpus, mem = cpus or _share_of_cpus(job, environ), mem or "0"  # 0: the memory of the job, shared with its steps
    else:
        options = [(option, getattr(launcher, option)) for option in JOB_OPTIONS]
        words += [f"--{option}={value}" for option, value in options if value is not None]
    if gpus:
        words.append(f"--gres=gpu:{launcher.gpu_type}:{gpus}" if launcher.gpu_type else f"--gres=gpu:{gpus}")
    elif "SLURM_JOB_ID" in environ:
        words.append("--gres=none")  # without --gres, a step takes all GPUs of the job
    if cpus is not None:
        words.append(f"--cpus-per-task={cpus}")
    if mem is not None:
        words.append(f"--mem={mem}")
    # ALL: the environment is passed on, and no command line shows it. none: the server does not use MPI, so no PMI.
    words += ["--export=ALL", "--kill-on-bad-exit=1", "--mpi=none", *launcher.srun_args]
    task = [] if "SLURM_JOB_ID" in environ else program("task.py")  # `task` may cancel our own job, never an allocation
    command = [*job.command[:-1], "--again", "--lease"] if has_nursery(launcher, job) else job.command
    return [*words, "--", *task, *command]


def sbatch(
    launcher: "SlurmLauncher", jobs: Sequence[Job], *script: str, notice: int, tasks: Sequence[int] = ()
) -> list[str]:
    """Return the command line that submits `script` as a job with room for all of `jobs`.

    `script`: a path and its arguments.
    `notice`: time between the notice (SIGUSR1) and the time limit, in seconds.
    `tasks`: numbers of the tasks of a job array; empty: no array.
    Raises ConfigError: more nodes than servers, or a folder that SLURM cannot write to.
    """
    own = jobs[0].nodes
    nodes, ranks = launcher.nodes or own, len(jobs) * own
    if not own <= nodes <= ranks:
        raise ConfigError(
            f"expected at most one node per server, got {nodes} nodes for {len(jobs)} servers (serve.servers)"
            if own == 1
            else f"expected {own} to {ranks} nodes for {len(jobs)} servers of {own} nodes each, got {nodes} nodes"
        )
    on_a_node = -(-ranks // nodes)
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
        f"--signal=B:USR1@{notice}", "--requeue" if launcher.requeue else "--no-requeue",
        "--open-mode=append", "--export=ALL", f"--output={_output(Path.cwd())}",
        *([f"--array={','.join(_ranges(tasks))}"] if tasks else ()),
    ]  # fmt: skip
    return [*words, *script]


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Return ascending numbers as SLURM writes them, such as "1-3" and "7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ["-".join(map(str, it)) for it in ranges]


def _gpus(launcher: "SlurmLauncher", jobs: Sequence[Job], on_a_node: int) -> int:
    """Return the number of GPUs that each node of the job needs."""
    # GPU ids count all GPUs of the job from 0. With ids, the job is on one node.
    ids = [gpu for job in jobs for gpu in job.gpu_ids or ()]
    if ids:
        return max(ids) + 1
    gpus = jobs[0].gpus if launcher.gpus_per_server is None else launcher.gpus_per_server
    return on_a_node * gpus // jobs[0].nodes


def _output(folder: Path) -> str:
    """Return the path of a job's output in `folder`, escaped for SLURM.

    Raises ConfigError: SLURM cannot write there.
    """
    if "\\" in str(folder):  # SLURM removes backslashes from a path, and then does not expand %j
        raise ConfigError(
            f"SLURM cannot write a job's output to a folder with a backslash in its path: {folder}; submit from another"
            " folder"
        )
    return f"{str(folder).replace('%', '%%')}/slurm-%j.out"


def is_server(job: Job) -> bool:
    """Return whether a job runs the server program under a lease, and not a program of a test or `doctor`."""
    return job.command[-1] == "--lease"


def has_nursery(launcher: "SlurmLauncher", job: Job) -> bool:
    """Return whether a nursery runs in the job's step. With ranks, each generation has an srun of its own."""
    return launcher.nursery and is_server(job) and job.nodes == 1


def program(name: str) -> list[str]:
    """Return the command of a program in this folder that needs nothing but Python."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name(name))]


def _share_of_cpus(job: Job, environ: Mapping[str, str]) -> int:
    """Return a server's share of the CPUs on the smallest node of the allocation."""
    # SLURM writes "8(x3),4" for three nodes with 8 CPUs and one with 4.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    servers_on_a_node = -(-job.servers * job.nodes // int(environ.get("SLURM_JOB_NUM_NODES") or 1))
    return max(1, min(map(int, counts)) // servers_on_a_node)
