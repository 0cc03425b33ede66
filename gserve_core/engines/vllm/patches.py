"""Changes to vLLM in its own processes: they end with the server, fork on the CPU, and survive seeded items there."""

import functools
import logging
import os
from typing import Any

from .. import orphans
from . import differences

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's own setting for how it starts its processes: "fork", or "spawn", which imports everything again."""


def enter() -> None:
    """Prepare one of vLLM's processes: let it end with the server, and patch vLLM for the CPU.

    vLLM calls this in each of its processes, through the entry point `gserve` of the group `vllm.general_plugins`.
    """
    orphans.watch()
    with differences.optional("a guard for seeded items on the CPU"):
        if differences.find("vllm.platforms:current_platform").is_cpu():
            _spare_generators()


@functools.cache
def _spare_generators() -> None:
    """Keep seeded items from killing EngineCore on the CPU. Idempotent."""
    # vLLM may read a prompt in several steps. Each step samples a token, and all but the last are discarded. For those,
    # vLLM rewinds the generator (`_bookkeeping_sync` in its gpu_model_runner.py). Only CUDA's generators support that:
    # CPU generators raise RuntimeError. So a step whose token is discarded gets no generator here.
    runner = differences.find("vllm.v1.worker.cpu_model_runner:CPUModelRunner")
    sample = differences.find("vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens")

    @functools.wraps(sample)
    def sample_tokens(self: Any, *arguments: Any, **options: Any) -> Any:
        generators, is_thrown_away = differences.generators(self)
        spared = {place: generators.pop(place) for place in [*generators] if is_thrown_away[place]}
        try:
            return sample(self, *arguments, **options)
        finally:
            generators.update(spared)

    runner.sample_tokens = sample_tokens


def fork_on_cpu(config: Any, *, is_apart: bool) -> None:
    """Make vLLM fork its processes on the CPU, although it has chosen to "spawn" them. Forking takes half the time.

    `is_apart`: the config asks for a separate worker process. Otherwise the worker runs inside EngineCore, as on a GPU.
    If the user has chosen cores, this thread is bound to them, and so are the processes that it forks.
    """
    # vLLM spawns processes in order to bind their threads, and leaves one core free. Forked processes inherit the
    # number of threads set here, so the worker needs no process of its own. Inside EngineCore, no step of the model
    # waits for messages between the two.
    import torch

    manager = differences.find("vllm.utils.ompmultiprocessing:OMPProcessManager")
    told = logging.getLogger(manager.__module__)
    told.disabled = is_apart  # the worker process logs the same again
    try:
        binding = differences.call(manager, config)
    finally:
        told.disabled = False
    if binding.cpu_lists:  # empty: "nobind"
        (cores,) = binding.cpu_lists
        if not binding.auto_setup:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    if not is_apart and config.parallel_config.data_parallel_size == 1:
        config.parallel_config.distributed_executor_backend = "uni"
    os.environ[START_METHOD] = "fork"
