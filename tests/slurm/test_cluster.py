"""The cluster for tests: that it is a cluster, and that nothing of it is left."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.usefixtures("slurm_cluster")


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    slurm_cluster.wait_idle(60)
    yield
    slurm_cluster.wait_idle(60)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.1)


def submit(cluster: SlurmCluster, *options: str) -> str:
    return cluster.run("sbatch", "--parsable", *options).strip()


def state(cluster: SlurmCluster, job: str) -> str:
    return cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip()


def mentioning(text: str) -> list[int]:
    """Return the processes in whose arguments, environment or working directory a text stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                said = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if text in said.decode(errors="replace") + str((entry / "cwd").readlink()):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def ports(cluster: SlurmCluster) -> list[int]:
    words = (cluster.folder / "slurm.conf").read_text().split()
    return [int(word.partition("=")[2]) for word in words if word.startswith(("SlurmctldPort=", "Port="))]


def is_listened_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_comes_up_with_three_idle_nodes(slurm_cluster: SlurmCluster) -> None:
    assert slurm_cluster.node_states() == {"n1": "idle", "n2": "idle", "n3": "idle"}
    assert set(slurm_cluster.daemons) == {"munged", "slurmctld", "slurmd[n1]", "slurmd[n2]", "slurmd[n3]"}
    assert all(map(is_listened_at, ports(slurm_cluster)))


def test_commands_run_anywhere_in_the_session_speak_to_it(slurm_cluster: SlurmCluster) -> None:
    ran = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=True)
    assert f"= {slurm_cluster.folder}/slurm.conf" in ran.stdout


def test_a_step_sees_the_gpus_that_it_asked_for_and_no_others(slurm_cluster: SlurmCluster) -> None:
    for option in ("--gres=gpu:2", "--gres=gpu:test:2"):
        environ = slurm_cluster.run("srun", "--ntasks=1", option, "env").splitlines()
        (devices,) = [line for line in environ if line.startswith("CUDA_VISIBLE_DEVICES=")]
        assert len(set(devices.partition("=")[2].split(","))) == 2
    with pytest.raises(RuntimeError, match=r"[Rr]equested node configuration is not available"):
        slurm_cluster.run("srun", "--ntasks=1", "--gres=gpu:other:1", "env")


def test_a_job_of_three_nodes_has_a_task_on_each(slurm_cluster: SlurmCluster) -> None:
    names = slurm_cluster.run("srun", "--nodes=3", "--ntasks=3", "printenv", "SLURMD_NODENAME")
    assert sorted(names.split()) == ["n1", "n2", "n3"]


def test_a_job_is_requeued_when_a_higher_one_needs_its_node_and_runs_again(slurm_cluster: SlurmCluster) -> None:
    begins = slurm_cluster.folder / "begins"
    low = submit(
        slurm_cluster, "--partition=low", "--nodelist=n2", "--exclusive", "--requeue",
        f"--wrap=echo $SLURM_RESTART_COUNT. >> {begins}; exec sleep 600",
    )  # fmt: skip
    until(lambda: begins.exists() and begins.read_text().split() == ["."])
    high = submit(slurm_cluster, "--partition=high", "--nodelist=n2", "--exclusive", "--wrap=exec sleep 600")
    until(lambda: state(slurm_cluster, high) == "RUNNING")
    assert state(slurm_cluster, low) == "PENDING"
    slurm_cluster.run("scancel", high)
    until(lambda: begins.read_text().split() == [".", "1."])
    slurm_cluster.run("scancel", low)


def test_every_process_of_a_job_is_seen_also_one_that_hides(slurm_cluster: SlurmCluster) -> None:
    hiding = "import subprocess; subprocess.run(['env', '-i', 'setsid', 'sleep', '613'])"
    job = submit(slurm_cluster, f'--wrap="{sys.executable}" -c "{hiding}"')
    until(lambda: any("sleep 613" in command for command in slurm_cluster.processes().values()))
    commands = list(slurm_cluster.processes().values())
    assert any(f"slurmstepd: [{job}.batch]" in command for command in commands)
    with pytest.raises(RuntimeError, match=rf"is not idle within 0 s(.|\n)*\b{job} RUNNING"):
        slurm_cluster.wait_idle(0)


def test_what_keeps_it_busy_is_named_and_ended(slurm_cluster: SlurmCluster) -> None:
    """So that a test which leaves something is the only one to fail."""
    job = submit(slurm_cluster, "--nodes=2", "--wrap=trap '' TERM; while :; do sleep 0.1; done")
    pending = submit(slurm_cluster, "--hold", "--wrap=true")
    until(lambda: state(slurm_cluster, job) == "RUNNING")
    slurm_cluster.run("scontrol", "update", "NodeName=n3", "State=drain", "Reason=test")
    with pytest.raises(RuntimeError, match=rf"is not idle within 0 s(.|\n)*\b{job} RUNNING") as raised:
        slurm_cluster.wait_idle(0)
    assert f"{pending} PENDING" in str(raised.value)
    assert slurm_cluster.jobs() == []
    assert slurm_cluster.processes() == {}
    assert slurm_cluster.node_states() == {"n1": "idle", "n2": "idle", "n3": "idle"}


def test_a_slurmd_that_was_killed_is_started_again(slurm_cluster: SlurmCluster) -> None:
    killed = slurm_cluster.daemons["slurmd[n2]"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: "slurmd[n2]" not in slurm_cluster.daemons)
    slurm_cluster.restart_node("n2")
    assert slurm_cluster.daemons["slurmd[n2]"] != killed
    assert slurm_cluster.run("srun", "--nodelist=n2", "printenv", "SLURMD_NODENAME") == "n2\n"


def test_nothing_of_it_is_left_and_another_cluster_lives_on(slurm_cluster: SlurmCluster) -> None:
    with SlurmCluster(nodes=2, gpus=1, lines="KillWait=7\n") as other:
        folder, taken = other.folder, ports(other)
        assert not set(taken) & set(ports(slurm_cluster))
        assert "KillWait                = 7 sec" in other.run("scontrol", "show", "config")
        submit(other, "--nodes=2", "--wrap=srun sleep 617")
        until(lambda: str(other.processes()).count("bin/sleep 617'") == 2)
        assert len(mentioning(str(folder))) > 5
    assert not mentioning(str(folder))
    assert not any(map(is_listened_at, taken))
    assert not folder.exists()
    other.stop()
    assert len(slurm_cluster.daemons) == 5
    assert slurm_cluster.run("srun", "hostname")


def test_what_has_started_is_ended_where_one_daemon_cannot_start() -> None:
    with pytest.raises(RuntimeError, match="NoSuchOption") as raised, SlurmCluster(lines="NoSuchOption=1\n"):
        pass
    socket_of_munged = re.search(r'Created socket "(\S+)"', str(raised.value))
    assert socket_of_munged, "munged had started, and the error quotes its log"
    folder = Path(socket_of_munged[1]).parent
    assert not folder.exists()
    assert not mentioning(str(folder))


def test_by_hand_it_lasts_until_it_is_told_to_end() -> None:
    command = [sys.executable, "-m", "tests.slurm.cluster"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        name, _, path = process.stdout.readline().removeprefix("export ").strip().partition("=")
        ran = subprocess.run(["srun", "hostname"], env=os.environ | {name: path}, capture_output=True, check=False)
        process.terminate()
        assert process.wait(30) == 0
    assert ran.returncode == 0, ran.stderr
    assert not mentioning(path)
    assert not Path(path).parent.exists()
