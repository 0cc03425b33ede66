"""The engine without a model: its processes die, hang and wedge as those of vLLM do."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import jsonschema
import psutil
import pytest

from gserve_core import testing
from gserve_core.config import LLMConfig
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ConfigError, GserveError, ItemError
from gserve_core.host import processes
from gserve_core.host.processes import process_start
from gserve_core.interfaces import RunningEngine
from gserve_core.testing import contracts

LLM = LLMConfig("m", max_model_len=4096)
LONG = "one two three four five six seven eight nine ten"
BOTH = pytest.mark.parametrize("processes", [1, 2])
EACH = pytest.mark.parametrize(("processes", "role"), [(1, "engine"), (2, "engine"), (2, "worker")])


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[RunningEngine]:
    running = await EchoEngine(**options).start(LLM, print)
    try:
        yield running
    finally:
        await running.stop()


async def item(running: RunningEngine, text: str, **params: Any) -> str:
    (prepared,) = await running.prepare([text], params)
    return (await running.run(prepared))[0].text


def process(role: str) -> psutil.Process:
    """Return the process below this one with this role."""
    (found,) = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.cmdline()[3:5] == ["gserve_core.engines.echo_process", role]
    ]
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_both_shapes_keep_the_contract(processes: int) -> None:
    testing.check_engine(EchoEngine(processes=processes), LLM)


def test_there_are_one_or_two_processes() -> None:
    with pytest.raises(ConfigError, match="expected 1 or 2, got 3"):
        EchoEngine(processes=3)


def test_a_thousand_items_pass_both_processes() -> None:
    async def run() -> None:
        async with started(processes=2) as running:
            prepared = await running.prepare([f"item {number} {'x' * 500}" for number in range(1000)], None)
            outputs = await asyncio.gather(*map(running.run, prepared))
            assert [output[0].text.split()[1] for output in outputs] == list(map(str, range(1000)))

    asyncio.run(run())


@EACH
def test_a_process_that_is_killed_ends_the_engine_and_its_items_fail_for_no_fault_of_their_own(
    processes: int, role: str
) -> None:
    async def run() -> None:
        async with started(processes=processes, latency=30.0) as running:
            died = asyncio.create_task(running.died())
            begun = asyncio.create_task(item(running, LONG))
            await asyncio.sleep(0.3)
            assert not died.done()
            process(role).kill()
            reason = await asyncio.wait_for(died, 60.0)
            assert reason == (
                "the echo worker has died" if role == "worker" else "the echo process was killed by SIGKILL"
            )
            for failed in (begun, item(running, "later"), running.check()):
                with pytest.raises(GserveError, match="the echo process has died") as error:
                    await asyncio.wait_for(failed, 60.0)
                assert not isinstance(error.value, ItemError)
            assert not psutil.Process().children(recursive=True)

    asyncio.run(run())


@EACH
def test_progress_grows_while_it_works_and_stands_still_while_it_is_stopped(processes: int, role: str) -> None:
    async def run() -> None:
        async with started(processes=processes, latency=0.3) as running:
            begun = asyncio.create_task(item(running, LONG))
            seen: set[int] = set()
            while len(seen) < 3:
                assert not begun.done()
                await asyncio.sleep(0.05)
                seen.add(running.progress())
            process(role).suspend()
            await asyncio.sleep(0.3)  # what it had sent is taken in
            stopped_at = running.progress()
            await asyncio.sleep(1.0)
            assert running.progress() == stopped_at
            process(role).resume()
            assert await asyncio.wait_for(begun, 60.0) == LONG
            assert running.progress() > stopped_at

    asyncio.run(run())


@BOTH
def test_a_hang_stops_all_items_and_a_stop_ends_it(processes: int) -> None:
    async def run() -> None:
        async with started(processes=processes, hang_on="HANG", latency=0.05) as running:
            begun = [asyncio.create_task(item(running, text)) for text in (LONG, "HANG", "later")]
            await asyncio.sleep(1.0)
            assert not any(task.done() for task in begun)
            steps = running.progress()
            await asyncio.sleep(0.5)
            assert running.progress() == steps
            for task in begun:
                task.cancel()
        assert not psutil.Process().children(recursive=True)

    asyncio.run(run())


@pytest.mark.parametrize("options", [{"wedge_on": "WEDGE"}, {"wedge_at": 2}])
@BOTH
def test_a_wedged_engine_finishes_what_it_has_begun_and_answers_nothing_else(
    processes: int, options: dict[str, Any]
) -> None:
    async def run() -> None:
        async with started(processes=processes, latency=0.05, **options) as running:
            begun = asyncio.create_task(item(running, LONG))
            await asyncio.sleep(0.1)
            silent = [asyncio.create_task(item(running, text)) for text in ("WEDGE", "later")]
            silent.append(asyncio.create_task(running.check()))  # type: ignore[arg-type]
            assert await asyncio.wait_for(begun, 60.0) == LONG
            steps = running.progress()
            await asyncio.sleep(0.5)
            assert running.progress() == steps
            assert not any(task.done() for task in silent)
            assert len(psutil.Process().children(recursive=True)) == processes
            for task in silent:
                task.cancel()

    asyncio.run(run())


def test_the_engines_own_checks_are_no_items_when_a_fault_counts_them() -> None:
    async def run() -> None:
        async with started(error_at=2) as running:
            await running.check()
            assert await item(running, "first") == "first"
            await running.check()
            with pytest.raises(ItemError, match="as requested"):
                await item(running, "second")
            assert await item(running, "third") == "third"

    asyncio.run(run())


def test_an_engine_at_its_capacity_can_be_checked() -> None:
    async def run() -> None:
        async with started(capacity=1, latency=3.0) as running:
            begun = [asyncio.create_task(item(running, LONG)) for _ in range(3)]
            await asyncio.sleep(0.1)
            await asyncio.wait_for(running.check(), 20.0)
            assert not any(task.done() for task in begun)
            for task in begun:
                task.cancel()

    asyncio.run(run())


def test_a_sampled_answer_shows_the_seed_that_came_with_the_item() -> None:
    async def answers(running: RunningEngine, params: dict[str, Any] | None, seeds: list[int] | None) -> list[str]:
        prepared = await running.prepare(["a b", "c"], params, seeds)
        return [(await running.run(item))[0].text for item in prepared]

    async def run() -> None:
        async with started(sample=True) as running:
            assert await answers(running, None, [7, 8]) == ["a b seed-7", "c seed-8"]
            assert await answers(running, {"seed": 5}, [7, 8]) == ["a b seed-5", "c seed-5"]
            assert await answers(running, {"temperature": 0.0}, [7, 8]) == ["a b", "c"]
            first, second = await answers(running, None, None), await answers(running, None, None)
            assert first != second, "without a seed each answer is another"
        async with started() as running:
            assert await answers(running, None, [7, 8]) == ["a b", "c"]

    asyncio.run(run())


def test_its_prompts_are_counted_and_truncated_in_words() -> None:
    async def run() -> None:
        async with started() as running:
            for params, expected in (
                ({}, "one two three"),
                ({"truncate_prompt_tokens": 2}, "one two"),
                ({"truncate_prompt_tokens": 9}, "one two three"),
                ({"truncate_prompt_tokens": None}, "one two three"),
            ):
                (prepared,) = await running.prepare(["one  two three"], params)
                (output,) = await running.run(prepared)
                assert (output.text, output.prompt_tokens) == (expected, len(expected.split()))
                assert running.prompt_token_ids(prepared) == output.token_ids
            (prepared,) = await running.prepare(["w " * 5000], {"truncate_prompt_tokens": -1, "max_tokens": 96})
            (output,) = await running.run(prepared)
            assert (output.prompt_tokens, len(output.token_ids)) == (4000, 96)
            for wrong in (-2, 2**31, "2", True):
                with pytest.raises(ItemError, match="'truncate_prompt_tokens': expected "):
                    await running.prepare(["a"], {"truncate_prompt_tokens": wrong})

    asyncio.run(run())


def test_wrong_parameters_are_found_without_a_process() -> None:
    EchoEngine().check_params({"max_tokens": 5, "truncate_prompt_tokens": 2})
    with pytest.raises(ItemError, match="unknown sampling parameter 'max_token'; did you mean 'max_tokens'"):
        EchoEngine().check_params({"max_token": 5})


def test_stop_ends_a_worker_that_takes_no_signal() -> None:
    async def run() -> None:
        async with started(processes=2):
            worker = process("worker")
            worker.suspend()
        contracts._until(lambda: processes.process_start(worker.pid) is None, "the worker is left")

    asyncio.run(run())


SERVER = """
import asyncio, os, sys
from gserve_core.host import processes
from gserve_core.host.processes import process_start
from gserve_core.config import LLMConfig
from gserve_core.engines.echo import EchoEngine
os.environ["GSERVE_SERVER"] = f"{os.getpid()}:{processes.process_start(os.getpid())}"
async def main():
    running = await EchoEngine(hang_at=1, processes=int(sys.argv[1])).start(LLMConfig("m"), lambda phase: None)
    (prepared,) = await running.prepare(["hang"], None)
    asyncio.create_task(running.run(prepared))
    await asyncio.sleep(0.5)
    print("hangs", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def server(processes: int) -> Iterator[subprocess.Popen[str]]:
    """Start a process with an engine that hangs."""
    command = [sys.executable, "-c", SERVER, str(processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "hangs\n"
        yield server
        server.kill()


@BOTH
def test_processes_that_hang_end_when_their_server_is_killed(server: "subprocess.Popen[str]", processes: int) -> None:
    below = {child.pid: process_start(child.pid) for child in psutil.Process(server.pid).children(True)}
    assert len(below) == processes
    server.kill()
    deadline = time.monotonic() + 60
    while left := [pid for pid, began in below.items() if process_start(pid) == began]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)


@BOTH
def test_stopped_processes_end_when_their_server_is_killed_and_they_go_on(
    server: "subprocess.Popen[str]", processes: int
) -> None:
    below = psutil.Process(server.pid).children(recursive=True)
    for child in below:
        child.suspend()
    server.kill()
    server.wait()
    time.sleep(0.5)
    assert all(child.is_running() for child in below)
    for child in below:
        os.kill(child.pid, signal.SIGCONT)
    gone, left = psutil.wait_procs(below, timeout=10.0)
    assert not left
    assert len(gone) == processes


def test_with_a_schema_the_answer_is_a_value_that_fits_it_unless_the_prompt_is_json() -> None:
    schema = {
        "$defs": {"mood": {"enum": ["very good", "bad"]}},
        "type": "object",
        "properties": {
            "mood": {"$ref": "#/$defs/mood"},
            "stars": {"type": "integer", "minimum": 1},
            "tags": {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 2},
            "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
        },
        "required": ["mood", "stars", "tags", "note"],
    }

    async def main() -> tuple[str, str]:
        async with started() as running:
            params = {"structured_outputs": {"json": schema}, "max_tokens": 99}
            return await item(running, "How was it?", **params), await item(running, '{"mood": "odd"}', **params)

    fitting, repeated = asyncio.run(main())
    value = json.loads(fitting)
    jsonschema.validate(value, schema)
    assert value == {"mood": "very good", "stars": 1, "tags": ["xxx", "xxx"], "note": None}
    assert repeated == '{"mood": "odd"}'
