"""The launcher `slurm`: a server is one `srun`, a step of the allocation that we are in, else a job of its own.

The lease of a server goes through srun's stdin and stdout, its log through srun's stderr. That srun lives does not mean
that the server does, and a SIGTERM to srun is a SIGKILL for the server: so what a server is told, and how it fares,
goes over the lease. SLURM is asked why a job does not run yet, why it has ended, and whether it is gone. Where the
owner has died, `guard` ends a job that has no server yet, and `task` one that has no srun any more.

What srun runs is the server's nursery (`gserve_core.process.nursery.stay`), which forks it, and again when it has died:
a step then has many lives of a server, one after the other, and asks SLURM for its place once.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, ClassVar

from gserve_core.commands import GONE, UNKNOWN, CommandLauncher, LocalProcess, output_of
from gserve_core.errors import ConfigError, StartupTimeout, did_you_mean
from gserve_core.hookspecs import hookimpl
from gserve_core.interfaces import Finding, Job, Launcher, Process
from gserve_core.lease import Silence

ASK_SECONDS = 10.0
"""How long an answer of SLURM is waited for."""
LOOK_SECONDS = 1.0, 15.0
"""Seconds between two questions about a job that waits: doubled from the first to the second."""
STEP_SECONDS = 120.0
"""How long a step may wait for its place in the allocation, unless `queue_timeout` says so."""
FORCE_SECONDS = 10.0
"""How long srun may take to end its job by force."""
SETTLE_SECONDS = 3.0
"""How long SLURM may take to see that a job has ended whose srun has."""
GONE_SECONDS = 60.0
"""How long SLURM may take to end a job that was cancelled: its KillWait, 30 s by default, and some more."""
LOOK_AT_LIFE = 0.02
"""Seconds between two looks at a server that is to end."""
CHUNK = 1 << 16
"""Bytes that are read at once."""
END = b"end\n"
"""What tells the nursery of a step to kill its server."""
TAIL = 1 << 16
"""Bytes at the end of a log in which srun's last words are looked for."""
COMMANDS = ("srun", "sbatch", "squeue", "sinfo", "scontrol", "scancel")
"""What gserve uses of SLURM."""
SQUEUE = "squeue", "--noheader", "--all"
"""How SLURM is asked for jobs: also for those in partitions that it hides."""
UNUSABLE = re.compile(r"down|drain|fail|maint|unk|inval|.*\*$")
"""States of nodes that take no jobs, as sinfo has them; a star means that SLURM does not hear of the node."""

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
JOB_OPTIONS = ("partition", "account", "qos", "time", "constraint", "reservation", "nodelist", "exclude", "comment")
"""What a job is asked for with. Of a step in an allocation it is decided already."""
OURS = (
    "ntasks", "nodes", "job-name", "jobid", "input", "output", "error", "label", "pty", "export", "multi-prog",
    "kill-on-bad-exit", "het-group", "pack-group", "ntasks-per-node", "parsable", "test-only", "no-allocate", "help",
    "version", "usage", "chdir", "open-mode", "attach", "clusters", "prolog", "epilog", "task-prolog", "task-epilog",
)  # fmt: skip
"""Options of srun on which a server and its lease depend, or that run other programs."""
SHAPING = re.compile(
    r"SLURM_(CPUS?_.*|GPUS?_?.*|GRES.*|TRES_.*|MEM_.*|NNODES|N?TASKS.*|NPROCS|DIST.*|HINT|THREADS.*|EXACT|EXCLUSIVE|OVERLAP"
    r"|OVERCOMMIT|OPEN_MODE|LABELIO|STD\w+MODE|UNBUFFEREDIO|WAIT|EXPORT_ENV|STEP_.*|STEPID|IMMEDIATE|KILL_BAD_EXIT|MPI_TYPE"
    r"|PROCID|LOCALID|NODEID|TASK_.*|PROLOG|EPILOG|SPREAD_JOB|NO_KILL|WHOLE|JOB_NAME|JOB_NUM_NODES|TIMELIMIT)"
)
"""What srun would read as options: in a batch job they are those of the job, not of a server."""
COMMANDS_OPTIONS = ("SQUEUE_", "SCANCEL_", "SINFO_", "SACCT_", "SCONTROL_", "SALLOC_", "SRUN_", "SBATCH_")
"""Beginnings of variables that SLURM's commands read as options: of a user's own calls, not of ours."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
"""What SLURM sets in a step to the GPUs that it has bound; ours are not those of another machine."""

SUSPENDED = "SUSPENDED", "STOPPED"
"""SLURM's states of a job whose processes are stopped."""
ENDINGS = {  # SLURM's states of a job that has not ended by itself, in words
    "BOOT_FAIL": "its node did not boot",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "its deadline came",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it needed more memory than it had asked for (mem)",
    "PREEMPTED": "another job took its place",
    "REVOKED": "it was revoked",
    "SUSPENDED": "it was suspended",
    "TIMEOUT": "its time was over (time)",
}
LAST_WORDS = (  # what srun and slurmstepd say of a step, and the state that it means
    (r"CANCELLED AT \S+ DUE TO TIME LIMIT", "TIMEOUT"),
    (r"CANCELLED AT \S+ DUE TO PREEMPTION", "PREEMPTED"),
    (r"CANCELLED AT \S+ DUE TO NODE FAILURE|Node failure on", "NODE_FAIL"),
    (r"(?i:out.of.memory|oom.kill|exceeded \w+ memory limit)", "OUT_OF_MEMORY"),
    (r"CANCELLED AT", "CANCELLED"),
)

