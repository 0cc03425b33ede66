"""Benchmarks for GPUs: scaling, sharing, tensor parallelism, a LoRA adapter, and the memory of a killed server."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from msgspec import structs

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.config import Config
from gserve_core.service.plan import Plan
from gserve_core.service.state import ONLY

from . import machine, models
from .balance import processes
from .rooms import Room
from .rounds import WARM_UP, Benchmark, different, say, wrong
from .sides import READY_SECONDS, Answer, Gserve, Side, llm_config
from .table import GSERVE, no_figures
from .workloads import Work, Workload, of_gpu

FREE = 0.05
"""Maximum part of a server's GPU memory that may be in use when the memory counts as free."""
SHARERS = 2
"""Number of servers that share a GPU."""
BY_MPS = (2, 3)
"""Numbers of servers that share a GPU by MPS."""
SERVED = ("short", "long", "sampled", "skewed")
"""The workloads of several servers on a GPU, in this order."""
PROMPT, PARAMS = "Once upon a time there was", {"temperature": 0, "max_tokens": 4}


class Memory:
    """A monitor of the memory of all GPUs, ten times a second. A context manager.

    Raises SystemExit on entry: there is no GPU.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, tuple[int, ...]]] = []
        self._process: subprocess.Popen[str] | None = None

    def now(self) -> tuple[int, ...]:
        """Return the MiB in use on each GPU, from the next measurement."""
        began = time.monotonic()
        while not (seen := self.since(began)):
            time.sleep(0.05)
        return seen[0][1]

    def since(self, began: float) -> list[tuple[float, tuple[int, ...]]]:
        """Return the measurements since a time of the monotonic clock, each with its time."""
        return [(at, used) for at, used in list(self._seen) if at >= began]

    def _look(self, lines: Any, count: int) -> None:
        used: list[int] = []
        for line in lines:
            used.append(int(line))
            if len(used) == count:
                self._seen.append((time.monotonic(), tuple(used)))
                used = []

    def __enter__(self) -> Self:
        count = len(machine.gpus())
        if not count:
            raise SystemExit("this measures the memory of GPUs, and nvidia-smi finds none here")
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._look, args=(self._process.stdout, count), name="memory", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def scaling(bench: Benchmark, model: str, counts: Sequence[int], scale: float) -> None:
    """Measure the workload `long` on each of these numbers of GPUs. The work per GPU is always the same."""
    one = next(it for it in of_gpu() if it.name == "long").scaled(scale)
    config = llm_config(machine.engine_arguments(model, 1))
    base: list[float] = []
    for count in counts:
        workload = one.scaled(count)
        made = no_figures(f"{count} GPUs", f"{count} GPUs, {workload.title}", GSERVE, model, "tokens/s")
        with _service(config, count) as service:
            side = Gserve(service)
            side.do(workload.scaled(WARM_UP).work(0), "")
            made.figures += [_rate(bench, made.title, side, workload.work(turn)) for turn in bench.turns(made.title)]
        if not made.figures:
            return
        bench.figures.append(made)
        if count == 1:
            base = made.figures
        elif base:
            bench.figures.append(structs.replace(made, side="one GPU", figures=base))


def sharing(bench: Benchmark, model: str, scale: float) -> None:
    """Measure *short* and *long* on two servers that share a GPU, against one of them and against `vllm.LLM`.

    All three engines are on the same GPU. If vLLM's Python code is slower than the GPU, two servers help: each runs it.
    """
    arguments = machine.engine_arguments(model, 3)
    serve = ServeConfig(servers=SHARERS, share_gpu=True, startup_timeout=READY_SECONDS)
    with Room("vllm.LLM", arguments, bench.folder) as room, VLLMService(llm_config(arguments), serve) as service:
        room.wait()
        with service.servers[0].client() as client:
            others: dict[str, Side] = {"one server": Gserve(client), "vllm.LLM": room}
            for one in of_gpu()[:2]:
                name = f"{one.name}, {SHARERS} servers"
                workload = replace(one.scaled(scale), name=name, sides=dict.fromkeys(others))
                bench.measure(model, workload, {GSERVE: Gserve(service), **others})


def servers(bench: Benchmark, model: str, scale: float) -> None:
    """Measure the workloads `SERVED` by `servers_per_gpu: auto` and by one server, against `vllm.LLM`.

    All engines are on the same GPU. Each side has a KV cache of the same size, which the servers of `auto` divide.
    """
    alone = ServeConfig(share_gpu=True, startup_timeout=READY_SECONDS)
    auto = replace(alone, servers_per_gpu="auto")
    choice = Plan.of(Config(LLMConfig(models.find(model)), auto)).models[ONLY].choice
    assert choice is not None
    bench.notes.append(str(choice))
    arguments = machine.engine_arguments(model, choice.servers + 2, sides=3)
    bench.notes.append(", ".join(f"{name}={value}" for name, value in arguments.items() if name != "model"))
    auto = replace(auto, servers_per_gpu=choice.servers)
    config = llm_config(arguments)
    with (
        Room("vllm.LLM", arguments, bench.folder) as room,
        VLLMService(config, auto) as several,
        VLLMService(config, alone) as one,
    ):
        room.wait()
        sides: dict[str, Side] = {GSERVE: Gserve(several), "one server": Gserve(one), "vllm.LLM": room}
        known = {it.name: it for it in of_gpu()}
        for name in SERVED:
            workload = replace(
                known[name].scaled(scale), name=f"{name}, auto", sides={"one server": None, "vllm.LLM": None}
            )
            bench.measure(model, workload, sides)
            found = {it.side: it for it in bench.figures if it.title == workload.title}
            bench.figures += [
                structs.replace(found[side], workload=f"{name}, one server", title=f"{name}, one server", side=as_side)
                for side, as_side in (("one server", GSERVE), ("vllm.LLM", "vllm.LLM")) if side in found
            ]  # fmt: skip


def mps(bench: Benchmark, model: str, scale: float) -> None:
    """Measure servers that share a GPU by an MPS daemon, against as many that take turns.

    All are on the same GPU. Each side has a KV cache of the same size.
    """
    arguments = machine.engine_arguments(model, 2 * max(BY_MPS), sides=2)
    bench.notes.append(", ".join(f"{name}={value}" for name, value in arguments.items() if name != "model"))
    known = {it.name: it for it in of_gpu()}
    for count in BY_MPS:
        turns = ServeConfig(servers_per_gpu=count, startup_timeout=READY_SECONDS)
        with (
            VLLMService(llm_config(arguments), replace(turns, gpu_sharing="mps")) as at_once,
            VLLMService(llm_config(arguments), turns) as in_turn,
        ):
            for name in ("short", "long", "sampled"):
                workload = replace(known[name].scaled(scale), name=f"{name}, {count} by MPS", sides={"no MPS": None})
                bench.measure(model, workload, {GSERVE: Gserve(at_once), "no MPS": Gserve(in_turn)})


def tensor_parallel(bench: Benchmark, model: str, scale: float) -> None:
    """Measure one server over two GPUs, and check that it answers, uses both, and frees both."""
    workload = of_gpu()[0].scaled(scale)
    made = no_figures("tensor-parallel", f"one server on 2 GPUs, {workload.title}", GSERVE, model, "tokens/s")
    arguments = machine.engine_arguments(model, 1) | {"tensor_parallel_size": 2}
    with Memory() as memory:
        before = memory.now()
        with _service(llm_config(arguments), 2) as service:
            if len(service.servers) != 1:
                bench.problems.append(f"{made.title}: {len(service.servers)} servers, expected one")
            side = Gserve(service)
            side.do(workload.scaled(WARM_UP).work(0), "")
            made.figures += [_rate(bench, made.title, side, workload.work(turn)) for turn in bench.turns(made.title)]
            during = memory.now()
        after = memory.now()
    bench.figures += [made] if made.figures else []
    say(f"{made.title}: MiB in use before {before}, during {during}, after {after}")
    for gpu, (idle, busy, left) in enumerate(zip(before, during, after, strict=True)):
        if gpu < 2 and busy - idle < 1024:
            bench.problems.append(f"{made.title}: GPU {gpu} has {busy - idle} MiB in use, expected a half of the model")
        if left - idle > FREE * max(busy - idle, 1024):
            bench.problems.append(f"{made.title}: GPU {gpu} has {left - idle} MiB in use after the shutdown")


def lora(bench: Benchmark, model: str) -> None:
    """Check a random adapter of rank 16: it must change the answers, to the answers of `vllm.LLM` with the adapter."""
    # One prompt at a time, since on a GPU an answer depends on the rest of the batch.
    # In bfloat16, since vLLM's code for adapters takes no float32 on GPUs.
    arguments = machine.engine_arguments(model, 1) | {"dtype": "bfloat16", "enforce_eager": True}
    adapted = arguments | {"lora_path": str(models.adapter(arguments["model"]))}
    work = Workload("lora", 8, 30, 16, {}).work(0)
    with _service(llm_config(arguments), 1) as service:
        base = _one_by_one(Gserve(service), work)
    with _service(llm_config(adapted), 1) as service:
        own = _one_by_one(Gserve(service), work)
    with Room("vllm.LLM", adapted, bench.folder) as room:
        room.wait()
        reference = _one_by_one(room, work)
    for name, answer in (("without", base), ("with", own), ("vllm.LLM", reference)):
        bench.problems += [f"lora, {name}: {problem}" for problem in wrong(work, answer)]
    bench.problems += [f"lora, vllm.LLM: {problem}" for problem in different(own, reference)]
    changed = sum(ours != theirs for ours, theirs in zip(own.outcomes, base.outcomes, strict=True))
    say(f"lora: the adapter changes {changed} of {len(work.prompts)} answers")
    if not changed:
        bench.problems.append("lora: the adapter changes no answer")


def memory(bench: Benchmark, model: str) -> None:
    """Kill a server with SIGKILL; measure the times until its GPU memory is free, and until it answers again.

    The memory must be free before the restarted server uses any.
    """
    config = llm_config(machine.engine_arguments(model, 1) | {"enforce_eager": True})
    free_after = no_figures("freed", "GPU memory free after kill -9", GSERVE, model, "s")
    token_after = no_figures("restart", "token again after kill -9", GSERVE, model, "s")
    with Memory() as seen:
        idle = seen.now()[0]
        with _service(config, 1) as service:
            answer = service.generate([PROMPT], PARAMS)
            for turn in bench.turns("memory"):
                busy = seen.now()[0]
                began = time.monotonic()
                os.kill(processes(service.servers[0])[0].pid, signal.SIGKILL)
                again = service.generate([PROMPT], PARAMS)
                token_after.figures.append(ready := time.monotonic() - began)
                free = [at - began for at, used in seen.since(began) if used[0] - idle <= FREE * (busy - idle)]
                free_after.figures += free[:1]
                if not free:
                    bench.problems.append(f"memory: some of {busy} MiB were in use all the time until the next start")
                if again != answer:
                    bench.problems.append(f"memory: {again} after a restart, {answer} before")
                say(f"memory, round {turn}: {busy} MiB, free after {free[:1]} s, a token after {ready:.1f} s")
    bench.figures += [it for it in (free_after, token_after) if it.figures]


def _service(config: LLMConfig, gpus: int) -> VLLMService:
    """Return a service on this number of GPUs; on a machine without GPUs, with this number of servers."""
    has_gpus = bool(machine.gpus())
    ids, servers = (list(range(gpus)), None) if has_gpus else (None, gpus)
    return VLLMService(config, ServeConfig(gpu_ids=ids, servers=servers, startup_timeout=READY_SECONDS))


def _rate(bench: Benchmark, title: str, side: Side, work: Work) -> float:
    """Send work to a side, check its answer, and return its tokens per second."""
    answer = side.do(work, "")
    bench.problems += [f"{title}: {problem}" for problem in wrong(work, answer)]
    say(f"{title}: {answer.seconds:.2f} s")
    return answer.tokens / answer.seconds


def _one_by_one(side: Side, work: Work) -> Answer:
    """Send work to a side one item at a time, and return the combined answer."""
    alone = [
        replace(work, prompts=[prompt], max_tokens=[tokens])
        for prompt, tokens in zip(work.prompts, work.max_tokens, strict=True)
    ]
    answers = [side.do(one, "") for one in alone]
    error = next((answer.error for answer in answers if answer.error), None)
    return Answer(sum(it.seconds for it in answers), [it.outcomes[0] for it in answers], error)
