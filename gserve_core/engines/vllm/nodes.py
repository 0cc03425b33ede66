"""vLLM on several nodes, by its own executor: the workers of all nodes meet at an address of rank 0's node."""

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import wait
from typing import Any

from ...config import LLMConfig
from ...errors import ConfigError
from ...interfaces import Rank, RunningRank
from . import differences

OURS = ("nnodes", "node_rank", "master_addr", "master_port")
"""Arguments of vLLM that gserve sets for a server on several nodes."""
BACKEND = "mp"
"""vLLM's name of the executor that runs over several nodes without further programs."""
REAP_SECONDS = 1.0
"""Maximum time until the exit code of a worker that has ended is known, in seconds."""
STOP_SECONDS = 5.0
"""Maximum time for the workers to end, in seconds. Then they are killed."""
logger = logging.getLogger("gserve.engine")


def check(llm: LLMConfig, nodes: int) -> None:
    """Check the arguments of a server on several nodes. Raises ConfigError."""
    at = "$.llm.llm_kwargs"
    for name in OURS:
        if name in llm.llm_kwargs:
            raise ConfigError(f"gserve sets '{name}' itself, since nodes_per_server is {nodes}: remove it", at=at)
    if (backend := llm.llm_kwargs.get("distributed_executor_backend", BACKEND)) != BACKEND:
        raise ConfigError(f"with nodes_per_server, expected '{BACKEND}' or none, got {backend!r}", at=at)
    if llm.llm_kwargs.get("data_parallel_size", 1) != 1:
        raise ConfigError("data_parallel_size is for servers on one node: set serve.servers instead", at=at)


def arguments(rank: Rank) -> dict[str, Any]:
    """Return vLLM's arguments for a rank."""
    return dict(zip(OURS, (rank.nodes, rank.number, rank.host, rank.port), strict=True)) | {
        "distributed_executor_backend": BACKEND
    }


def meeting_place(arguments: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return where the ranks of a server meet, of vLLM's arguments; None: it runs on one node."""
    _, _, host, port = OURS
    return (arguments[host], arguments[port]) if host in arguments else None


def environment(rank: Rank) -> Mapping[str, str]:
    """Return the variables that keep the traffic between the nodes in their common network."""
    return {
        "VLLM_HOST_IP": rank.address,
        "GLOO_SOCKET_IFNAME": rank.interface,
        "NCCL_SOCKET_IFNAME": f"={rank.interface}",  # without the sign, also names that begin with this one
    }


class Workers(RunningRank):
    """The workers of a rank above 0. The engine of rank 0 sends them their work."""

    def __init__(self, config: Any, ended: threading.Event) -> None:
        """Load the workers, which takes until those of all ranks have met. Raises any exception: they cannot load.

        `config`: vLLM's, of an engine without a front.
        """
        executor = differences.find("vllm.v1.executor.multiproc_executor:MultiprocExecutor")
        self._ended = ended
        self._why: str | None = None
        self._executor = differences.call(executor, config, monitor_workers=False)
        with differences.expected("watching the workers"):
            workers = {worker.proc.sentinel: worker.proc for worker in self._executor.workers}
        threading.Thread(target=self._watch, args=(workers,), name="workers", daemon=True).start()

    def _watch(self, workers: Mapping[int, Any]) -> None:
        """Wait until a worker ends. Runs in a thread of its own."""
        first, *_ = wait([*workers])
        worker = workers[first]  # type: ignore[index]
        worker.join(REAP_SECONDS)
        if (worker.exitcode or 0) < 0:
            name = signal.Signals(-worker.exitcode).name
            self._why = f"a worker was killed by {name}{', most likely since memory ran out' * (name == 'SIGKILL')}"
        else:
            self._why = "a worker has ended; see the root cause above, in the log"

    async def died(self) -> str:
        """Return how a worker has ended."""
        while self._why is None:
            await asyncio.sleep(0.25)
        return self._why

    async def stop(self) -> None:
        """End the workers; kill them after `STOP_SECONDS`."""
        ending = threading.Thread(target=self._shut_down, name="workers-end", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, STOP_SECONDS)
        for child in multiprocessing.active_children():
            child.kill()
        self._ended.set()

    def _shut_down(self) -> None:
        with contextlib.suppress(Exception):
            self._executor.shutdown()
