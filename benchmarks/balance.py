"""Balance: one queue for two servers, against a static split of the same batch over the same two servers.

The answers differ widely in length. Both ways are measured again while one server has only half of its time, because
its processes are stopped and continued in turn. This simulates a shared machine or GPU, and needs no setting of gserve
or vLLM.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil

from gserve import ServeConfig, VLLMClient, VLLMServer, VLLMService

from . import machine, workloads
from .rounds import WARM_UP, Benchmark, say, wrong
from .sides import READY_SECONDS, Answer, Gserve, llm_config
from .table import GSERVE, no_figures
from .workloads import Work

SPLIT = "static split"
TIMES = 64
"""Number of items, as a multiple of `max_num_seqs`. With fewer items, the time depends only on the longest answer."""
STOPPED_SECONDS = 0.05
"""Length of each stop of the slow server, and of each run between them, in seconds."""


def measure(bench: Benchmark, model: str, scale: float) -> None:
    """Measure the queue and the split in turn, first with two equal servers, then with one of them slowed by half."""
    here = machine.gpus()
    serve = ServeConfig(
        gpu_ids=[0, 1] if len(here) > 1 else None, servers=None if len(here) > 1 else 2, startup_timeout=READY_SECONDS
    )
    workload = replace(workloads.skewed(4096 if here else 1024, {}), name="balance").scaled(scale)
    arguments = machine.engine_arguments(model, 1) | {
        "max_num_seqs": max(1, workload.items // TIMES),
        "enable_prefix_caching": False,  # both ways send the same prompts
    }
    with VLLMService(llm_config(arguments), serve) as service, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for server in service.servers]
        ways: dict[str, Callable[[Work], Answer]] = {
            GSERVE: lambda work: Gserve(service).do(work, ""),
            SPLIT: lambda work: split(clients, work),
        }
        if not here:
            for index, server in enumerate(service.servers):
                bind(server, index)
        for do in ways.values():
            do(workload.scaled(WARM_UP).work(0))
        for name, slow in (("balance", None), ("balance, one slowed", service.servers[1])):
            title = f"{name}: {workload.title.partition(': ')[2]}, 2 servers, {arguments['max_num_seqs']} at once each"
            made = {side: no_figures(name, title, side, model, "tokens/s") for side in ways}
            with slowed(slow) if slow is not None else contextlib.nullcontext():
                for turn in bench.turns(title):
                    work = workload.work(turn)
                    for side in (GSERVE, SPLIT) if turn % 2 else (SPLIT, GSERVE):
                        answer = ways[side](work)
                        say(f"{title}, round {turn}, {side}: {answer.seconds:.2f} s")
                        bench.problems += [f"{title}, {side}: {problem}" for problem in wrong(work, answer)]
                        made[side].figures.append(answer.tokens / answer.seconds)
            bench.figures += [one for one in made.values() if one.figures]


def split(clients: Sequence[VLLMClient], work: Work) -> Answer:
    """Split work into equal parts, one per client, and do them at the same time; return the combined answer."""
    count = len(clients)
    parts = [
        replace(work, prompts=work.prompts[at::count], max_tokens=work.max_tokens[at::count]) for at in range(count)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda client, part: Gserve(client).do(part, ""), clients, parts))
    seconds = time.perf_counter() - began
    outcomes = [answers[at % count].outcomes[at // count] for at in range(len(work.prompts))]
    return Answer(seconds, outcomes, next((answer.error for answer in answers if answer.error), None))


def processes(server: VLLMServer) -> list[psutil.Process]:
    """Return the processes of a server: the one that listens on its port, and all its descendants."""
    ours = psutil.Process().children(recursive=True)
    listening = [process for process in ours if server.port in _ports(process)]
    first = next(it for it in listening if it.parent() not in listening)  # its children may have inherited the socket
    return [first, *first.children(recursive=True)]


def _ports(process: psutil.Process) -> set[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return {it.laddr.port for it in process.net_connections("tcp") if it.status == psutil.CONN_LISTEN}
    return set()


def bind(server: VLLMServer, index: int) -> None:
    """Bind a server to a core of its own."""
    # On few cores, a slowed server would otherwise leave its CPU time to the other server.
    cores = sorted(os.sched_getaffinity(0))
    for process in processes(server):
        for thread in process.threads():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread.id, [cores[index % len(cores)]])


@contextlib.contextmanager
def slowed(server: VLLMServer) -> Iterator[None]:
    """Give a server only half of the time, until the context ends."""
    ended = threading.Event()
    pids = [process.pid for process in processes(server)]

    def signals(number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def take_turns() -> None:
        while not ended.is_set():
            signals(signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            signals(signal.SIGCONT)
            time.sleep(STOPPED_SECONDS)

    thread = threading.Thread(target=take_turns, name="slow")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
