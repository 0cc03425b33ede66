"""Faults of SLURM: jobs and steps that end, wait, or lose their node, and owners that leave them behind.

Every row has a real cluster of its own. It looks at the cluster's queue, at its processes in /proc, at the sockets of
this machine, and at what became of the items; gserve is asked only how it finds its servers, and why they have ended.
"""

import contextlib
import json
import logging
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from gserve import LaunchError, ServeConfig, VLLMServer, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.testing import RUN_VARIABLE
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.slurm.cluster import SlurmCluster, is_installed

from . import oracles
from .frame import Outcome, Scale
from .oracles import Tally, Watch, raised, until
from .servers import LLM, at_work

ENDS_SECONDS = 60.0 + 5.0 + 15.0
"""How long what a fault has hit may take to be gone: the lease's time, SLURM's KillWait, and some more."""
HEAL_SECONDS = 150.0
"""How long a server may take to be ready again: as long as that, and to start."""
LIMIT_SECONDS = 180.0
"""How long SLURM may take to end a job whose time of one minute is over."""
SECONDS = 480, 1500
"""How long a row may take, in its short and its long form; and then, two minutes to end what it has started."""
LIMIT = SECONDS[0] + 120, SECONDS[1] + 120
STALL = 10.0
"""`stall_timeout`, in seconds."""
ECHO = EchoEngine(latency=0.2, capacity=4, processes=2)
"""An item takes 0.2 s: some are in flight at every moment."""


class Patient(Tally):
    """Items that may wait until a server is back."""

    patience = 2 * HEAL_SECONDS


@contextlib.contextmanager
def cluster(seconds: int, nodes: int = 3) -> Iterator[SlurmCluster]:
    """Have a cluster to which SLURM's commands speak, in this process and those below it.

    Raises KeyboardInterrupt in the context after so many seconds: a row that is killed would leave its cluster behind.
    """

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"not done within {seconds} s")

    for folder in (Path(tempfile.gettempdir()), Path(tempfile.gettempdir()).parent):
        folder.chmod(folder.stat().st_mode | 0o011)  # the way to munged's socket must be open to all
    with SlurmCluster(nodes=nodes) as one:
        os.environ |= one.environ
        signal.signal(signal.SIGALRM, end)
        signal.alarm(seconds)
        try:
            yield one
        finally:
            signal.alarm(0)


@contextlib.contextmanager
def allocation(*options: str) -> Iterator[None]:
    """Be inside an allocation, with what its shell would have in its environment."""
    tell = "import json, os, sys; print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"
    command = ["salloc", "--quiet", *options, sys.executable, "-c", tell]
    before = dict(os.environ)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as salloc:
        assert salloc.stdout is not None
        os.environ |= json.loads(salloc.stdout.readline())
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            salloc.communicate()


def service(serve: ServeConfig, launcher: SlurmLauncher) -> VLLMService:
    """Return a service on echo."""
    return VLLMService(LLM, serve, engine=ECHO, launcher=launcher)


def serving(servers: int) -> ServeConfig:
    """Return a config that lets servers be struck as often as a row wants."""
    return ServeConfig(servers=servers, stall_timeout=STALL, max_restarts=1000)


def named(on: SlurmCluster, name: str) -> list[str]:
    """Return what the queue has under a name, or a part of one: jobs and steps, in words of squeue."""
    lines = on.run("squeue", "--noheader", "--format=%i|%T|%N|%j").splitlines()
    lines += on.run("squeue", "--noheader", "--steps", "--format=%i|step|%N|%j").splitlines()
    return [line for line in lines if name in line]


# ------------------------------------------------------------------------------------------------- servers that are hit