logger = logging.getLogger("gserve.slurm")


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
            _check_argument(word, f"$.srun_args[{place}]")

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
            yield _examine_allocation(job)
            yield from _examine_partitions(rows, None)
            return
        yield from _examine_partitions(rows, self.partition.split(",") if self.partition else [])
        if self.nodelist:
            yield _examine_nodes(self.nodelist)


def _examine_allocation(job: str) -> Finding:
    """Return what SLURM says of the job that we are in, unless that is over."""
    (state, left, nodes), *_ = ask(*SQUEUE, f"--jobs={job}", "--format=%T|%L|%N") or [["", "", ""]]
    if state != "RUNNING":
        hint = "leave this shell, or unset SLURM_JOB_ID: else servers are to be steps of that job"
        return Finding("allocation", "problem", f"job {job} is not running any more", hint)
    return Finding("allocation", "ok", f"job {job} on {nodes}: servers are steps of it; time left: {left.lower()}")


def _examine_nodes(nodelist: str) -> Finding:
    """Return whether the nodes that jobs are to run on take any."""
    rows = ask("sinfo", "--noheader", "--Node", f"--nodes={nodelist}", "--format=%N|%T|%E") or ()
    unusable = {
        name: f"{name} is {state} ({'|'.join(reason)})" for name, state, *reason in rows if UNUSABLE.match(state)
    }
    names = {name for name, *_ in rows}
    if not names or len(unusable) == len(names):
        hint = "choose other nodes (nodelist), or ask those who run the cluster"
        text = "; ".join(unusable.values()) or f"there is no node {nodelist}"
        return Finding("nodelist", "problem", text, hint)
    if unusable:
        return Finding("nodelist", "note", f"{'; '.join(unusable.values())}; {len(names) - len(unusable)} can be used")
    return Finding("nodelist", "ok", f"{nodelist}: {len(names)} can be used")


