"""A service that drains: what its servers have may finish, all else is an error that says why, and nothing restarts."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gserve import BatchError, GserveError, ItemLost, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_core.service.state import State

LLM = LLMConfig("m")
PROMPTS = [f"item {index}" for index in range(200)]
SLOW = EchoEngine(latency=0.25, capacity=4)
"""Half a second for each of `PROMPTS`; 8 of them are with the server at once."""
WHY = "the service is ending: its job's time is nearly over"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def begun(service: VLLMService) -> tuple[threading.Thread, list[Any]]:
    """Begin a call, and return its thread, and the list that is to hold its results, once something has finished."""
    caught: list[Any] = []
    some = threading.Event()

    def call() -> None:
        results: list[Any] = [None] * len(PROMPTS)
        for index, outcome in service.generate_iter(PROMPTS):
            results[index] = outcome
            some.set()
        caught.extend(results)

    thread = threading.Thread(target=call)
    thread.start()
    assert some.wait(60)
    return thread, caught


def check(results: list[Any], why: str) -> int:
    """Check that each item has either its own answer or the error; return how many have their answer."""
    assert len(results) == len(PROMPTS)
    lost = [result for result in results if isinstance(result, ItemLost)]
    assert {str(error) for error in lost} == {why}
    done = [(prompt, result) for prompt, result in zip(PROMPTS, results, strict=True) if result not in lost]
    assert all(outputs[0].text == prompt for prompt, outputs in done)
    return len(done)


def test_what_the_servers_have_finishes_and_the_rest_is_lost_because_of_it() -> None:
    with VLLMService(LLM, ServeConfig(), engine=SLOW) as service:
        thread, results = begun(service)
        service.drain("its job's time is nearly over")
        thread.join(60)
        assert 8 <= check(results, WHY) < 100
        with pytest.raises(BatchError, match=r"2 of 2 items failed.*time is nearly over") as raised:
            service.generate(["a", "b"])
        assert [type(result) for result in raised.value.results] == [ItemLost, ItemLost]
        assert service.status()[0].state == State.READY, "its owner ends it"
    assert service.status()[0].state == State.STOPPED


def test_a_process_that_is_attached_gets_the_same_with_all_results_in_hand() -> None:
    with VLLMService(LLM, ServeConfig(), engine=SLOW, name="ending") as service:
        attached = VLLMService.attach("ending")
        caught: list[BatchError] = []

        def call() -> None:
            with pytest.raises(BatchError) as raised:
                attached.generate(PROMPTS, return_extra=True)
            caught.append(raised.value)

        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(2)
        service.drain("its job's time is nearly over")
        thread.join(60)
        why = "the service 'ending' is ending: it finishes its requests in flight, and accepts no more"
        assert check(caught[0].results, why) >= 8
        with pytest.raises(GserveError, match="'ending' is ending"):
            VLLMService.attach("ending")
        attached.shutdown()


def test_a_server_that_dies_then_is_not_started_again_and_what_it_had_is_lost() -> None:
    with VLLMService(LLM, ServeConfig(), engine=SLOW) as service:
        thread, results = begun(service)
        service.drain("its job's time is nearly over")
        for pid in processes.processes_of(service.servers[0].record().instance):
            os.kill(pid, signal.SIGKILL)
        thread.join(60)
        assert check(results, WHY) < 100
        until(lambda: service.status()[0].state == State.FAILED)
        assert service.status()[0].restarts == 0


def test_a_service_that_was_drained_can_be_started_again() -> None:
    service = VLLMService(LLM, ServeConfig(), engine=EchoEngine(), name="again")
    service.drain()
    for _ in range(2):
        with service:
            assert service.generate(["a"]) == [["a"]]
            with VLLMService.attach("again") as attached:
                assert attached.generate(["b"]) == [["b"]]
            service.drain()