class Heard(logging.Handler):
    """What gserve says in its log."""

    def __init__(self) -> None:
        super().__init__()
        self._sentences: list[str] = []
        logging.getLogger("gserve").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a sentence."""
        self._sentences.append(record.getMessage())

    def of(self, log: Path | None) -> str:
        """Return what was said of the end of the server with this log."""
        return next((it.splitlines()[0] for it in self._sentences if f"(log: {log})" in it), "nothing")


class Life:
    """One life of a ready server, as SLURM and /proc know it."""

    def __init__(self, on: SlurmCluster, server: VLLMServer) -> None:
        record = server.record()
        self.on = on
        self.log = server.status().log
        self._instances = {record.instance}
        self._port = record.address.port
        (pid,) = self.pids("server")
        environ = psutil.Process(pid).environ()
        self.job = environ["SLURM_JOB_ID"]
        self.step = f"{self.job}.{environ['SLURM_STEP_ID']}"
        (step,) = [line for line in named(on, "gserve") if line.startswith(f"{self.step}|step|")]
        _, _, self.node, self._title = step.split("|")
        self._own = {record.instance}
        self._instances |= {it.instance for it in oracles.of_servers() if f"--job-name={self._title} " in it.command}

    def pids(self, role: str) -> list[int]:
        """Return the process ids of a role, in the order in which they began."""
        if role == "slurmstepd":
            return [pid for pid, it in self.on.processes().items() if f"slurmstepd: [{self.step}]" in it]
        return [it.pid for it in oracles.of_servers() if it.instance in self._instances and it.role == role]

    def left(self, *, place_stays: bool = False) -> list[str]:
        """Return what there is of it: processes, its job or step, its port; without what stays for its next life."""
        instances = self._own if place_stays else self._instances
        found = [f"{it.pid} {it.command[:80]}" for it in oracles.of_servers() if it.instance in instances]
        if not place_stays:
            found += [f"{pid} slurmstepd" for pid in self.pids("slurmstepd")]
            found += named(self.on, self._title)
        return found + [f"port {self._port}"] * (self._port in oracles.listening())


@dataclass(frozen=True)
class Fault:
    """What befalls one server, and what must be said of its end; None: it is to live on.

    `strike` returns something where it has waited for the moment of the fault. `step_stays`: SLURM does not see the end
    of the step as long as the allocation lasts. `place_stays`: the server is forked again in the same job or step.
    """

    name: str
    strike: Callable[[Life], object]
    says: str | None
    step_stays: bool = False
    place_stays: bool = False


def kill_all(pids: Sequence[int]) -> None:
    """Kill processes at the same instant: none sees another die, as the other srun of a pair would, and clear up."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def kill(role: str, *places: int) -> Callable[[Life], None]:
    """Return what kills processes of a role: those at some places in the order of their beginning, or all."""

    def strike(life: Life) -> None:
        pids = life.pids(role)
        assert pids, f"there is no {role}"
        kill_all([pids[place] for place in places] or pids)

    return strike


def run(*command: str) -> Callable[[Life], None]:
    """Return what runs a command of SLURM; "{job}", "{step}" and "{node}" in it are those of the server."""

    def strike(life: Life) -> None:
        life.on.run(*(word.format(job=life.job, step=life.step, node=life.node) for word in command))

    return strike


class Range:
    """A service at work, whose servers are hit one after the other."""

    def __init__(self, on: SlurmCluster, service: VLLMService, watch: Watch) -> None:
        self._on = on
        self._service = service
        self._watch = watch
        self._heard = Heard()

    def strike(self, fault: Fault, outcome: Outcome, index: int) -> None:
        """Do a fault to one server: it must be seen, named, cleared away and mended."""
        with outcome.trial(fault.name):
            watch, servers = self._watch, self._service.servers
            until(lambda: all(watch.ready_for(it) > 1.0 for it in range(len(servers))), HEAL_SECONDS, "all ready")
            life = Life(self._on, servers[index])
            restarts = self._service.status()[index].restarts
            since = time.monotonic()
            if fault.strike(life) is not None:
                since = time.monotonic()
            if fault.says is None:
                time.sleep(2 * STALL)
                assert self._service.status()[index].restarts == restarts, f"it ended: {self._heard.of(life.log)}"
                return
            detect, recover = watch.wait_recovered(index, since, HEAL_SECONDS)
            outcome.detect.append(detect)
            outcome.recover.append(recover)
            if "down" in self._on.node_states()[life.node]:
                self._on.restart_node(life.node)

            def left() -> list[str]:
                found = life.left(place_stays=fault.place_stays)
                return [it for it in found if not (fault.step_stays and "|step|" in it)]

            wait_gone(outcome, left, since)
            if fault.place_stays:
                assert Life(self._on, servers[index]).step == life.step, "it was given another place"
            said = self._heard.of(life.log)
            assert fault.says in said, f"expected '{fault.says}' in: {said}"


def wait_gone(outcome: Outcome, left: Callable[[], Sequence[object]], since: float) -> None:
    """Wait until nothing is left; note how long that took. Raises AssertionError: too long."""
    while found := left():
        if time.monotonic() - since > ENDS_SECONDS:
            outcome.orphans += len(found)
            raise AssertionError(f"{len(found)} left after {ENDS_SECONDS:g} s: {'; '.join(map(str, found))}")
        time.sleep(0.2)
    took = time.monotonic() - since
    outcome.figures["gone within, worst"] = max(took, outcome.figures.get("gone within, worst", 0.0))


def strike_each(
    on: SlurmCluster, service: VLLMService, faults: Sequence[Fault], times: int, chance: random.Random
) -> list[Outcome]:
    """Do each fault some times while items are worked on: to each server in turn, from one chosen at random."""
    outcomes = []
    with Watch(service) as watch:
        shots = Range(on, service, watch)
        for fault in faults:
            outcome, tally = Outcome(fault=fault.name), Patient()
            with at_work(service, tally):
                first = chance.randrange(len(service.servers))
                for number in range(first, first + times):
                    shots.strike(fault, outcome, number % len(service.servers))
            outcome.count(tally)
            outcomes.append(outcome)
    return outcomes