def _examine_partitions(rows: list[list[str]], chosen: list[str] | None) -> Iterator[Finding]:
    """Yield what there is of each partition that has GPUs or is chosen; sinfo has a row for each state of its nodes.

    Where none is chosen, a job goes to the default one. `chosen` is None where no job is made.
    """
    partitions: dict[str, list[list[str]]] = {}
    for name, *row in rows:
        partitions.setdefault(name, []).append(row)
    for name, own in partitions.items():
        gpus = ", ".join(dict.fromkeys(row[3] for row in own if "gpu" in row[3]))
        is_chosen = chosen is not None and (name.rstrip("*") in chosen or (not chosen and name.endswith("*")))
        if gpus or is_chosen:
            availability, limit, *_ = own[0]
            is_usable = availability == "up" and any(not UNUSABLE.match(row[4]) for row in own)
            states = ", ".join(f"{row[2]} {row[4]}" for row in own)
            yield Finding(
                f"partition {name.rstrip('*')}",
                "ok" if is_usable and gpus else "problem" if is_chosen and not is_usable else "note",
                f"{availability}{', the default' * name.endswith('*')}; nodes: {states}; time limit: {limit};"
                f" {gpus or 'no GPUs'}",
            )
    known = [name.rstrip("*") for name in partitions]
    for name in chosen or ():
        if name not in known:
            yield Finding(f"partition {name}", "problem", f"there is none of this name{did_you_mean(name, known)}")
    if not any("gpu" in row[4] for row in rows):
        yield Finding("partitions", "note", f"none has GPUs that SLURM knows of: {', '.join(known)}")


def _check_argument(word: str, at: str) -> None:
    """Raise ConfigError where `word` cannot be an option of srun beside ours."""
    option = re.fullmatch(r"--([a-z][a-z0-9-]*)(=.*)?", word)  # short ones may hide others: -uJx is -u -J x
    if option is None or not word.isprintable():
        raise ConfigError(f'expected a long option of srun as one word, as "--switches=1", got {word!r}', at=at)
    if any(ours.startswith(option[1]) for ours in OURS):  # srun takes the beginning of an option for it
        raise ConfigError(
            f"'--{option[1]}' is not for srun_args: gserve sets that itself, or it would run another program", at=at
        )


def job_title(launcher: SlurmLauncher, job: Job) -> str:
    """Return the name by which SLURM knows `job`: no other has it, once it is started."""
    return "-".join([launcher.job_name, job.name, *([job.instance[:12]] if job.instance else [])])


def srun(launcher: SlurmLauncher, job: Job, environ: Mapping[str, str]) -> list[str]:
    """Return the command line that starts `job`: in the allocation that `environ` tells of, else as a job of its own.

    Raises ConfigError.
    """
    if job.gpu_ids is not None:
        raise ConfigError(
            "SLURM chooses the GPUs: say how many servers there are to be (serve.servers), not gpu_ids",
            at="$.serve.gpu_ids",
        )
    if ":" in job.command:
        raise ConfigError(
            "srun takes a ':' that stands alone for the end of a command: no name or path can be just that"
        )
    gpus = job.gpus if launcher.gpus_per_server is None else launcher.gpus_per_server
    if 0 < gpus < job.gpus:
        raise ConfigError(
            f"a server takes {job.gpus} GPUs (tensor_parallel_size times pipeline_parallel_size), and gpus_per_server"
            f" is {gpus}",
            at="$.launcher.gpus_per_server",
        )
    words = ["srun", "--nodes=1", "--ntasks=1", f"--job-name={job_title(launcher, job)}"]
    cpus, mem = launcher.cpus_per_server, launcher.mem
    if "SLURM_JOB_ID" in environ:
        words += ["--exact"]  # a step takes what it asks for, and no more: others run beside it
        cpus, mem = cpus or _share_of_cpus(job, environ), mem or "0"  # 0: the job's, without keeping others from it
    else:
        options = [(option, getattr(launcher, option)) for option in JOB_OPTIONS]
        words += [f"--{option}={value}" for option, value in options if value is not None]
    if gpus:
        words.append(f"--gres=gpu:{launcher.gpu_type}:{gpus}" if launcher.gpu_type else f"--gres=gpu:{gpus}")
    elif "SLURM_JOB_ID" in environ:
        words.append("--gres=none")  # a step that asks for none takes all GPUs of the job
    if cpus is not None:
        words.append(f"--cpus-per-task={cpus}")
    if mem is not None:
        words.append(f"--mem={mem}")
    # ALL: the environment travels as such, in no command line; none: PMI is not for a program that knows nothing of MPI
    words += ["--export=ALL", "--kill-on-bad-exit=1", "--mpi=none", *launcher.srun_args]
    task = [] if "SLURM_JOB_ID" in environ else _program("task.py")  # an allocation is not ours to end
    command = [*job.command[:-1], "--again", "--lease"] if launcher.nursery and is_server(job) else job.command
    return [*words, "--", *task, *command]


