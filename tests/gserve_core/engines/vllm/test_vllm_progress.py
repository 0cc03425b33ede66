"""The count of an engine's progress, with engines that show more or less of themselves."""

import asyncio
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gserve_core.engines.vllm import progress
from gserve_core.engines.vllm.progress import Progress


class Engine:
    """An `AsyncLLM` that takes `seconds` for a turn of its loop, and shows `tokens` of one request."""

    def __init__(self, seconds: float, tokens: int | None) -> None:
        self.seconds, self.tokens = seconds, tokens
        if tokens is not None:
            state = SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: self.tokens))
            self.output_processor = SimpleNamespace(request_states={"a": state})

    async def is_sleeping(self) -> bool:
        await asyncio.sleep(self.seconds)
        return False


async def counts(engine: Any, times: int = 4) -> list[int]:
    """Return counts while an item runs, each after any probe has ended."""
    counting, found = Progress(engine), []
    counting.begin()
    for _ in range(times):
        found.append(counting.count())
        await asyncio.sleep(0.05)
    counting.close()
    return found


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WORKING_SECONDS", 0.01)


def test_turns_that_take_as_long_as_work_are_progress() -> None:
    found = asyncio.run(counts(Engine(0.02, tokens=0)))
    assert found[-1] > found[0]


def test_an_engine_whose_loop_turns_without_work_makes_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WORKING_SECONDS", 60.0)  # a turn may be slow here
    found = asyncio.run(counts(Engine(0.0, tokens=3)))
    assert len(set(found)) == 1


def test_an_engine_that_shows_no_tokens_makes_progress_as_long_as_its_loop_turns() -> None:
    found = asyncio.run(counts(Engine(0.0, tokens=None)))
    assert found[-1] > found[0]
    hanging = asyncio.run(counts(Engine(3600.0, tokens=None)))
    assert len(set(hanging)) == 1


def test_an_engine_without_turns_is_never_taken_for_one_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = asyncio.run(counts(SimpleNamespace()))
    assert found[-1] > found[0]
    (record,) = caplog.records
    assert record.getMessage().startswith("a hanging engine will not be noticed: gserve ")


def test_a_process_that_computes_makes_progress_in_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WORKING_SECONDS", 60.0)

    async def counted(cpu_seconds: Callable[[], float], turn: float = 3600.0) -> list[int]:
        engine = Engine(turn, tokens=3)
        counting, found = Progress(engine, cpu_seconds), []
        counting.begin()
        for _ in range(4):
            found.append(counting.count())
            for _ in range(50):  # no time: a probe of a loop that turns ends meanwhile
                await asyncio.sleep(0)
        counting.close()
        return found

    assert len(set(asyncio.run(counted(time.monotonic)))) > 1
    assert len(set(asyncio.run(counted(lambda: 7.0)))) == 1, "it has used none since"
    assert len(set(asyncio.run(counted(time.monotonic, turn=0.0)))) == 1, "its loop turns: it is in no step"
    monkeypatch.setattr(progress, "LONGEST_STEP", 0.0)
    assert len(set(asyncio.run(counted(time.monotonic)))) == 1, "it may loop for ever"


def test_an_ended_item_counts_with_its_tokens() -> None:
    counting = Progress(Engine(0.0, tokens=0))
    counting.begin()
    counting.end(SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2, 3]), SimpleNamespace()]))
    assert (counting.running, counting.done, counting.count()) == (0, 4, 4)
    counting.begin()
    counting.end(None)
    assert counting.count() == 5


def test_a_warm_up_is_not_taken_for_a_hang() -> None:
    counting = Progress(Engine(0.0, tokens=0))
    counting.expect_silence(60.0)
    assert counting.count() < counting.count()
    counting.expect_silence(0.0)
    assert counting.count() == counting.count()