def skipped(fault: str) -> list[Outcome]:
    """Return that nothing was tried, where there can be no cluster."""
    why = "" if is_installed() and os.geteuid() == 0 else "needs SLURM's packages, and root"
    return [Outcome(fault=fault, skipped=why)] if why else []


def of_jobs(scale: Scale) -> list[Outcome]:
    """Hit servers that are jobs of their own, started from a login node."""
    faults = [
        Fault("scancel of a job", run("scancel", "{job}"), "SLURM reports CANCELLED"),
        Fault("scancel of a job's step", run("scancel", "{step}"), "SLURM reports CANCELLED"),
        Fault("kill -9 of a job's srun", kill("srun", 0), "its srun was killed by SIGKILL"),
        Fault("kill -9 of a job's other srun, which only looks after the first", kill("srun", 1), None),
        Fault("kill -9 of both sruns of a job", kill("srun"), "its srun was killed by SIGKILL"),
        # the line to the server breaks, as if its owner were gone: it ends, and cancels its job
        Fault("kill -9 of a job's slurmstepd", kill("slurmstepd"), "SLURM reports CANCELLED"),
        Fault("kill -9 of a job's server", kill("server"), "its process was killed by SIGKILL", place_stays=True),
        Fault("kill -9 of a job's nursery", kill("nursery"), "its process was killed by SIGKILL"),
    ]
    if not_tried := skipped("jobs of SLURM that end"):
        return not_tried
    with cluster(scale.of(*SECONDS)) as on, service(serving(3), SlurmLauncher(gpus_per_server=1)) as one:
        return strike_each(on, one, faults, scale.of(1, 3), scale.random)


def of_steps(scale: Scale) -> list[Outcome]:
    """Hit servers that are steps of the allocation in which their owner is; before, have no room for them."""
    faults = [
        Fault("scancel of a step", run("scancel", "{step}"), "SLURM reports CANCELLED"),
        Fault("kill -9 of a step's srun", kill("srun", 0), "its srun was killed by SIGKILL"),
        Fault("kill -9 of both sruns of a step", kill("srun"), "its srun was killed by SIGKILL"),
        Fault("kill -9 of a step's server", kill("server"), "its process was killed by SIGKILL", place_stays=True),
        Fault("kill -9 of a step's nursery", kill("nursery"), "its process was killed by SIGKILL"),
        Fault("kill -9 of a step's slurmstepd", kill("slurmstepd"), "it sent no heartbeat", step_stays=True),
    ]
    if not_tried := skipped("steps of an allocation that end"):
        return not_tried
    with cluster(scale.of(*SECONDS)) as on, allocation("--nodes=3", "--exclusive", "--gres=gpu:4"):
        outcome = full(on, scale)
        launcher = SlurmLauncher(gpus_per_server=1, cpus_per_server=1, mem="100M")
        with service(serving(3), launcher) as one:
            return [outcome, *strike_each(on, one, faults, scale.of(1, 3), scale.random)]


def full(on: SlurmCluster, scale: Scale) -> Outcome:
    """Start servers in an allocation whose other steps have all of it, and again when they have ended."""
    outcome = Outcome(fault="an allocation that is full")
    serve = ServeConfig(servers=3, startup_timeout=60.0)
    for _ in range(scale.of(1, 3)):
        with outcome.trial(outcome.fault):
            command = ["srun", "--exact", "--nodes=3", "--ntasks=3", "--cpus-per-task=8", "--mem=0", "sleep", "600"]
            with subprocess.Popen(command) as other:
                until(lambda: named(on, "sleep"), HEAL_SECONDS, "another step")
                began = time.monotonic()
                error = raised(LaunchError, service(serve, SlurmLauncher(queue_timeout=5.0)).start)
                outcome.detect.append(time.monotonic() - began)
                other.terminate()
            hint = "other steps of the job use the resources that it requests"
            for words in ("queue_timeout", "a free place in its job", hint):
                assert words in str(error), f"expected '{words}' in: {error}"
            wait_gone(outcome, lambda: [*named(on, "gserve"), *oracles.of_servers()], time.monotonic())
            with service(serve, SlurmLauncher()) as one:
                tally = Patient()
                tally.batch(one, 100)
            outcome.count(tally)
    return outcome


# ----------------------------------------------------------------------------------------- nodes, time and preemption


def of_nodes(scale: Scale) -> list[Outcome]:
    """Take nodes from servers: they are set down, or lose their slurmd, or a job of more weight wants them."""
    wants = ["sbatch", "--partition=high", "--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 10"]
    faults = [
        Fault("preemption (REQUEUE)", run(*wants), "SLURM reports PREEMPTED"),
        Fault(
            "a node set down",
            run("scontrol", "update", "nodename={node}", "state=down", "reason=test"),
            "SLURM reports NODE_FAIL",
        ),
        Fault("kill -9 of slurmd", kill_slurmd, "SLURM reports NODE_FAIL"),
    ]
    if not_tried := skipped("nodes of SLURM that fail"):
        return not_tried
    with (
        cluster(scale.of(*SECONDS)) as on,
        service(serving(2), SlurmLauncher(gpus_per_server=1, partition="low")) as one,
    ):
        return strike_each(on, one, faults, scale.of(1, 3), scale.random)


