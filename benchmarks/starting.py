"""Starting: the time from `start()` to the first token, against `vllm serve` from its command to its first token.

Each step runs in a new process, without anything warm. One step starts a service, kills its server with SIGKILL, and
waits for the restart. Other steps start two servers: at once, or one after the other on one GPU.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from gserve import ServeConfig, VLLMService

from . import machine
from .balance import processes
from .rounds import Benchmark, say
from .served import first_token, serving
from .sides import READY_SECONDS, Arguments, llm_config
from .table import GSERVE, Figures, no_figures

BARE = "vllm serve"
AGAIN = {True: ("second server", "restart"), False: ("restart",)}
"""Further measurements that are compared with the start of one `vllm serve`, with a GPU (True) and without."""
PROMPT, PARAMS = "Once upon a time there was", {"temperature": 0, "max_tokens": 1}
MARKS = {
    "engine begins": "Initializing a V1 LLM engine",
    "weights": "Starting to load model",
    "loaded": "Loading weights took",
    "listens": "Application startup complete",
}
"""The phases of a start, and the text in vLLM's log that begins each."""


@dataclass
class Starts:
    """The measurements of one process: seconds by kind of start, and the phases of the first start, in words."""

    seconds: dict[str, float] = field(default_factory=dict)
    phases: str = ""
    problems: list[str] = field(default_factory=list)


def measure(bench: Benchmark, model: str) -> None:
    """Measure all kinds of start in turn. Nothing is compiled (`enforce_eager`)."""
    here = machine.gpus()
    arguments = machine.engine_arguments(model, 1 if here else 2) | {"enforce_eager": True}
    steps: list[tuple[str, Callable[[], Starts]]] = [
        (BARE, lambda: bare(arguments, 1, bench.folder)),
        (GSERVE, lambda: _apart(one_server, arguments)),
    ]
    if here:
        smaller = machine.engine_arguments(model, 2) | {"enforce_eager": True}
        steps += [(GSERVE, lambda: _apart(one_gpu, smaller))]
    if len(here) != 1:
        steps += [
            (BARE, lambda: bare(arguments, 2, bench.folder)),
            (GSERVE, lambda: _apart(two_servers, arguments)),
        ]
    found: dict[tuple[str, str], Figures] = {}
    for turn in bench.turns("starting"):
        for side, step in steps:
            starts = step()
            bench.problems += starts.problems
            for kind, seconds in starts.seconds.items():
                say(f"{kind}, round {turn}, {side}: {seconds:.1f} s")
                for title in (kind, *AGAIN[bool(here)]) if (side, kind) == (BARE, "start") else (kind,):
                    made = no_figures(title, title, side, model, "s")
                    found.setdefault((title, side), made).figures.append(seconds)
            if starts.phases and turn == 1:
                bench.notes.append(f"{', '.join(starts.seconds)}, {side}: {starts.phases}")
    titles = [*dict.fromkeys(title for title, _ in found)]
    bench.figures += sorted(found.values(), key=lambda it: (titles.index(it.title), it.side != GSERVE))


def bare(arguments: Arguments, servers: int, folder: Path) -> Starts:
    """Start this number of `vllm serve` at once; return the time until all have answered."""
    with contextlib.ExitStack() as stack:
        logs = [folder / f"bare-{index}-{time.time_ns()}.log" for index in range(servers)]
        began, clock = time.perf_counter(), datetime.now()  # noqa: DTZ005 (vLLM's log has local times)
        running = [
            stack.enter_context(serving(arguments, log, gpu=index if servers > 1 else None))
            for index, log in enumerate(logs)
        ]
        for process, address in running:
            first_token(process, address)
        seconds = time.perf_counter() - began
    return Starts({"start" if servers == 1 else "start of two": seconds}, _marks(logs[0].read_text(), clock))


def one_server(arguments: Arguments) -> Starts:
    """Measure the start of a service, and the restart of its server after SIGKILL."""
    starts = Starts()
    with service(arguments, 1) as first:
        starts.seconds["start"], answer, starts.phases = _first(first)
        began = time.perf_counter()
        os.kill(processes(first.servers[0])[0].pid, signal.SIGKILL)
        again = first.generate([PROMPT], PARAMS)
        starts.seconds["restart"] = time.perf_counter() - began
        if first.status()[0].restarts != 1:
            starts.problems.append(f"restart: {first.status()[0].restarts} restarts after one death")
    if answer != again:
        starts.problems.append(f"starting: {answer} at first, {again} after a restart")
    return starts


def one_gpu(arguments: Arguments) -> Starts:
    """Measure the start of the second of two servers that share a GPU, and so start one after the other."""
    serve = ServeConfig(servers=2, share_gpu=True, min_ready=1, startup_timeout=READY_SECONDS)
    with VLLMService(llm_config(arguments), serve) as shared:
        began = time.perf_counter()
        while not all(status.state == "ready" for status in shared.status()):
            time.sleep(0.02)
        return Starts({"second server": time.perf_counter() - began})


def two_servers(arguments: Arguments) -> Starts:
    """Measure the start of a service with two servers."""
    with service(arguments, 2) as two:
        seconds, _, phases = _first(two)
    return Starts({"start of two": seconds}, phases)


@contextlib.contextmanager
def service(arguments: Arguments, servers: int) -> Iterator[VLLMService]:
    """Yield a service that is not started yet; shut it down at the end."""
    ids = list(range(servers)) if machine.gpus() else None
    serve = ServeConfig(gpu_ids=ids, servers=None if ids else servers, startup_timeout=READY_SECONDS)
    made = VLLMService(llm_config(arguments), serve)
    try:
        yield made
    finally:
        made.shutdown()


def _first(made: VLLMService) -> tuple[float, list[list[str]], str]:
    """Start a service; return the seconds until its first token, its answer, and the phases of its first server."""
    phases: dict[str, float] = {}
    ready = threading.Event()
    began = time.perf_counter()

    def watch() -> None:
        while not ready.wait(0.02):
            if (phase := made.status()[0].phase) is not None:
                phases.setdefault(phase, time.perf_counter() - began)

    watching = threading.Thread(target=watch, name="phases")
    watching.start()
    try:
        made.start()
        answer = made.generate([PROMPT], PARAMS)
        seconds = time.perf_counter() - began
    finally:
        ready.set()
        watching.join()
    return seconds, answer, ", ".join(f"{phase} at {at:.1f} s" for phase, at in phases.items())


def _marks(log: str, began: datetime) -> str:
    """Return when the phases of `vllm serve` began, in words. The times are from its log, which has full seconds."""
    found = {}
    for name, text in MARKS.items():
        match = re.search(rf"(\d\d-\d\d \d\d:\d\d:\d\d) .*{re.escape(text)}", log)
        if match:
            at = datetime.strptime(f"{began.year}-{match[1]}", "%Y-%m-%d %H:%M:%S")  # noqa: DTZ007
            found[name] = (at - began).total_seconds()
    return ", ".join(f"{name} at {max(at, 0):.0f} s" for name, at in found.items())


def _apart(step: Callable[[Arguments], Starts], arguments: Arguments) -> Starts:
    """Run a step in a new process; return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step, arguments).result()
