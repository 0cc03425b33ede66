"""What is known of a server is one frozen value; reading it and waiting for it take no lock."""

import signal
import threading
import time
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from gserve_core.errors import LaunchError
from gserve_core.interfaces import Address, EngineInfo
from gserve_core.overview import Counters
from gserve_core.service.state import (
    Counted,
    Listening,
    Logging,
    Phase,
    Published,
    Queued,
    Ready,
    ServerState,
    Start,
    State,
)

NEW = ServerState(name="server-0", host="0.0.0.0", port=4000)
START = Start("an-instance", "canary-token", "canary-control")
THERE = Address(["10.0.0.1"], 4321)
INFO = EngineInfo(model="m")


def ready() -> ServerState:
    return NEW.begun(START, NEW).after(Listening(THERE)).after(Ready(INFO))


def test_a_server_goes_from_stopped_to_ready() -> None:
    state = NEW
    assert (state.state, state.generation, state.usable) == (State.STOPPED, 0, False)
    state = state.begun(START, NEW)
    assert (state.state, state.generation, state.phase) == (State.STARTING, 1, "starting the process")
    state = state.after(Logging(Path("log"))).after(Queued("the queue: Priority"))
    assert (state.state, state.phase, state.log) == (State.QUEUED, "the queue: Priority", Path("log"))
    state = state.after(Phase("loading")).after(Listening(THERE))
    assert (state.state, state.phase, state.host, state.port) == (State.STARTING, "loading", "10.0.0.1", 4321)
    state = state.after(Ready(INFO))
    assert (state.state, state.phase, state.info, state.usable) == (State.READY, None, INFO, True)


def test_a_new_generation_knows_nothing_of_the_last_one_but_why_it_ended() -> None:
    failed = ready().failed(LaunchError("boom"))
    again = failed.begun(Start("another"), NEW)
    assert (again.generation, again.instance, again.address, again.info) == (2, "another", None, None)
    assert (again.host, again.port, again.token, again.error) == ("0.0.0.0", 4000, "", "boom")
    assert again.after(Listening(THERE)).after(Ready(INFO)).error is None
    assert failed.begun(Start("another"), replace(NEW, pool="another model")).pool == "another model"


@pytest.mark.parametrize("report", [Queued("x"), Phase("x"), Ready(INFO)])
def test_a_server_that_ends_does_not_become_anything_else(report: Phase) -> None:
    for state in (ready().draining("ending"), ready().stopped(), ready().failed(LaunchError("boom"))):
        assert state.after(report) == state


def test_a_late_phase_does_not_change_a_ready_server() -> None:
    assert ready().after(Phase("loading")) == ready()


def test_a_state_cannot_be_changed_and_shows_no_secret() -> None:
    with pytest.raises(FrozenInstanceError):
        NEW.phase = "x"  # type: ignore[misc]
    assert "canary" not in repr(ready())
    assert "canary" not in repr(START)


def test_one_that_finishes_what_it_has_takes_nothing_and_is_not_over() -> None:
    state = ready().draining("finishing", finishing=True)
    assert (state.usable, state.works, state.is_over) == (False, True, False)
    assert state.stopped().is_over
    assert not state.stopped().works


def test_who_waits_is_told_of_a_new_state_at_once() -> None:
    states = Published([NEW])
    threading.Timer(0.2, lambda: states.publish(ready())).start()
    began = time.monotonic()
    assert states.wait(lambda: states.states["server-0"].usable, 10.0)
    assert time.monotonic() - began < 5.0
    assert not states.wait(lambda: False, 0.05)


def test_states_that_were_read_do_not_change_behind_the_reader() -> None:
    states = Published([NEW])
    before = states.states
    states.publish(ready())
    assert before["server-0"] is NEW
    assert [state.state for state in before.values()] == [State.STOPPED]


def test_a_signal_handler_may_wait_while_the_main_thread_waits() -> None:
    states = Published([NEW])
    waited: list[bool] = []
    usual = signal.signal(
        signal.SIGUSR2, lambda *_: waited.append(states.wait(lambda: states.states["server-0"].usable, 5.0))
    )
    try:
        threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)).start()
        threading.Timer(0.3, lambda: states.publish(ready())).start()
        assert states.wait(lambda: states.states["server-0"].usable, 5.0)
        assert waited == [True]
    finally:
        signal.signal(signal.SIGUSR2, usual)


def test_counters_belong_to_a_generation_and_rates_to_a_server_that_works() -> None:
    counters = Counters(running=2, waiting=3, items=4, failed=1, prompt_tokens=10, completion_tokens=20)
    busy = ready().after(Counted(counters, 5.0, 7.0))
    assert (busy.counters, busy.prompt_rate, busy.completion_rate) == (counters, 5.0, 7.0)
    assert busy.draining("finishing", finishing=True).completion_rate == 7.0
    totals = Counters(items=4, failed=1, prompt_tokens=10, completion_tokens=20)
    for ended in (busy.draining("ending"), busy.stopped(), busy.failed(LaunchError("boom"))):
        assert (ended.counters, ended.prompt_rate, ended.completion_rate) == (totals, 0.0, 0.0)
        late = ended.after(Counted(Counters(running=1, items=5), 5.0, 7.0))
        assert (late.counters, late.completion_rate) == (Counters(items=5), 0.0)
        assert ended.begun(Start("another"), NEW).counters == Counters()
