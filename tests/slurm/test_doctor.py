"""`gserve doctor` on a cluster, as its users run it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.usefixtures("slurm_cluster")
COMMAND = [sys.executable, "-m", "gserve.cli", "doctor"]
NODE = socket.gethostname()
"""All nodes of the cluster are on this machine."""


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    slurm_cluster.wait_idle(60)
    yield
    left = [job for job in slurm_cluster.jobs() if "gserve-doctor" in job]
    slurm_cluster.wait_idle(60)
    assert not left, "a job was left behind"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    sections = {"llm": {"model_name": str(tmp_path)}, "launcher": {"type": "slurm", "partition": "main"}}
    path.write_text(json.dumps(sections))
    (tmp_path / "config.json").write_text("{}")
    return str(path)


def told(output: str) -> dict[str, tuple[str, str]]:
    """Return the state and the text of each finding that was printed, by its subject."""
    lines = [line for line in output.splitlines() if line.startswith(("ok ", "note ", "problem "))]
    subjects = ("nodelist", "node", "model", "SLURM", "allocation", "GPUs")
    known = [f"partition {name}" for name in ("main", "high", "low", "mian")] + [f"{it} on {NODE}" for it in subjects]
    found = {}
    for line in lines:
        state, _, rest = line.partition(" ")
        subject = next((it for it in known if rest.strip().startswith(f"{it} ")), rest.split()[0])
        found[subject] = state, rest.strip().removeprefix(subject).strip()
    return found


def run(*arguments: str, code: int = 0, prefix: tuple[str, ...] = (), **environ: str) -> dict[str, tuple[str, str]]:
    ran = subprocess.run(
        [*prefix, *COMMAND, *arguments], env=os.environ | environ, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    return told(ran.stdout)


def test_without_a_config_slurm_and_its_partitions_are_told_and_no_job_is_made() -> None:
    found = run()
    assert found["SLURM"][0] == "ok"
    assert "slurm-wlm" in found["SLURM"][1]
    gpus = "nodes: 3 idle; time limit: infinite; gpu:test:4"
    assert found["partition main"] == ("ok", f"up, the default; {gpus}")
    assert found["partition low"] == ("ok", f"up; {gpus}")
    assert "node" not in found


def test_from_a_login_node_a_job_reaches_a_node(config: str) -> None:
    found = run(config)
    assert found["model"][0] == "ok"
    assert found["node"][0] == "ok"
    assert f"{NODE} runs programs, and is reached at " in found["node"][1]
    assert f"model on {NODE}" not in found


def test_on_a_node_the_same_is_looked_for_there(config: str) -> None:
    found = run(config, "--on-node")
    assert found[f"model on {NODE}"] == found["model"]
    state, text = found[f"GPUs on {NODE}"]
    assert state == "note"
    assert text.endswith("(CUDA_VISIBLE_DEVICES=0)"), "the job has the GPU that a server would have"


def test_in_an_allocation_it_is_a_step(config: str) -> None:
    found = run(
        config, "--on-node", "--set", "launcher.partition=mian",
        prefix=("salloc", "--nodes=2", "--gres=gpu:2", "--time=5"),
    )  # fmt: skip
    state, text = found["allocation"]
    assert state == "ok"
    assert "on n[1-2]: servers are steps of it" in text
    assert found["node"][0] == "ok"
    assert f"GPUs on {NODE}" in found
    assert "partition mian" not in found, "in an allocation the partition is decided already"


def test_an_allocation_that_is_over_is_a_problem(config: str) -> None:
    found = run(config, code=1, SLURM_JOB_ID="999999")
    assert found["allocation"] == ("problem", "job 999999 is no longer running")
    assert found["node"][0] == "note"


def test_a_partition_that_there_is_not_is_a_problem_and_no_job_is_tried(config: str) -> None:
    found = run(config, "--set", "launcher.partition=mian", code=1)
    assert found["partition mian"] == ("problem", "there is no partition of this name; did you mean 'main'?")
    assert found["node"][0] == "note"


def test_a_partition_none_of_whose_nodes_can_be_used_is_a_problem(config: str, slurm_cluster: SlurmCluster) -> None:
    slurm_cluster.run("scontrol", "update", "NodeName=n[1-3]", "State=drain", "Reason=test")
    try:
        found = run(config, code=1)
        by_default = run(config, "--set", "launcher.partition=null", code=1)
    finally:
        slurm_cluster.run("scontrol", "update", "NodeName=n[1-3]", "State=resume")
    assert found["partition main"][0] == "problem"
    assert "3 drained" in found["partition main"][1]
    assert found["partition low"][0] == "note", "nobody wants to go there"
    assert by_default == found


def test_a_node_of_the_nodelist_that_takes_no_jobs_is_told_with_its_reason(
    config: str, slurm_cluster: SlurmCluster
) -> None:
    slurm_cluster.run("scontrol", "update", "NodeName=n1", "State=drain", "Reason=broken fan")
    try:
        one = run(config, "--set", "launcher.nodelist=n1", code=1)
        both = run(config, "--set", "launcher.nodelist='n[1-2]'", "--set", "launcher.partition=mian", code=1)
    finally:
        slurm_cluster.run("scontrol", "update", "NodeName=n1", "State=resume")
    assert one["nodelist"] == ("problem", "n1 is drained (broken fan)")
    assert one["node"][0] == "note", "no job is tried"
    assert both["nodelist"] == ("note", "n1 is drained (broken fan); 1 usable")


def test_what_slurm_refuses_is_said_in_its_words(config: str) -> None:
    found = run(config, "--set", "launcher.gpu_type=other", code=1)
    assert found["node"][0] == "problem"
    assert "equested node configuration is not available" in found["node"][1]


def test_a_job_that_waits_is_shown_and_an_interrupt_cancels_it(config: str, slurm_cluster: SlurmCluster) -> None:
    full = slurm_cluster.run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--wrap=exec sleep 600").strip()
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            [*COMMAND, config], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stderr
            said = ""
            while "Resources)" not in said:
                said = process.stderr.readline()
                assert said.startswith("waiting for "), said
            assert len(slurm_cluster.jobs()) == 2
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert told(out)["SLURM"][0] == "ok", "what was known is not lost"
        assert [job.split()[0] for job in slurm_cluster.jobs()] == [full]
    found = run(config, "--set", "launcher.queue_timeout=2", code=1)
    assert "(queue_timeout)" in found["node"][1]
    slurm_cluster.run("scancel", full)
    slurm_cluster.wait_idle(60)


def test_a_controller_that_is_dead_is_named(config: str) -> None:
    with SlurmCluster(nodes=1) as own:
        os.kill(own.daemons["slurmctld"], signal.SIGKILL)
        for arguments in (config,), ():
            found = run(*arguments, code=1, prefix=(), **own.environ)
            assert found["SLURM"][0] == "ok", "its commands are here"
            assert found["controller"] == ("problem", "slurmctld, the controller of SLURM, does not answer")
            assert "node" not in found or found["node"][0] == "note"
