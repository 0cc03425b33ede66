"""Servers over two nodes each, on the engine echo: a fault of any rank is one of the server, and nothing is left."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from gserve import LaunchError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_core.service.server_command import PROGRAM
from gserve_core.service.state import State
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.faults.jobs import allocation
from tests.slurm.cluster import SlurmCluster

LLM = LLMConfig("demo", llm_kwargs={"tensor_parallel_size": 2})
PROMPTS = [f"prompt {number}" for number in range(100)]
KILLED = r"was killed by SIGKILL"


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """Begin with an idle cluster, and hold the test to leave no job and no process of one."""
    slurm_cluster.wait_idle(60)
    yield
    slurm_cluster.wait_idle(60)


def service(launcher: SlurmLauncher | None = None, engine: EchoEngine | None = None, **options: Any) -> VLLMService:
    serve = ServeConfig(**{"servers": 1, "nodes_per_server": 2} | options)
    return VLLMService(
        LLM, serve, launcher=launcher or SlurmLauncher(gpus_per_server=2, cpus_per_server=1, mem="100M"),
        engine=engine or EchoEngine(latency=0.05, capacity=8, processes=2),
    )  # fmt: skip


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)


def ranks(one: VLLMService) -> dict[int, psutil.Process]:
    """Return the process of each rank of the first server. srun and the task have its command among their arguments."""
    below = [psutil.Process(pid) for pid in processes.processes_of(one.servers[0].record().instance)]
    return {int(it.environ()["SLURM_PROCID"]): it for it in below if it.cmdline()[1:2] == [str(PROGRAM)]}


def await_ranks(one: VLLMService) -> None:
    """Wait until rank 1 has started too: a server is ready when rank 0 is."""
    log = one.status()[0].log
    assert log is not None
    until(lambda: "rank 1 has started" in log.read_text(errors="replace"))


def engine_of(rank: psutil.Process) -> psutil.Process:
    (found,) = [it for it in rank.children() if "engine" in it.cmdline()]
    return found


def stepd_of(rank: psutil.Process) -> psutil.Process:
    """Return the slurmstepd that has started a rank."""
    (found,) = [it for it in rank.parents() if it.name() == "slurmstepd"]
    return found


def step_of(rank: psutil.Process) -> str:
    environ = rank.environ()
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"


FAULTS: dict[str, tuple[Callable[[SlurmCluster, dict[int, psutil.Process]], object], str]] = {
    "rank 1": (lambda _, of: of[1].kill(), rf"rank 1 on n\d {KILLED}, most likely since memory ran out there"),
    "rank 0": (lambda _, of: of[0].kill(), rf"rank 0 on n\d {KILLED}, most likely since memory ran out there"),
    "engine of rank 1": (lambda _, of: engine_of(of[1]).kill(), r"rank 1 on \S+: the engine died: "),
    "engine of rank 0": (lambda _, of: engine_of(of[0]).kill(), r"the engine died: "),
    "scancel": (lambda cluster, of: cluster.run("scancel", step_of(of[0])), r"SLURM reports CANCELLED"),
    "slurmstepd of rank 1": (lambda _, of: stepd_of(of[1]).kill(), r"rank 1 on |NODE_FAIL|CANCELLED"),
    "node down": (
        lambda cluster, of: cluster.run(
            "scontrol", "update", f"NodeName={of[1].environ()['SLURMD_NODENAME']}", "State=down", "Reason=test"
        ),
        r"SLURM reports NODE_FAIL",
    ),
}  # fmt: skip
"""Faults of a server over two nodes, and what its error says about each."""
SHORT = ("rank 1", "rank 0", "engine of rank 1", "scancel", "node down")


def suffer(cluster: SlurmCluster, one: VLLMService, fault: str) -> None:
    """Cause a fault while items are in flight. All of them are answered, and the server is back with both ranks."""
    await_ranks(one)
    cause, expected = FAULTS[fault]
    of, before, told = ranks(one), one.status()[0].generation, [""]
    assert sorted(of) == [0, 1]
    iterator = one.generate_iter(PROMPTS)
    results: dict[int, Any] = dict([next(iterator)])
    cause(cluster, of)

    def has_failed() -> bool:
        told[0] = one.status()[0].error or ""
        return bool(told[0])

    until(has_failed)
    assert re.search(expected, told[0]), f"{fault}: {told[0]}"
    for node, state in cluster.node_states().items():
        if state.startswith("down"):
            cluster.run("scontrol", "update", f"NodeName={node}", "State=resume")
    results |= dict(iterator)
    assert [results[place][0].text for place in range(len(PROMPTS))] == PROMPTS, fault
    until(lambda: one.status()[0].generation > before and one.status()[0].state == State.READY, 150)
    await_ranks(one)
    until(lambda: not any(it.is_running() for it in of.values()), 60)
    new = ranks(one)
    assert sorted(new) == [0, 1]


def test_a_server_over_two_nodes_answers_and_leaves_nothing(slurm_cluster: SlurmCluster) -> None:
    with service(servers=1) as one:
        await_ranks(one)
        of = ranks(one)
        assert len({it.environ()["SLURMD_NODENAME"] for it in of.values()}) == 2
        assert [it.environ()["CUDA_VISIBLE_DEVICES"] for it in of.values()].count("0") == 2, "one GPU of each node"
        assert len(one.generate(PROMPTS)) == len(PROMPTS)
        for rank in of.values():
            heard = {it.laddr.ip for it in rank.net_connections("inet") if it.status == psutil.CONN_LISTEN}
            assert heard <= {"127.0.0.1"}, "nowhere else but where the owner and the ranks reach it"
    assert slurm_cluster.jobs() == []
    assert not any(it.is_running() for it in of.values())


def test_two_such_servers_share_an_allocation_of_two_nodes(slurm_cluster: SlurmCluster) -> None:
    with (
        allocation("--nodes=2", "--exclusive", "--gres=gpu:4"),
        service(SlurmLauncher(gpus_per_server=2), servers=2) as one,
    ):
        assert len(one.generate(PROMPTS)) == len(PROMPTS)
        await_ranks(one)
        ranks(one)[1].kill()
        until(lambda: KILLED in str(one.status()[0].error))
        until(lambda: one.status()[0].state == State.READY)
        assert len(one.generate(PROMPTS)) == len(PROMPTS)


def test_faults_of_any_rank_cost_no_item_and_are_explained(slurm_cluster: SlurmCluster) -> None:
    with service() as one:
        for fault in SHORT:
            suffer(slurm_cluster, one, fault)


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("LONG"), reason="takes two minutes: LONG=1 runs it")
def test_twenty_faults_of_random_ranks_cost_no_item(slurm_cluster: SlurmCluster) -> None:
    chosen = random.Random(os.environ.get("SEED", "nodes"))
    with service(max_restarts=100) as one:
        for number in range(20):
            time.sleep(chosen.uniform(0.0, 2.0))
            suffer(slurm_cluster, one, [*FAULTS][number] if number < len(FAULTS) else chosen.choice([*FAULTS]))


def test_a_rank_that_cannot_start_is_named(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(LaunchError, match=r"the engine ran out of words"):
        service(engine=EchoEngine(fail_start="out of words")).start()


OWNER = """
import sys
from tests.slurm.test_nodes import service
with service() as one:
    print(one.servers[0].record().instance, flush=True)
    sys.stdin.read()
"""


def test_ranks_end_when_their_owner_is_killed(slurm_cluster: SlurmCluster) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        instance = owner.stdout.readline().decode().strip()
        assert len(processes.processes_of(instance)) >= 8, "srun, and on each node a task, the server and its engine"
        owner.kill()
    until(lambda: slurm_cluster.jobs() == [] and not slurm_cluster.processes())
