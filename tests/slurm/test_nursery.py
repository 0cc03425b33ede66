"""The nursery in a server's step or job: a server that died is back in its place, and no place outlives its use."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve import LaunchError, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_core.service import records
from gserve_core.service.server_command import PROGRAM
from gserve_core.service.state import State
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.faults.jobs import allocation
from tests.slurm.cluster import SlurmCluster

LLM = LLMConfig("demo")
ECHO = EchoEngine(latency=0.05, capacity=8, processes=2)
PROMPTS = [f"prompt {number}" for number in range(300)]


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """Begin with an idle cluster, and hold the test to leave no job and no process of one."""
    slurm_cluster.wait_idle(60)
    yield
    slurm_cluster.wait_idle(60)


@pytest.fixture(params=["job", "step"])
def places(request: pytest.FixtureRequest) -> Iterator[str]:
    """Have servers be jobs of their own, or steps of an allocation."""
    with allocation("--nodes=2", "--exclusive") if request.param == "step" else contextlib.nullcontext():
        yield request.param


def service(launcher: SlurmLauncher | None = None, engine: EchoEngine = ECHO, **options: Any) -> VLLMService:
    serve = ServeConfig(**{"servers": 2} | options)
    return VLLMService(LLM, serve, launcher=launcher or SlurmLauncher(cpus_per_server=1, mem="100M"), engine=engine)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)


def process(server: VLLMServer) -> psutil.Process:
    """Return the process of a ready server."""
    return server_of(server.record().instance)


def server_of(instance: str) -> psutil.Process:
    """Return the process of a server; srun and the task have its command among their own arguments."""
    below = [psutil.Process(pid) for pid in processes.processes_of(instance)]
    (found,) = [it for it in below if it.cmdline()[1:2] == [str(PROGRAM)]]
    return found


def engine_of(server: VLLMServer) -> psutil.Process:
    (found,) = [it for it in process(server).children() if "engine" in it.cmdline()]
    return found


def nursery(server: VLLMServer) -> psutil.Process:
    """Return what has forked a ready server."""
    found = process(server).parent()
    assert found is not None
    assert found.cmdline()[:2] == ["gserve", "nursery"]
    return found


def place(server: VLLMServer) -> str:
    """Return the step in which a ready server runs."""
    environ = process(server).environ()
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"


def steps(cluster: SlurmCluster) -> list[str]:
    """Return the steps of servers that SLURM has."""
    lines = cluster.run("squeue", "--noheader", "--steps", "--format=%i %j").splitlines()
    return sorted(line.split()[0] for line in lines if "gserve" in line)


def texts(results: dict[int, Any]) -> list[str]:
    """Return what came of each prompt, in order."""
    assert sorted(results) == list(range(len(PROMPTS)))
    return [results[index][0].text for index in range(len(PROMPTS))]


def is_back(service: VLLMService, index: int = 0) -> bool:
    status = service.status()[index]
    return status.restarts > 0 and status.state == State.READY


# ----------------------------------------------------------------------------------------------- back in the same place


@pytest.mark.usefixtures("places")
def test_a_server_that_is_killed_is_back_in_the_same_place_with_a_log_of_its_own(slurm_cluster: SlurmCluster) -> None:
    with service() as one:
        first = one.servers[0]
        before, log, known = place(first), one.status()[0].log, steps(slurm_cluster)
        forks = nursery(first)
        iterator = one.generate_iter(PROMPTS)
        results = dict([next(iterator)])
        process(first).kill()
        results |= dict(iterator)
        assert texts(results) == PROMPTS
        until(lambda: is_back(one))
        assert place(first) == before
        assert steps(slurm_cluster) == known
        assert nursery(first) == forks
        another = one.status()[0].log
        assert log is not None
        assert another is not None
        assert another != log
        port = f"listening on 127.0.0.1:{first.port}"
        assert port in another.read_text()
        assert port not in log.read_text()
        assert "imported the modules of the servers" in log.read_text(), "the first log stays what it was"
        assert "imported the modules of the servers" not in another.read_text(), "nothing is imported again"
    assert steps(slurm_cluster) == []


@pytest.mark.usefixtures("places")
def test_a_server_whose_engine_dies_or_which_hangs_is_back_in_the_same_place(slurm_cluster: SlurmCluster) -> None:
    with service(stall_timeout=3.0) as one:
        first = one.servers[0]
        before = place(first)
        engine_of(first).kill()
        until(lambda: one.status()[0].restarts == 1 and is_back(one))
        assert place(first) == before
        process(first).suspend()
        until(lambda: one.status()[0].restarts == 2 and is_back(one))
        assert place(first) == before
        assert one.generate(PROMPTS[:20]) == [[prompt] for prompt in PROMPTS[:20]]


def test_a_server_alone_is_started_again_in_its_job_until_it_is_shut_down(slurm_cluster: SlurmCluster) -> None:
    server = VLLMServer(LLM, launcher=SlurmLauncher(), engine=ECHO)
    with server:
        before = place(server)
        for _ in range(3):
            process(server).kill()
            until(lambda: server.status().state == State.FAILED)
            server.start()
            assert place(server) == before
            with server.client() as client:
                assert client.generate(["a"]) == [["a"]]
    assert slurm_cluster.jobs() == []
    with server:
        assert place(server) != before
        process(server).kill()
        until(lambda: server.status().state == State.FAILED)
        assert len(slurm_cluster.jobs()) == 1
    assert slurm_cluster.jobs() == [], "a job is not kept for a server that is shut down after its death"


# ------------------------------------------------------------------------------------------------------ another place


@pytest.mark.usefixtures("places")
def test_the_death_of_the_nursery_costs_no_item_and_leaves_nothing(slurm_cluster: SlurmCluster) -> None:
    with service() as one:
        first = one.servers[0]
        before, instance = place(first), first.record().instance
        iterator = one.generate_iter(PROMPTS)
        results = dict([next(iterator)])
        nursery(first).kill()
        results |= dict(iterator)
        assert texts(results) == PROMPTS
        until(lambda: is_back(one))
        assert place(first) != before
        until(lambda: before not in steps(slurm_cluster))
        until(lambda: not processes.processes_of(instance))


@pytest.mark.usefixtures("places")
def test_a_signal_of_slurm_reaches_the_server_and_ends_its_place(slurm_cluster: SlurmCluster) -> None:
    with service() as one:
        first = one.servers[0]
        before, log = place(first), one.status()[0].log
        subprocess.run(["scancel", "--signal=TERM", before], check=False)  # of a step it says that there is none
        until(lambda: is_back(one))
        assert log is not None
        assert "SIGTERM: ending\n" in log.read_text(), "it was told once, and ends in order"
        assert place(first) != before
        assert before not in steps(slurm_cluster)


def test_a_signal_that_reaches_the_task_alone_is_passed_on(slurm_cluster: SlurmCluster) -> None:
    with service(servers=1) as one:
        first = one.servers[0]
        before, above = place(first), nursery(first).parent()
        assert above is not None
        above.send_signal(signal.SIGTERM)  # as SLURM does where it has control groups
        until(lambda: is_back(one))
        assert place(first) != before


def test_without_a_nursery_each_life_has_a_job_of_its_own(slurm_cluster: SlurmCluster) -> None:
    with service(SlurmLauncher(nursery=False), servers=1) as one:
        first = one.servers[0]
        before = place(first)
        above = process(first).parent()
        assert above is not None
        assert "slurm/task.py" in " ".join(above.cmdline())
        process(first).kill()
        until(lambda: is_back(one))
        assert place(first) != before
        assert steps(slurm_cluster) == [place(first)]


# ------------------------------------------------------------------------------------------------------ nothing is left


@pytest.mark.usefixtures("places")
def test_a_server_that_is_given_up_keeps_no_place(slurm_cluster: SlurmCluster) -> None:
    with service(max_restarts=0) as one:
        first = one.servers[0]
        before, other = place(first), place(one.servers[1])
        process(first).kill()
        until(lambda: "max_restarts" in str(one.status()[0].error) or one.status()[0].state == State.FAILED)
        until(lambda: steps(slurm_cluster) == [other])
        assert before != other
        assert one.generate(["a"]) == [["a"]]


def test_a_server_that_does_not_start_keeps_no_job(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(LaunchError, match="as asked"):
        service(engine=EchoEngine(fail_start="as asked")).start()
    assert slurm_cluster.jobs() == []


OWNER = """
import os
import time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.slurm.launcher import SlurmLauncher

service = VLLMService(LLMConfig("m"), ServeConfig(servers=2), launcher=SlurmLauncher(), engine=EchoEngine())
service.start()
child = os.fork() or time.sleep(600)
print(child, *(server.record().instance for server in service.servers), flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("places")
def test_a_server_that_dies_with_its_owner_leaves_nothing_also_where_that_has_forked(
    slurm_cluster: SlurmCluster,
) -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent.parent) as owner:
        assert owner.stdout is not None
        child, *instances = owner.stdout.readline().split()
        assert len(instances) == 2
        assert len(steps(slurm_cluster)) == 2
        server_of(instances[0]).kill()
        owner.kill()
    until(lambda: not steps(slurm_cluster))
    fork = psutil.Process(int(child))
    assert fork.is_running()
    fork.kill()
    until(lambda: not [pid for it in instances for pid in processes.processes_of(it)])
    for path in records.stale_files():  # neither can remove the server's token
        path.unlink()