def kill_slurmd(life: Life) -> bool:
    """Kill the slurmd of a server's node; return once SLURM has noticed."""
    os.kill(life.on.daemons[f"slurmd[{life.node}]"], signal.SIGKILL)
    return bool(until(lambda: "down" in life.on.node_states()[life.node], LIMIT_SECONDS, "the node is down"))


def of_time(scale: Scale) -> list[Outcome]:
    """Have the time of servers run out, which is one minute: not that of all at once."""
    apart = Fault("scancel, half a minute before", run("scancel", "{job}"), "SLURM reports CANCELLED")
    over = Fault("walltime of a minute", wait_for_end, "SLURM reports TIMEOUT")
    if not_tried := skipped(over.name):
        return not_tried
    outcome, tally = Outcome(fault=over.name), Patient()
    with (
        cluster(scale.of(*SECONDS)) as on,
        service(serving(2), SlurmLauncher(gpus_per_server=1, time="1")) as one,
        Watch(one) as watch,
        at_work(one, tally),
    ):
        shots = Range(on, one, watch)
        time.sleep(20.0)  # so that the new life of one of them outlasts the old one of the other
        shots.strike(apart, Outcome(fault=apart.name), 1)
        for number in range(scale.of(1, 3)):
            shots.strike(over, outcome, number % 2)
    outcome.count(tally)
    return [outcome]


def wait_for_end(life: Life) -> bool:
    """Return when SLURM has begun to end the job."""

    def runs() -> bool:
        return any(line.startswith(f"{life.job}|RUNNING|") for line in named(life.on, ""))

    return bool(until(lambda: not runs(), LIMIT_SECONDS, "the end of its time"))


# ------------------------------------------------------------------------------------------------ a queue that is long


