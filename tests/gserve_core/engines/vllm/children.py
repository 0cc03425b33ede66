"""Real vLLM in this process: what it does while it works, and when a process of it is killed; printed as JSON.

Run as a program: vLLM warns on import, and leaves much behind in the process that has it.
"""

import asyncio
import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

import psutil

from gserve_core.config import LLMConfig
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.interfaces import RunningEngine

LLM = LLMConfig(
    "demo:smollm2-135m",
    dtype="float32",
    enforce_eager=True,
    gpu_memory_utilization=0.18,
    max_model_len=2048,
    llm_kwargs={"max_num_batched_tokens": 256, "max_num_seqs": 16},
)


async def watched(running: RunningEngine, prompt: Any, params: dict[str, Any]) -> list[int]:
    """Have a prompt worked on; return the numbers that `progress` gave meanwhile."""
    (prepared,) = await running.prepare([prompt], params)
    working = asyncio.create_task(running.run(prepared))
    seen = []
    while not working.done():
        seen.append(running.progress())
        await asyncio.sleep(0.1)
    await working
    return seen


async def sampled(running: RunningEngine, params: dict[str, Any], seeds: list[int] | None) -> list[str]:
    prepared = await running.prepare(["Once upon a time"] * 3, {"max_tokens": 12} | params, seeds)
    return [(await running.run(item))[0].text for item in prepared]


async def read_in_steps(running: RunningEngine) -> list[str]:
    """Sample what follows a prompt that is too long for a step of the engine; the second time it need not be read."""
    prepared = await running.prepare([[*range(1000, 1700)]] * 2, {"max_tokens": 12, "temperature": 1.0}, [7, 7])
    return [(await running.run(item))[0].text for item in prepared]


async def done_before(running: RunningEngine) -> int:
    """Return how many of 40 items of a batch are done when an interactive request is, which was sent after them.

    The engine works on 16 at once, and all items of the batch are equally long.
    """
    prompts = [f"Number {number}" for number in range(40)]
    batch = await running.prepare(prompts, {"max_tokens": 12, "ignore_eos": True})
    tasks = [asyncio.create_task(running.run(running.in_background(item))) for item in batch]
    await asyncio.sleep(0.1)
    (prepared,) = await running.prepare(["Once"], {"max_tokens": 2, "ignore_eos": True})
    await running.run(prepared)
    done = sum(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    return done


async def working(running: RunningEngine) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prefill": await watched(running, [28] * 2000, {"max_tokens": 1}),
        "decode": await watched(running, "Once", {"max_tokens": 60, "ignore_eos": True}),
        "sampled": await sampled(running, {"temperature": 1.0}, [7, 7, 8]),
        "again": await sampled(running, {"temperature": 1.0}, [8, 7, 7]),
        "own seed": await sampled(running, {"temperature": 1.0, "seed": 7}, [1, 2, 3]),
        "greedy": await sampled(running, {"temperature": 0.0}, [1, 2, 3]),
        "in steps": await read_in_steps(running),
    }
    idle = running.progress()
    await asyncio.sleep(0.5)
    found["idle"] = [idle, running.progress()]
    greedy = await running.prepare(["a", "b"], {"temperature": 0.0}, [1, 2])
    found["shared"] = greedy[0][1] is greedy[1][1]
    found["done before, first come"] = await done_before(running)
    return found


async def killed(running: RunningEngine, name: str) -> dict[str, Any]:
    """Kill a process of the engine while it works, and see what comes of it."""
    prepared = await running.prepare(
        [f"Number {number}" for number in range(10)], {"max_tokens": 1000, "ignore_eos": True}
    )
    tasks = [asyncio.create_task(running.run(item)) for item in prepared]
    await asyncio.sleep(0.5)
    began = time.monotonic()
    await running.check()
    found: dict[str, Any] = {"check while busy": time.monotonic() - began}
    died = asyncio.create_task(running.died())
    below = {process: process.name() for process in psutil.Process().children(recursive=True)}
    (victim,) = [process for process in below if below[process] == name]
    assert not died.done()
    began = time.monotonic()
    victim.kill()
    found["reason"] = await asyncio.wait_for(died, 20.0)
    found["noticed"] = time.monotonic() - began
    failed = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20.0)
    found["items"] = sorted({type(error).__name__ for error in failed if isinstance(error, BaseException)})
    began = time.monotonic()
    await running.stop()
    found["stopped"] = time.monotonic() - began
    vllms = [process for process in below if below[process].startswith("VLLM")]
    found["left"] = [below[process] for process in psutil.wait_procs(vllms, timeout=10.0)[1]]
    return found


async def main() -> dict[str, Any]:
    running = await VLLMEngine().start(LLM, print)
    found = await working(running)
    (engine,) = [
        process for process in psutil.Process().children(recursive=True) if process.name() == "VLLM::EngineCore"
    ]
    found["cores"] = {"engine": sorted(os.sched_getaffinity(engine.pid)), "here": sorted(os.sched_getaffinity(0))}
    found["engine killed"] = await killed(running, "VLLM::EngineCore")
    apart = LLM.llm_kwargs | {"distributed_executor_backend": "mp"}  # by itself there is none without a GPU
    apart["scheduling_policy"] = "priority"
    running = await VLLMEngine().start(replace(LLM, llm_kwargs=apart), print)
    found["done before, by priority"] = await done_before(running)
    found["worker killed"] = await killed(running, "VLLM::Worker")
    return found


if __name__ == "__main__":
    with open(sys.argv[1], "w") as file:  # noqa: PTH123
        json.dump(asyncio.run(main()), file)
    os._exit(0)