def is_server(job: Job) -> bool:
    """Say whether a job is the server program under a lease, and not another that a test or `doctor` runs."""
    return job.command[-1] == "--lease"


def _program(name: str) -> list[str]:
    """Return the command of a program beside this one that needs nothing but Python."""
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name(name))]


def _share_of_cpus(job: Job, environ: Mapping[str, str]) -> int:
    """Return a server's share of the CPUs of the smallest node: SLURM says "8(x3),4"."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    servers_on_a_node = -(-job.servers // int(environ.get("SLURM_JOB_NUM_NODES") or 1))
    return max(1, min(map(int, counts)) // servers_on_a_node)


class SlurmProcess(LocalProcess):
    """An srun, and the job or step that it has made. `title` is its name, `allocation` the job that it is a step of."""

    def __init__(
        self, popen: "subprocess.Popen[bytes]", title: str, allocation: str | None, limit: float | None, log: Path
    ) -> None:
        super().__init__(popen)
        self._guard = _guard(popen)
        self._title = title
        self._allocation = allocation
        self._limit = STEP_SECONDS if allocation and limit is None else limit
        self._log = log
        self._waited = Silence(LOOK_SECONDS[0])
        self._place = "a free place in its job" if allocation else "SLURM's answer"
        self._runs = False
        self._was_forced = False
        self._was_suspended = False
        self._is_gone = False
        forget = weakref.WeakMethod(self.leave)  # while a fork of ours held the line open, our end would not be noticed
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        threading.Thread(target=self._look, name=title, daemon=True).start()

    def poll(self) -> int | None:
        """Return the exit code of the server once srun has ended (negative: a signal's number), else None."""
        code = super().poll()
        return code if code is None or not 128 < code <= 192 else 128 - code  # srun's way to tell of a signal

    def waiting(self) -> str | None:
        """Return what the job waits for, in SLURM's words; None once it runs. Raises StartupTimeout: for too long."""
        if self._runs:
            return None
        if self._limit is not None and self._waited.look() > self._limit:
            hint = (
                "other steps of the job hold what it asks for" if self._allocation else "ask for less, or wait longer"
            )
            raise StartupTimeout(
                f"{self._title} waited {self._limit:g} s (queue_timeout) for {self._place}: {hint} (log: {self._log})",
                log=self._log,
            )
        return f"waiting for {self._place}"

    def why(self) -> str | None:
        """Return how SLURM has ended the job; None where it ended by itself, or was ended by us.

        One that does not move, or that we ended because of that, may have been suspended: that is SLURM's act, too.
        """
        has_ended = self._popen.poll() is not None
        if self._was_suspended or (not has_ended and self._is_suspended()):
            return self._act("SUSPENDED", self._allocation or self._title)
        if self._was_forced or not has_ended:
            return None
        if self._popen.returncode < 0:
            return f"its srun was killed by {signal.Signals(-self._popen.returncode).name}"
        rows = self._told("--states=all")
        number, state, _ = rows[-1] if rows else (self._allocation or self._title, "", "")
        if state not in ENDINGS:
            state = self._accounted() or self._last_words() or ""
        return self._act(state, number) if state in ENDINGS else None

    def _act(self, state: str, number: str) -> str:
        what = f"its step of job {number}" if self._allocation else f"its job {number}"
        return f"SLURM says {state} of {what}: {ENDINGS[state]}"

    def stop(self, grace: float) -> int:
        """Wait `grace` seconds for the end that the server was told; then end it by force. Returns the exit code."""
        if not self._is_gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace)
            if self._popen.poll() is None:
                self._was_forced = True
                self._was_suspended = self._is_suspended()
                self._popen.terminate()  # srun kills the server, and ends its job
                try:
                    self._popen.wait(FORCE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._kill_group()
            self._end_job()
            self._is_gone = True
        self.leave()
        self.stdout.close()
        self._guard.kill()
        for process in (self._popen, self._guard):
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed, and not gone: the kernel has it
                process.wait(GONE)
        code = self.poll()
        return UNKNOWN if code is None else code

    def _is_suspended(self) -> bool:
        return any(state in SUSPENDED for _, state, *_ in self._told() or ())

    def leave(self) -> None:
        """Close srun's stdin: what it runs ends by itself."""
        with contextlib.suppress(OSError):
            self.stdin.close()

    def write_to(self, log: Path) -> None:
        """Have srun, which holds its log open, write to another file from now on. Raises OSError."""
        shutil.copyfile(self._log, log)
        os.truncate(self._log, 0)  # srun appends: what comes next stands at the beginning
        between = log.with_name(f"{log.name}.new")
        self._log.rename(between)
        log.rename(self._log)
        between.rename(log)
        self._log = log

    def _end_job(self) -> None:
        """Wait until SLURM has no such job any more; cancel one that goes on although its srun has ended.

        One that has ended by itself is given the time to be seen as ended: it would count as cancelled.
        """
        began = time.monotonic()
        patience = 0.0 if self._was_forced or self._popen.returncode < 0 else SETTLE_SECONDS
        while (rows := self._active()) != []:
            # a step that is cancelled is killed at once: one that stays has lost its slurmstepd, and stays for ever
            if time.monotonic() - began > (FORCE_SECONDS if rows is None or self._allocation else GONE_SECONDS):
                logger.warning("SLURM may not have ended %s: see squeue --name=%s", self._title, self._title)
                break
            for number, state, *_ in rows or ():
                if state != "COMPLETING" and time.monotonic() - began >= patience:
                    ask("scancel", number)
            time.sleep(LOOK_SECONDS[0] / 2)

    def _look(self) -> None:
        """Be the thread that asks what the job waits for, until it runs."""
        pause = LOOK_SECONDS[0]
        while not self._runs and self._popen.poll() is None:
            for number, state, reason in self._active() or ():
                self._runs = state not in ("PENDING", "CONFIGURING")
                self._place = f"SLURM's queue (job {number}, {reason})"
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS[1])

    def _active(self) -> list[list[str]] | None:
        """Return the number, the state and the reason for it of our job or step, while there is one; None: unknown."""
        if self._allocation is None:
            return self._told()
        steps = ask(*SQUEUE, "--steps", f"--jobs={self._allocation}", "--format=%i|%j")
        if steps is None:  # the allocation may be gone, and the step with it
            return [] if ask(*SQUEUE, "--jobs=1,1", "--format=%i") is not None else None
        return [[number, "RUNNING", ""] for number, title in steps if title == self._title]

    def _told(self, *options: str) -> list[list[str]] | None:
        """Return the number, the state and the reason for it of our job, or of that which we are a step of."""
        which = f"--jobs={self._allocation}" if self._allocation else f"--name={self._title}"
        return ask(*SQUEUE, which, "--format=%i|%T|%r", *options)

    def _accounted(self) -> str | None:
        """Return the state with which the job or step ended, where SLURM keeps accounts."""
        which = f"--jobs={self._allocation}" if self._allocation else f"--name={self._title}"
        rows = ask("sacct", "--noheader", "--parsable2", "--delimiter=|", which, "--format=JobName,State") or ()
        return next((state.split()[0] for name, state in rows if name == self._title and state), None)

    def _last_words(self) -> str | None:
        """Return the state that srun's last words in the log mean."""
        try:
            with self._log.open("rb") as stream:
                stream.seek(max(0, self._log.stat().st_size - TAIL))
                text = stream.read().decode(errors="replace")
        except OSError:
            return None
        said = [line for line in text.splitlines() if re.match(r"(srun|slurmstepd\S*): ", line)]
        return next((state for words, state in LAST_WORDS if any(re.search(words, line) for line in said)), None)


