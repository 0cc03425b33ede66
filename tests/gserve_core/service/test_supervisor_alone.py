"""The supervisor by itself, with fake servers: which state follows which, what is restarted when, and how it ends."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gserve_core.errors import ConfigError, LaunchError, StartupTimeout
from gserve_core.overview import Counters
from gserve_core.service import supervisor as module
from gserve_core.service.state import Counted, Phase, Published, Ready, State
from gserve_core.service.supervisor import Limits, Supervisor
from tests.gserve_core.fake_servers import FakeProgram, Notes, published, until

NEVER = 60.0
"""Seconds that no test waits for."""


class Case:
    """A supervisor of fake servers, and what it has told."""

    def __init__(
        self, *programs: FakeProgram, max_restarts: int = 10, min_ready: int | None = None, keeps_places: bool = False
    ) -> None:
        self.programs = programs or (FakeProgram(),)
        self.notes = Notes()
        self.published: Published = published(*self.programs)
        self.supervisor = Supervisor(
            self.programs,
            self.published,
            self.notes,
            limits={"": Limits(max_restarts, min_ready)},
            keeps_places=keeps_places,
        )

    def state(self, index: int = 0) -> State:
        return self.published.states[f"server-{index}"].state

    def die(self, index: int = 0, *, died: bool = True, finished: int = 0, alone: bool = False) -> None:
        """Have a server die and be cleaned up after."""
        run = self.programs[index].runs[-1]
        run.finished, run.alone = finished, alone
        run.die(died=died)
        run.clean_up()


@contextmanager
def started(*programs: FakeProgram, max_restarts: int = 10, min_ready: int | None = None) -> Iterator[Case]:
    case = Case(*programs, max_restarts=max_restarts, min_ready=min_ready)
    try:
        case.supervisor.begin()
        yield case
    finally:
        case.supervisor.close()
        assert case.supervisor.wait_ended(10)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF", (0.05, 0.2))
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.05)


def test_servers_start_become_ready_and_are_stopped() -> None:
    with started(FakeProgram(0), FakeProgram(1)) as case:
        assert case.supervisor.wait_ready(10)
        assert [case.state(0), case.state(1)] == [State.READY] * 2
        until(lambda: case.notes.kept)
    assert case.notes.seen() == [State.STARTING, State.READY, State.DRAINING, State.STOPPED]
    assert case.notes.is_over
    assert [run.releases for program in case.programs for run in program.runs] == [1, 1]


def test_a_death_is_published_before_the_cleanup_and_the_restart_begins_after_it() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        (program,) = case.programs
        program.runs[0].die()
        until(lambda: case.state() == State.DRAINING)
        state = case.published.states["server-0"]
        assert (state.usable, state.returns, state.died, state.generation) == (False, True, True, 1)
        time.sleep(0.1)
        assert len(program.runs) == 1
        program.runs[0].clean_up()
        until(lambda: case.state() == State.READY)
        assert case.published.states["server-0"].generation == 2
        assert case.published.states["server-0"].restarts == 1
        assert program.previous[1] is program.runs[0]
        assert case.notes.seen() == [
            State.STARTING, State.READY, State.DRAINING, State.QUEUED, State.STARTING, State.READY,
        ]  # fmt: skip


def test_restarts_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        case.die(finished=1)
        until(lambda: case.published.states["server-0"].restarts == 1)
        until(lambda: case.state() == State.READY)
        monkeypatch.setattr(module, "WINDOW", 0.1)
        until(lambda: case.published.states["server-0"].restarts == 0)
        assert case.state() == State.READY


def test_a_state_knows_since_when_it_holds() -> None:
    with started(FakeProgram(ready=False)) as case:
        began = time.monotonic()
        until(lambda: case.state() == State.STARTING)
        (run,) = case.programs[0].runs
        run.report(Phase("loading"))
        until(lambda: case.published.states["server-0"].phase == "loading")
        first = case.published.states["server-0"].since
        assert began - 5 < first <= time.monotonic()
        run.report(Phase("compiling"))
        until(lambda: case.published.states["server-0"].phase == "compiling")
        assert case.published.states["server-0"].since == first
        run.become_ready()
        until(lambda: case.state() == State.READY)
        assert case.published.states["server-0"].since > first


def test_an_end_in_order_or_by_a_scheduler_is_not_a_death() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        case.programs[0].runs[0].die("SLURM reports PREEMPTED", died=False)
        until(lambda: case.state() == State.DRAINING)
        assert not case.published.states["server-0"].died
        case.programs[0].runs[0].clean_up()
        until(lambda: case.state() == State.READY)


def test_a_server_that_dies_while_it_starts_is_no_death_of_items() -> None:
    program = FakeProgram(0, ready=False)
    with started(program, FakeProgram(1), min_ready=1) as case:
        case.supervisor.wait_ready(10)
        program.runs[0].die()
        until(lambda: case.state() == State.DRAINING)
        assert not case.published.states["server-0"].died
        program.runs[0].clean_up()
        until(lambda: case.state() == State.FAILED)


def test_a_late_message_of_an_old_generation_is_dropped() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        case.die()
        until(lambda: case.published.states["server-0"].generation == 2 and case.state() == State.READY)
        old = case.programs[0].runs[0]
        old.die()
        old.clean_up()
        old.report(Phase("loading"))
        old.report(Ready(case.published.states["server-0"].info))  # type: ignore[arg-type]
        time.sleep(0.1)
        assert (case.state(), case.published.states["server-0"].generation) == (State.READY, 2)
        assert len(case.programs[0].runs) == 2


def test_restarts_are_counted_and_the_cause_and_the_count_are_told() -> None:
    with started(max_restarts=2) as case:
        case.supervisor.wait_ready(10)
        for generation in (1, 2, 3):
            until(lambda: case.state() == State.READY and len(case.programs[0].runs) == generation)  # noqa: B023
            case.die(finished=1)
        until(lambda: case.state() == State.FAILED)
        state = case.published.states["server-0"]
        assert "killed by SIGKILL" in str(state.error)
        assert state.phase == "it was restarted 2 times in ten minutes (max_restarts)"
        assert not state.returns


def test_deaths_while_suspects_are_narrowed_down_do_not_count() -> None:
    with started(max_restarts=1) as case:
        case.supervisor.wait_ready(10)
        began = time.monotonic()
        for generation in range(1, 7):
            until(lambda: case.state() == State.READY and len(case.programs[0].runs) == generation)  # noqa: B023
            case.die(alone=True)
        until(lambda: case.state() == State.READY and len(case.programs[0].runs) == 7)
        assert time.monotonic() - began < 5, "nor are they put off"
        case.die()
        until(lambda: case.state() == State.READY and len(case.programs[0].runs) == 8)
        case.die()
        until(lambda: case.state() == State.FAILED)


def test_a_server_that_finishes_nothing_is_restarted_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF", (0.3, NEVER))
    with started() as case:
        case.supervisor.wait_ready(10)
        began = time.monotonic()
        case.die()
        until(lambda: case.state() == State.READY and len(case.programs[0].runs) == 2)
        case.die()
        until(lambda: case.state() == State.READY and len(case.programs[0].runs) == 3)
        assert time.monotonic() - began >= 0.3
        waited = [it for it in case.notes.states if it.generation == 2 and it.state == State.QUEUED]
        assert {it.phase for it in waited} == {"waiting to restart"}


def test_a_restart_that_fails_says_why_and_is_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF", (0.3, NEVER))
    with started() as case:
        case.supervisor.wait_ready(10)
        (program,) = case.programs
        program.error = OSError("no space left on device")
        case.die()
        until(
            lambda: any(
                it.state == State.QUEUED and it.restarts == 2 and "no space left" in str(it.error)
                for it in [*case.notes.states]
            )
        )
        program.error = None
        until(lambda: case.state() == State.READY)
        assert case.published.states["server-0"].error is None


def test_a_first_start_that_fails_is_told_with_the_cause_of_each() -> None:
    programs = [FakeProgram(index, ready=False) for index in range(3)]
    case = Case(*programs, min_ready=2)
    case.supervisor.begin()
    until(lambda: all(program.runs for program in programs))
    for index in (0, 1):
        programs[index].runs[0].clean_up(LaunchError(f"broken, number {index}"))
    with pytest.raises(LaunchError) as caught:
        case.supervisor.wait_ready(10)
    assert str(caught.value) == "broken, number 0\nbroken, number 1"
    case.supervisor.close()
    assert case.supervisor.wait_ended(10)
    assert [case.state(index) for index in range(3)] == [State.STOPPED] * 3


def test_servers_that_fail_in_one_manner_raise_the_error_of_that_manner() -> None:
    programs = [FakeProgram(index, ready=False) for index in range(2)]
    case = Case(*programs)
    case.supervisor.begin()
    until(lambda: [case.state(0), case.state(1)] == [State.STARTING] * 2)
    for index in (0, 1):
        case.published.publish(case.published.states[f"server-{index}"].failed(StartupTimeout(f"late, number {index}")))
    with pytest.raises(StartupTimeout) as caught:
        case.supervisor.wait_ready(10)
    assert str(caught.value) == "late, number 0\nlate, number 1"
    case.supervisor.close()
    assert case.supervisor.wait_ended(10)


def test_what_cannot_be_opened_is_raised_to_who_waits() -> None:
    case = Case()
    case.notes.refusal = ConfigError("a service named 'x' is already running")
    case.supervisor.begin()
    with pytest.raises(ConfigError, match="is already running"):
        case.supervisor.wait_ready(10)
    assert case.supervisor.wait_ended(10)
    assert not case.programs[0].runs


def test_a_server_with_processes_that_cannot_be_killed_is_not_restarted() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        case.programs[0].runs[0].die()
        case.programs[0].runs[0].clean_up(unkillable=(4711,))
        until(lambda: case.state() == State.FAILED)
        assert case.published.states["server-0"].phase == "some of its processes cannot be killed: 4711"


def test_after_drain_nothing_is_restarted() -> None:
    with started(FakeProgram(0), FakeProgram(1)) as case:
        case.supervisor.wait_ready(10)
        case.supervisor.drain()
        case.die()
        until(lambda: case.state() == State.FAILED)
        assert case.state(1) == State.READY
        assert case.notes.is_draining
        assert len(case.programs[0].runs) == 1


def test_one_server_can_be_stopped_and_started_again() -> None:
    with started(FakeProgram(0), FakeProgram(1)) as case:
        case.supervisor.wait_ready(10)
        case.supervisor.stop("server-0")
        until(lambda: case.state() == State.STOPPED)
        assert case.state(1) == State.READY
        case.supervisor.stop("server-1")
        case.supervisor.begin(["server-0", "server-1"])  # the second one still ends
        until(lambda: [case.state(0), case.state(1)] == [State.READY] * 2)


def test_a_server_that_becomes_ready_while_it_ends_is_not_the_one_that_was_asked_for() -> None:
    program = FakeProgram(ready=False, obeys=False)
    with started(program) as case:
        until(lambda: case.state() == State.STARTING)
        case.supervisor.stop("server-0")
        case.supervisor.begin()
        program.runs[0].become_ready()
        assert not case.supervisor.wait_ready(0.2)
        assert case.state() == State.QUEUED
        program.ready = program.obeys = True
        program.runs[0].clean_up()
        assert case.supervisor.wait_ready(10)
        assert case.published.states["server-0"].generation == 2


def test_a_dead_server_may_keep_its_place_until_it_is_started_there_or_ended() -> None:
    case = Case(max_restarts=0, keeps_places=True)
    case.supervisor.begin()
    case.supervisor.wait_ready(10)
    (program,) = case.programs
    for generation in (1, 2):
        case.die()
        until(lambda: case.state() == State.FAILED)
        case.supervisor.begin()
        until(lambda: case.state() == State.READY and len(program.runs) == generation + 1)  # noqa: B023
        assert program.previous[generation] is program.runs[generation - 1]
    case.die()
    until(lambda: case.state() == State.FAILED)
    assert not any(run.releases for run in program.runs)
    case.supervisor.close()
    assert case.supervisor.wait_ended(10)
    assert program.runs[-1].releases == 1


def test_close_with_time_lets_the_servers_finish_and_a_second_one_ends_them_at_once() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        case.supervisor.close(30.0)
        until(lambda: case.programs[0].runs[0].stops)
        state = case.published.states["server-0"]
        assert (state.state, state.finishing, state.works) == (State.DRAINING, True, True)
        assert not case.supervisor.wait_ended(0.1)
        case.supervisor.close()
        assert case.supervisor.wait_ended(10)
        assert case.programs[0].runs[0].stops == [30.0, None]


def test_close_while_servers_start_or_wait_ends_them_all() -> None:
    waiting, starting = FakeProgram(0), FakeProgram(1, ready=False)
    with started(waiting, starting, min_ready=1) as case:
        case.supervisor.wait_ready(10)
        waiting.error = OSError("full")
        case.die()
        until(lambda: case.state() == State.QUEUED)
    assert [case.state(0), case.state(1)] == [State.STOPPED] * 2
    assert waiting.runs[0].releases == 1


def test_a_server_that_does_not_end_is_left_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_SECONDS", 0.2)
    case = Case(FakeProgram(obeys=False))
    case.supervisor.begin()
    case.supervisor.wait_ready(10)
    case.supervisor.close()
    assert case.supervisor.wait_ended(10)
    assert (case.state(), case.published.states["server-0"].error) == (
        State.FAILED, "server-0 did not end within 0.2 s",
    )  # fmt: skip
    assert case.notes.is_over


def test_who_waits_for_a_start_hears_of_a_close() -> None:
    case = Case(FakeProgram(ready=False))
    case.supervisor.begin()
    threading.Timer(0.1, case.supervisor.close).start()
    with pytest.raises(LaunchError, match="was shut down while it started"):
        case.supervisor.wait_ready(10)
    assert case.supervisor.wait_ended(10)


def test_a_hook_that_fails_does_not_end_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    monkeypatch.setattr(case.notes, "changed", lambda *_: 1 / 0)
    case.supervisor.begin()
    assert case.supervisor.wait_ready(10)
    case.supervisor.close()
    assert case.supervisor.wait_ended(10)


def test_counters_are_published_and_begin_anew_with_the_next_generation() -> None:
    with started() as case:
        case.supervisor.wait_ready(10)
        (program,) = case.programs
        program.runs[0].report(Counted(Counters(items=5, running=2), 1.0, 2.0))
        until(lambda: case.published.states["server-0"].counters == Counters(items=5, running=2))
        assert case.published.states["server-0"].completion_rate == 2.0
        program.ready = False
        case.die()
        until(lambda: len(program.runs) == 2)
        program.runs[0].report(Counted(Counters(items=9)))  # late
        program.runs[1].become_ready()
        until(lambda: case.state() == State.READY)
        assert case.published.states["server-0"].counters == Counters()
    totals = [state.counters.items for state in case.notes.states if state.generation == 1]
    assert totals[-1] == 5


# -------------------------------------------------------------------------------------------- changes of a running pool


def test_held_servers_get_no_work_until_they_are_released() -> None:
    with started() as case:
        assert case.supervisor.wait_ready(10)
        case.supervisor.add([FakeProgram(1), FakeProgram(2)], held=True)
        until(lambda: [state.state for state in case.published.states.values()] == [State.READY] * 3)
        assert [state.usable for state in case.published.states.values()] == [True, False, False]
        case.supervisor.release(["server-1", "server-2"])
        until(lambda: all(state.usable for state in case.published.states.values()))


def test_a_removed_server_drains_and_is_forgotten() -> None:
    with started(FakeProgram(0), FakeProgram(1)) as case:
        assert case.supervisor.wait_ready(10)
        case.supervisor.remove(["server-1", "no such server"], 5.0)
        until(lambda: case.programs[1].runs[0].stops)
        state = case.published.states["server-1"]
        assert (state.usable, state.works, case.programs[1].runs[0].stops) == (False, True, [5.0])
        case.programs[1].runs[0].die(died=False)
        case.programs[1].runs[0].clean_up()
        until(lambda: "server-1" not in case.published.states)
        assert case.notes.gone == ["server-1"]
        case.programs[1].runs[0].die()  # late
        assert case.supervisor.wait_ready(10)


def test_a_replaced_server_keeps_its_name_and_never_counts_as_lost() -> None:
    with started() as case:
        assert case.supervisor.wait_ready(10)
        new = FakeProgram(0, ready=False)
        new.port = 4321
        replaced = case.supervisor.replace(new, 5.0)
        old = case.programs[0].runs[0]
        until(lambda: old.stops == [5.0])
        assert case.published.states["server-0"].returns
        old.die(died=False)
        old.clean_up()
        until(lambda: new.runs)
        assert not replaced.done()
        new.runs[0].become_ready()
        assert replaced.result(10) is None
        state = case.published.states["server-0"]
        assert (state.usable, state.generation) == (True, 2)
        assert all(state.returns or state.usable for state in case.notes.states[1:])


def test_the_old_program_returns_if_the_new_one_does_not_start() -> None:
    with started() as case:
        assert case.supervisor.wait_ready(10)
        new = FakeProgram(0, ready=False)
        replaced = case.supervisor.replace(new, 0.0)
        until(lambda: case.programs[0].runs[0].stops)
        case.programs[0].runs[0].clean_up()
        until(lambda: new.runs)
        new.runs[0].clean_up(LaunchError("there is no such model"))
        with pytest.raises(LaunchError, match="no such model"):
            replaced.result(10)
        until(lambda: len(case.programs[0].runs) == 2 and case.published.states["server-0"].usable)
        assert all(state.returns or state.usable for state in case.notes.states[1:])


def test_a_replacement_ends_with_the_supervisor() -> None:
    case = Case()
    case.supervisor.begin()
    assert case.supervisor.wait_ready(10)
    replaced = case.supervisor.replace(FakeProgram(0, ready=False), 60.0)
    until(lambda: case.programs[0].runs[0].stops)
    case.supervisor.close()
    with pytest.raises(LaunchError):
        replaced.result(10)
    case.programs[0].runs[0].clean_up()
    assert case.supervisor.wait_ended(10)