def of_queue(scale: Scale) -> list[Outcome]:
    """Have jobs wait in the queue, of which the cluster's only node is full."""
    trials = [released, queue_timeout, cancelled, given_up, abandoned, beside_another]
    if not_tried := skipped("jobs of SLURM that wait"):
        return not_tried
    outcomes = []
    with cluster(scale.of(*SECONDS), nodes=1) as on:
        for trial in trials:
            outcome = Outcome(fault=str(trial.__doc__).partition(":")[0].removesuffix("."))
            for _ in range(scale.of(1, 3)):
                with outcome.trial(outcome.fault):
                    other = on.run("sbatch", "--parsable", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
                    until(lambda: any("|RUNNING|" in it for it in named(on, "wrap")), HEAL_SECONDS, "a full node")
                    try:
                        trial(on, outcome)
                    finally:
                        on.run("scancel", other.strip())
                    wait_gone(outcome, lambda: [*named(on, "gserve"), *oracles.of_servers()], time.monotonic())
                    on.wait_idle(HEAL_SECONDS)
            outcomes.append(outcome)
    return outcomes


@contextlib.contextmanager
def pending(
    on: SlurmCluster, serve: ServeConfig, launcher: SlurmLauncher
) -> Iterator[tuple[VLLMService, Future[None]]]:
    """Have a service that starts, and of which a job waits in the queue; and what waits for its start."""
    one = service(serve, launcher)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(one.start)
        try:
            until(lambda: any("|PENDING|" in it for it in named(on, "gserve")), HEAL_SECONDS, "a job that waits")
            waits = "SLURM's queue"
            until(lambda: any(waits in str(it.phase) for it in one.status()), HEAL_SECONDS, "a phase that says so")
            yield one, start
        finally:
            one.shutdown()


def released(on: SlurmCluster, outcome: Outcome) -> None:
    """A job waits in the queue, longer than startup_timeout, and is released: it serves."""
    with pending(on, ServeConfig(startup_timeout=9.5), SlurmLauncher()) as (one, start):
        time.sleep(10.0)
        assert not start.done(), f"startup_timeout ran in the queue: {start.exception()}"
        phase = one.status()[0].phase or ""
        assert "Resources" in phase or "Priority" in phase, phase
        on.run("scancel", "--name=wrap")
        start.result(HEAL_SECONDS)
        tally = Patient()
        tally.batch(one, 100)
        outcome.count(tally)


def queue_timeout(on: SlurmCluster, outcome: Outcome) -> None:
    """A job waits in the queue longer than queue_timeout: a sentence says so."""
    began = time.monotonic()
    error = raised(LaunchError, service(ServeConfig(), SlurmLauncher(queue_timeout=3.0)).start)
    outcome.detect.append(time.monotonic() - began)
    for words in ("waited 3 s (queue_timeout) for SLURM's queue", "Resources"):
        assert words in str(error), f"expected '{words}' in: {error}"


def cancelled(on: SlurmCluster, outcome: Outcome) -> None:
    """A job is cancelled while it waits in the queue: a sentence says so."""
    with pending(on, ServeConfig(), SlurmLauncher()) as (_, start):
        on.run("scancel", "--state=PENDING", "--user=root")
        began = time.monotonic()
        error = start.exception(HEAL_SECONDS)
        outcome.detect.append(time.monotonic() - began)
        assert isinstance(error, LaunchError), error
        assert "SLURM reports CANCELLED" in str(error), error


def given_up(on: SlurmCluster, outcome: Outcome) -> None:
    """The owner gives up while a job waits in the queue: no job is left."""
    with pending(on, ServeConfig(), SlurmLauncher()) as (one, start):
        began = time.monotonic()
        one.shutdown()
        outcome.recover.append(time.monotonic() - began)
        assert not named(on, "gserve"), "a job is left"
        assert isinstance(start.exception(HEAL_SECONDS), LaunchError)


def abandoned(on: SlurmCluster, outcome: Outcome) -> None:
    """The owner is killed -9 while a job waits in the queue: no job is left."""
    with owner(on, 1) as one:
        until(lambda: any("|PENDING|" in it for it in one.jobs()), HEAL_SECONDS, "a job that waits")
        one.wait_gone(outcome, one.process.kill)


def beside_another(on: SlurmCluster, outcome: Outcome) -> None:
    """A job waits in the queue for ever, and another server works; then it is cancelled: nothing is lost."""
    tally = Patient()
    launcher = SlurmLauncher(cpus_per_server=8, mem="100M")
    on.run("scancel", "--name=wrap")
    with pending(on, ServeConfig(servers=2, min_ready=1), launcher) as (one, start):
        start.result(HEAL_SECONDS)
        with at_work(one, tally):
            time.sleep(3.0)
            on.run("scancel", "--state=PENDING", "--user=root")
            until(lambda: any("SLURM reports CANCELLED" in str(it.error) for it in one.status()), HEAL_SECONDS, "error")
            time.sleep(1.0)
    outcome.count(tally)


# ------------------------------------------------------------------------------------------------------ owners that end

GO_ON = "sleep 613"
"""What the script of a batch job does after its owner has ended."""
OF_A_JOB: dict[str, Any] = {"gpus_per_server": 1, "cpus_per_server": 1, "mem": "100M"}
"""What the servers of an owner are asked for, so that several have room on a node."""


class Owner:
    """A `gserve generate` at work on a file of prompts, on a login node or in a batch job, with a mark of its own."""

    def __init__(self, on: SlurmCluster, servers: int, *, is_job: bool, stall: float) -> None:
        self._on = on
        self.run = uuid.uuid4().hex
        self.title = f"own-{self.run[:8]}"
        folder = Path(tempfile.mkdtemp())
        config, prompts, self._results = (folder / it for it in ("config.yaml", "prompts.txt", "results.jsonl"))
        sections = {
            "llm": {"model_name": "m"},
            "serve": {"servers": servers, "stall_timeout": stall},
            "engine": {"type": "echo", "latency": ECHO.latency, "capacity": ECHO.capacity, "processes": ECHO.processes},
            "launcher": {"type": "slurm", "job_name": self.title, **OF_A_JOB},
        }
        config.write_text(json.dumps(sections))
        self._items = [f"item-{number}" for number in range(300)]
        prompts.write_text("\n".join(self._items))
        files = [str(config), "-i", str(prompts), "-o", str(self._results)]
        self._command = [sys.executable, "-m", "gserve.cli", "generate", *files]
        script = f"--wrap={shlex.join(self._command)}; {GO_ON}"
        batch = [
            "sbatch",
            f"--job-name=script-{self.run[:8]}",
            "--nodes=2",
            "--gres=gpu:1",
            "--output=/dev/null",
            script,
        ]
        self._said = (folder / "said").open("wb")
        self.process = subprocess.Popen(
            batch if is_job else self._command,
            env=os.environ | {RUN_VARIABLE: self.run}, stdout=self._said, stderr=self._said, start_new_session=True,
        )  # fmt: skip

    def jobs(self) -> list[str]:
        """Return the jobs and steps of its servers in the queue."""
        return named(self._on, self.title)

    def end_script(self) -> None:
        """Cancel its batch job."""
        self._on.run("scancel", f"--name=script-{self.run[:8]}")

    def job(self) -> str:
        """Return the number of its batch job."""
        return named(self._on, f"script-{self.run[:8]}")[0].partition("|")[0]

    def results(self) -> int:
        """Return how many items it has put out."""
        return self._results.read_bytes().count(b"\n") if self._results.exists() else 0

    def pids(self, *words: str) -> list[int]:
        """Return its processes whose command has one of these."""
        return [it.pid for it in oracles.marked(self.run) if any(word in it.command for word in words)]

    def wait_gone(self, outcome: Outcome, strike: Callable[[], object]) -> None:
        """Strike; nothing of it may be left after, but the script of its batch job."""
        ports = set()
        for pid in self.pids("vllm_server.py"):
            with contextlib.suppress(psutil.Error):
                ports |= {it.laddr.port for it in psutil.Process(pid).net_connections("tcp") if it.status == "LISTEN"}

        def left() -> list[str]:
            marked = [it.command for it in oracles.marked(self.run)]
            found = [it[:80] for it in marked if GO_ON not in it and "slurm_script" not in it]
            ports.intersection_update(oracles.listening())  # one that was free is another's, if it is taken again
            return found + self.jobs() + [f"port {it}" for it in ports]

        began = time.monotonic()
        strike()
        wait_gone(outcome, left, began)
        outcome.recover.append(time.monotonic() - began)

    def finish(self, outcome: Outcome) -> None:
        """Run the same command again: each item must be there once, then."""
        before = self.results()
        assert 0 < before < len(self._items), f"{before} items were finished when it ended"
        subprocess.run(
            self._command, env=os.environ | {RUN_VARIABLE: self.run}, check=True, timeout=HEAL_SECONDS,
            stdout=self._said, stderr=self._said,
        )  # fmt: skip
        count(outcome, self._items, self._results)

    def wait_finished(self, outcome: Outcome) -> None:
        """Wait until all items are put out: each must be there once."""
        until(lambda: self.results() >= len(self._items), HEAL_SECONDS, "all results")
        count(outcome, self._items, self._results)

    def close(self) -> None:
        """Leave nothing behind, whatever has happened."""
        self.process.kill()
        self.process.wait()
        self._said.close()
        self.end_script()
        for line in self.jobs():
            with contextlib.suppress(RuntimeError):  # it has ended since we looked
                self._on.run("scancel", line.partition("|")[0])
        oracles.kill(oracles.marked(self.run))


def count(outcome: Outcome, items: Sequence[str], results: Path) -> None:
    """Count what became of items, by the file of their results."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    counts = Counter(row["_row"] for row in rows)
    outcome.figures["items"] = outcome.figures.get("items", 0) + len(items)
    outcome.lost += len(items) - len(counts)
    outcome.duplicated += len(rows) - len(counts)
    outcome.out_of_order += sum(row["response"] != items[row["_row"]] or row["text"] != row["response"] for row in rows)


@contextlib.contextmanager
def owner(on: SlurmCluster, servers: int, *, is_job: bool = False, stall: float = 60.0) -> Iterator[Owner]:
    """Have an owner for as long as the context lasts."""
    one = Owner(on, servers, is_job=is_job, stall=stall)
    try:
        yield one
    finally:
        one.close()


def of_owners(scale: Scale) -> list[Outcome]:
    """End owners in the middle of a batch, on a login node and in a batch job; and what they have started there."""
    if not_tried := skipped("owners of SLURM's jobs that end"):
        return not_tried
    with_sruns = "gserve.cli", "srun --nodes", "slurm/guard"
    deaths: list[tuple[str, bool, Callable[[Owner], object]]] = [
        ("owner killed -9 on a login node", False, lambda one: kill_all(one.pids("gserve.cli"))),
        ("owner and all its sruns killed -9 on a login node", False, lambda one: kill_all(one.pids(*with_sruns))),
        ("owner killed -9 in a batch job", True, lambda one: kill_all(one.pids("gserve.cli"))),
        ("owner and all its sruns killed -9 in a batch job", True, lambda one: kill_all(one.pids(*with_sruns))),
        ("scancel of the owner's batch job", True, Owner.end_script),
    ]

    def works(one: Owner) -> bool:
        return one.results() > 20

    def end(name: str, strike: Callable[[Owner], object], *, is_job: bool) -> Outcome:
        outcome = Outcome(fault=name)
        for _ in range(scale.of(1, 3)):
            with outcome.trial(name), owner(on, 2, is_job=is_job) as one:
                until(partial(works, one), HEAL_SECONDS, "a batch at work")
                one.wait_gone(outcome, partial(strike, one))
                one.end_script()
                one.finish(outcome)
        return outcome

    with cluster(scale.of(*SECONDS)) as on, ThreadPoolExecutor(len(deaths)) as pool:
        ending = [pool.submit(end, name, strike, is_job=is_job) for name, is_job, strike in deaths]
        return [it.result() for it in ending]


# ------------------------------------------------------------------------------------------------------ suspended jobs

SUSPENSIONS = 3
"""How often a job is suspended while it works."""


def of_suspension(scale: Scale) -> list[Outcome]:
    """Suspend the jobs of servers, and the job in which an owner and its servers are, again and again."""
    if not_tried := skipped("jobs of SLURM that are suspended"):
        return not_tried
    with cluster(scale.of(*SECONDS)) as on, ThreadPoolExecutor(2) as pool:
        suspending = [pool.submit(it, on, *scale.of((8.0, 5.0), (66.0, 60.0))) for it in (servers_wait, owner_waits)]
        return [it.result() for it in suspending]


@contextlib.contextmanager
def suspended(on: SlurmCluster, *jobs: str) -> Iterator[None]:
    """Have jobs suspended for as long as the context lasts; those that are gone by then stay so."""
    for job in jobs:
        on.run("scontrol", "suspend", job)
    try:
        yield
    finally:
        for job in jobs:
            with contextlib.suppress(RuntimeError):
                on.run("scontrol", "resume", job)


def servers_wait(on: SlurmCluster, seconds: float, stall: float) -> Outcome:
    """Suspend the jobs of all servers for longer than `stall_timeout`: the same items see each of these ends."""
    outcome, tally, heard = Outcome(fault=f"the jobs of 2 servers suspended for {seconds:g} s"), Patient(), Heard()
    engine = EchoEngine(latency=6.0, capacity=4, processes=2)
    serve = ServeConfig(servers=2, stall_timeout=stall, max_restarts=1000)
    said: list[str] = []
    with (
        VLLMService(LLM, serve, engine=engine, launcher=SlurmLauncher(nodelist="n3", **OF_A_JOB)) as one,
        Watch(one) as watch,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(tally.batch, one, 2 * engine.capacity)
        for number in range(SUSPENSIONS):
            with outcome.trial(f"suspension {number}"):
                until(lambda: min(watch.ready_for(0), watch.ready_for(1)) > 0.5, HEAL_SECONDS, "all ready")
                assert not call.done(), "no item sees this one"
                lives = [Life(on, server) for server in one.servers]
                since = time.monotonic()
                with suspended(on, *(life.job for life in lives)):
                    time.sleep(seconds)
                for index, life in enumerate(lives):
                    detect, recover = watch.wait_recovered(index, since, seconds + HEAL_SECONDS)
                    outcome.detect.append(detect)
                    outcome.recover.append(recover)
                    wait_gone(outcome, partial(life.left, place_stays=True), since + seconds)
                    said.append(heard.of(life.log))
            if outcome.problems:
                break
        call.result(2 * HEAL_SECONDS)
    outcome.count(tally)
    outcome.problems += [it for it in said if "SLURM reports SUSPENDED" not in it]
    wait_gone(outcome, lambda: [*named(on, "gserve"), *oracles.of_servers()], time.monotonic())
    return outcome


def owner_waits(on: SlurmCluster, seconds: float, stall: float) -> Outcome:
    """Suspend the job in which an owner and its servers are: they go on, all of them."""
    outcome = Outcome(fault=f"the job of an owner and its servers suspended for {seconds:g} s")
    with owner(on, 2, is_job=True, stall=stall) as one:

        def beyond(items: int) -> bool:
            return one.results() > items

        until(lambda: one.results() > 20, HEAL_SECONDS, "a batch at work")
        servers = one.pids("vllm_server.py")
        for number in range(SUSPENSIONS):
            with outcome.trial(f"suspension {number}"):
                with suspended(on, one.job()):
                    time.sleep(1.0)  # what is written at this moment
                    before = one.results()
                    time.sleep(seconds - 1.0)
                    assert one.results() == before, "it was not suspended"
                since = time.monotonic()
                until(partial(beyond, before + 8), HEAL_SECONDS, "it goes on")
                outcome.recover.append(time.monotonic() - since)
                assert one.pids("vllm_server.py") == servers, "a server was replaced"
            if outcome.problems:
                return outcome
        one.wait_finished(outcome)
        one.wait_gone(Outcome(fault="its end"), one.end_script)
    return outcome


# ------------------------------------------------------------------------------------------------- batch jobs run again

PROGRAM = """
import sys
from pathlib import Path
from gserve import VLLMService
results, items = Path(sys.argv[1]), int(sys.argv[2])
service = VLLMService.attach()
for number in range(len(results.read_text().splitlines()), items):
    ((text,),) = service.generate([f"item-{number}"])
    with results.open("a") as file:
        file.write(f"{text}\\n")
"""
"""A COMMAND that does its items one by one, goes on where it was ended, and dies of SIGTERM at once."""


def of_batch(scale: Scale) -> list[Outcome]:
    """Requeue and preempt batch jobs whose COMMAND dies sooner than its job hears of it; give two one output."""
    if not_tried := skipped("batch jobs of SLURM"):
        return not_tried
    again = Outcome(fault="COMMAND of a batch job dies of SIGTERM while SLURM requeues or preempts it")
    chance = scale.random
    moments = {
        node: [(chance.uniform(0.0, 1.5), way) for _ in range(scale.of(1, 5))]
        for node, way in {"n1": "requeue", "n2": "preempt", "n3": chance.choice(["requeue", "preempt"])}.items()
    }
    with cluster(scale.of(*SECONDS)) as on, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run_again, on, again, node, it) for node, it in moments.items()]
        arrays = pool.submit(one_output, on, scale.of(1, 3))
        for it in running:
            it.result()
        outcomes = [again, arrays.result()]
        if not again.problems:
            on.wait_idle(HEAL_SECONDS)
            left = [it.name for it in (Path(os.environ["XDG_STATE_HOME"]) / "gserve" / "jobs").iterdir()]
            assert not left, f"orders are left: {left}"
    return outcomes


def config(folder: Path, launcher: str = "subprocess") -> str:
    """Write the config of a batch job with one server."""
    sections = {
        "llm": {"model_name": "m"},
        "engine": {"type": "echo", "latency": ECHO.latency, "capacity": ECHO.capacity},
        "launcher": {"type": launcher},
    }
    (folder / "config.yaml").write_text(json.dumps(sections))
    return str(folder / "config.yaml")


def run_again(on: SlurmCluster, outcome: Outcome, node: str, ends: Sequence[tuple[float, str]]) -> None:
    """Have a batch job on a node, and SLURM end its runs at these moments: each next one must go on."""
    folder = Path(tempfile.mkdtemp())
    results, items = folder / "results", 20 + 10 * len(ends)
    results.touch()
    program = [sys.executable, "-c", PROGRAM, str(results), str(items)]
    where = ["--partition=low"]
    for option in ("requeue=true", f"nodelist={node}", "mem=100M"):
        where += ["--set", f"launcher.{option}"]
    told = subprocess.run(
        [sys.executable, "-m", "gserve.cli", "sbatch", config(folder, "slurm"), *where, "--", *program],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = told.stdout.split()[1].rstrip(":")

    def state(name: str) -> str:
        words = on.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def finished() -> int:
        return len(results.read_text().splitlines())

    def beyond(count: int) -> bool:
        return finished() > count

    def was_run_again(times: int) -> bool:
        return state("Restarts") == str(times)

    before = 0
    for number, (moment, way) in enumerate(ends, 1):
        with outcome.trial(f"{way} on {node}, run {number}"):
            until(partial(beyond, before), HEAL_SECONDS, "a COMMAND at work")
            time.sleep(moment)
            if way == "requeue":
                on.run("scontrol", "requeue", job)
            else:
                whole = ["--partition=high", f"--nodelist={node}", "--exclusive"]
                on.run("sbatch", *whole, "--output=/dev/null", "--wrap=sleep 1")
            since = time.monotonic()
            until(partial(was_run_again, number), HEAL_SECONDS, "its next run")
            before = finished()
            assert before < items, "it had done all"
            until(partial(beyond, before), HEAL_SECONDS, "work in it")
            outcome.recover.append(time.monotonic() - since)
            if number == len(ends):
                until(lambda: state("JobState") not in ("RUNNING", "PENDING", "COMPLETING"), HEAL_SECONDS, "its end")
                assert (state("JobState"), state("ExitCode")) == ("COMPLETED", "0:0")
        if outcome.problems:
            return
    lines = results.read_text().splitlines()
    outcome.figures["items"] = outcome.figures.get("items", 0) + items
    outcome.lost += items - len(set(lines))
    outcome.duplicated += len(lines) - len(set(lines))
    outcome.out_of_order += sum(line != f"item-{number}" for number, line in enumerate(lines))


def one_output(on: SlurmCluster, times: int) -> Outcome:
    """Have the two tasks of an array write to one file: one is refused, the other does all."""
    outcome = Outcome(fault="two tasks of an array with one output: one is refused")
    for number in range(times):
        with outcome.trial(f"array {number}"):
            folder = Path(tempfile.mkdtemp())
            items = [f"item-{number}" for number in range(200)]
            (folder / "prompts.txt").write_text("\n".join(items))
            command = [sys.executable, "-m", "gserve.cli", "generate", config(folder)]
            command += ["-i", str(folder / "prompts.txt"), "-o", str(folder / "results.jsonl")]
            # with --wait sbatch ends as its tasks do: with the highest of their exit codes
            options = ["--wait", "--array=0-1", "--nodelist=n1", "--mem=100M", f"--output={folder}/%a.out"]
            ended = subprocess.run(
                ["sbatch", *options, f"--wrap={shlex.join(command)}"],
                check=False, capture_output=True, timeout=HEAL_SECONDS,
            )  # fmt: skip
            said = [(folder / f"{task}.out").read_text() for task in (0, 1)]
            refused = [it for it in said if "already being written by process" in it and "SLURM job" in it]
            assert (ended.returncode, len(refused)) == (2, 1), f"code {ended.returncode}; the tasks said {said}"
            count(outcome, items, folder / "results.jsonl")
    return outcome
