"""OpenAI's API: a server of gserve against `vllm serve` with the same flags, and what priorities are worth.

Both engines are up together, and one works at a time. Each round measures both sides.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import httpx

from gserve import ServeConfig, VLLMService

from . import machine
from .rounds import QUIET_SECONDS, Benchmark, say, wrong
from .served import first_token, serving
from .sides import READY_SECONDS, Answer, Arguments, Gserve, at_once, llm_config
from .table import GSERVE, no_figures
from .workloads import Work, Workload

BARE = "vllm serve"
TOGETHER = Workload("openai", 64, 30, 16, {})
"""The requests that are sent at the same time."""
ALONE = Workload("openai first token", 10, 30, 2, {})
"""The streams whose first token is awaited, one after the other."""
BATCH, LENGTHS = Workload("priority", 192, 30, 32, {}), range(16, 49)
"""The batch that keeps an engine busy, and the lengths of its answers in turn, in tokens."""
CHAT = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
"""The sampling parameters of the chats that come meanwhile."""
SEQUENCES, CHATS = 16, 5
"""Number of items that this engine works on at once, and of chats in a round, one after the other."""


@dataclass(frozen=True)
class End:
    """An address of OpenAI's API, its key, and the name of its model."""

    address: str
    key: str
    model: str

    def connect(self) -> httpx.AsyncClient:
        """Return a client. It must be closed."""
        return httpx.AsyncClient(
            base_url=self.address, headers={"authorization": f"Bearer {self.key}"}, timeout=READY_SECONDS
        )

    async def together(self, work: Work) -> Answer:
        """Send all requests of the work at the same time; return the answers."""
        async with self.connect() as client:

            async def ask(at: int) -> Any:
                reply = await client.post("completions", json=self._body(work, at))
                return reply.raise_for_status().json()

            return await at_once(ask, work, lambda it: (it["choices"][0]["text"], it["usage"]["completion_tokens"], 0))

    async def first_token(self, work: Work) -> float:
        """Return the median time until the first event of a stream, in seconds."""
        times = []
        async with self.connect() as client:
            for at in range(len(work.prompts)):
                began = time.perf_counter()
                async with client.stream("POST", "completions", json=self._body(work, at) | {"stream": True}) as reply:
                    lines = reply.raise_for_status().aiter_lines()
                    await anext(lines)
                    times.append(time.perf_counter() - began)
                    async for _ in lines:
                        pass
        return median(times)

    def _body(self, work: Work, at: int) -> dict[str, Any]:
        return {"model": self.model, "prompt": work.prompts[at]} | work.params(at)


def measure(bench: Benchmark, model: str, scale: float) -> None:
    """Measure requests at once, and the first token of single streams."""
    arguments = machine.engine_arguments(model, 2) | {"enforce_eager": True}
    together, alone = TOGETHER.scaled(scale), ALONE.scaled(scale)
    whole = {side: no_figures("openai", f"{together.title}, at once", side, model, "s") for side in (GSERVE, BARE)}
    first = {
        side: no_figures("openai first token", f"{alone.title}, streamed", side, model, "s") for side in (GSERVE, BARE)
    }
    with both_sides(arguments, bench) as ends:
        for turn in itertools.chain([0], bench.turns("openai")):  # 0: to warm up
            for side in (GSERVE, BARE) if turn % 2 else (BARE, GSERVE):
                time.sleep(QUIET_SECONDS)
                answer = asyncio.run(ends[side].together(together.work(turn)))
                bench.problems += [f"openai, {side}: {problem}" for problem in wrong(together.work(turn), answer)]
                seconds = asyncio.run(ends[side].first_token(alone.work(turn)))
                say(f"round {turn}, {side}: {answer.seconds:.2f} s, first token after {1000 * seconds:.0f} ms")
                if turn:
                    whole[side].figures.append(answer.seconds)
                    first[side].figures.append(seconds)
    bench.figures += [*whole.values(), *first.values()]


@contextlib.contextmanager
def both_sides(arguments: Arguments, bench: Benchmark) -> Iterator[Mapping[str, End]]:
    """Start a service with one server and `vllm serve`; yield their addresses by side."""
    with (
        serving(arguments, bench.folder / "openai-serve.log") as (process, address),
        VLLMService(llm_config(arguments), ServeConfig(servers=1, startup_timeout=READY_SECONDS)) as service,
    ):
        first_token(process, address)
        record = service.servers[0].record()
        ends = [(GSERVE, f"http://{record.address}/v1/", record.token), (BARE, address, "none")]
        found = {}
        for side, url, key in ends:
            models = httpx.get(f"{url}models", headers={"authorization": f"Bearer {key}"}, timeout=60).json()
            found[side] = End(url, key, models["data"][0]["id"])
        yield found


def measure_priority(bench: Benchmark, model: str, scale: float) -> None:
    """Measure a chat's time while a batch runs, without priorities and with them."""
    arguments = machine.engine_arguments(model, 2) | {"enforce_eager": True, "max_num_seqs": SEQUENCES}
    batch = BATCH.scaled(scale)
    title = f"a chat of {CHAT['max_tokens']} tokens beside a batch"
    made = {
        policy: no_figures("priority", title, GSERVE if policy == "priority" else policy, model, "s")
        for policy in ("priority", "fcfs")
    }
    with contextlib.ExitStack() as stack:
        services = {
            policy: stack.enter_context(
                VLLMService(
                    llm_config(arguments | {"scheduling_policy": policy}),
                    ServeConfig(servers=1, startup_timeout=READY_SECONDS),
                )
            )
            for policy in made
        }
        for turn in bench.turns("priority"):
            for policy, service in services.items():
                time.sleep(QUIET_SECONDS)
                work = batch.work(turn)
                lengths = [LENGTHS[7 * at % len(LENGTHS)] for at in range(len(work.prompts))]
                seconds = beside(service, replace(work, max_tokens=lengths))
                say(f"round {turn}, {policy}: a chat took {seconds:.2f} s")
                made[policy].figures.append(seconds)
    bench.figures += made.values()


def beside(service: VLLMService, work: Work) -> float:
    """Send chats while a batch runs; return their median time, in seconds."""
    record = service.servers[0].record()
    running = threading.Thread(target=Gserve(service).do, args=(work, ""), name="batch")
    running.start()
    times = []
    with httpx.Client(
        base_url=f"http://{record.address}", headers={"authorization": f"Bearer {record.token}"}, timeout=READY_SECONDS
    ) as client:
        for number in range(CHATS):
            time.sleep(1.0)
            began = time.perf_counter()
            messages = [{"role": "user", "content": f"Name {number + 2} colours."}]
            body = {"messages": messages} | CHAT
            client.post("/v1/chat/completions", json=body).raise_for_status()
            times.append(time.perf_counter() - began)
        if not running.is_alive():
            raise RuntimeError("the batch of the benchmark ended before the chats")
    running.join()
    return median(times)