class Life:
    """One life of a server in a step that may have more of them. Implements `interfaces.Process`.

    Its stdin is srun's. What comes from srun is the server's, but for the nursery's word that the server has ended.
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
        self._has_spoken = False
        self._has_ended = False
        self._is_stopped = False
        self._is_last = False

    @property
    def is_kept(self) -> bool:
        """Say whether the step may begin another life: this one has ended, and the step has not."""
        return self._has_ended and not self._is_last and self._step.poll() is None

    def next(self, job: Job) -> "Life":
        """Begin another life, that of `job`. Raises OSError: it cannot have a log of its own."""
        self._step.write_to(job.log)
        return Life(self._step, job.instance)

    def release(self) -> None:
        """Have the step end with this life."""
        self._is_last = True
        if self._is_stopped:
            self._step.leave()

    def poll(self) -> int | None:
        """Return the exit code of the server once it or srun has ended, else None. Hands on what has come from it."""
        self._look()
        if self._unread:
            with contextlib.suppress(BlockingIOError):
                self._unread = self._unread[os.write(self._pipe.fileno(), self._unread) :]
        return None if self._unread else self._code

    def waiting(self) -> str | None:
        """Return what the job waits for, in SLURM's words; None once it runs. Raises StartupTimeout: for too long."""
        return self._step.waiting()

    def why(self) -> str | None:
        """Return how SLURM has ended the job; None where only the server has ended."""
        return None if self._has_ended else self._step.why()

    def stop(self, grace: float) -> int:
        """Wait `grace` seconds for the end of the server, then end it by force; and its step, if there is no other."""
        if self._wait(grace) is None and self._has_spoken and not self._is_last:
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
            self._step.leave()
            self._step.stop(FORCE_SECONDS)
        assert self._code is not None
        return self._code

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self._code is None and time.monotonic() < deadline:
            self._look()
            time.sleep(LOOK_AT_LIFE)
        return self._code

    def _look(self) -> None:
        """Divide what has come from srun; see whether the server has ended, or srun has."""
        if self._code is not None:
            return
        code = self._step.poll()  # first: what has come until then is read after
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._step.stdout.fileno(), CHUNK):
                self._has_spoken = True
                *lines, self._line = (self._line + chunk).split(b"\n")
                for line in lines:
                    if ended := self._ended.fullmatch(line):
                        self._has_ended, code = True, int(ended[1])
                    else:
                        self._unread += line + b"\n"
        self._code = code


def _guard(srun: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
    """Start what ends an srun when this process is gone."""
    assert srun.stdin is not None
    with Path(f"/proc/self/fd/{srun.stdin.fileno()}").open("rb", buffering=0) as line:  # srun's end of the pipe
        return subprocess.Popen(
            [*_program("guard.py"), str(srun.pid)],
            stdin=line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def ask(*command: str) -> list[list[str]] | None:
    """Return the lines that a command of SLURM prints, cut at "|"; None where there is no answer."""
    try:
        told = output_of(command, environment_for_slurm(), ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.split("|") for line in told.splitlines()]


def environment_for_slurm() -> dict[str, str]:
    """Return our environment without options that a user has set for calls of their own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(COMMANDS_OPTIONS)}


@hookimpl
def gserve_register_launchers() -> list[type[Launcher]]:
    """Bring the launcher for SLURM."""
    return [SlurmLauncher]
