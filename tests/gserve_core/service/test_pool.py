"""A pool by itself, with fake servers: one start or end after the other, from any thread; what the queue is told."""

import errno
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gserve_core.config import ServeConfig
from gserve_core.errors import ConfigError, GserveError, LaunchError
from gserve_core.host import processes, tokens
from gserve_core.interfaces import Address
from gserve_core.service import pool as module
from gserve_core.service import records
from gserve_core.service import supervisor as supervising
from gserve_core.service.pool import Pool, Queue, Record
from gserve_core.service.records import ServiceRecord
from gserve_core.service.state import ONLY, Ended, Gone, ServerState, State
from gserve_core.service.supervisor import Limits
from tests.gserve_core.fake_servers import FakeProgram, until


class Told:
    """A dispatcher that only notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.is_closed = self.is_watched = False
        self.prefix_affinity = True
        self.affinities: set[bool] = set()
        """Those with which it was told to expect or to add a server."""

    def expect(self, key: str, comes: bool = True) -> None:
        self.told.append(("expect", key))
        self.affinities.add(self.prefix_affinity)

    def add(self, key: str, connect: Any, capacity: int, timeout: float | None, **more: Any) -> None:
        connection = connect()
        self.told.append(("add", key, connection))
        self.affinities.add(self.prefix_affinity)
        self.is_watched = more["is_watched"]

    def remove(self, key: str, why: str, *, returns: bool = False, died: bool = True) -> None:
        self.told.append(("remove", key, why, returns, died))

    def set_prefix_affinity(self, is_on: bool) -> None:
        self.prefix_affinity = is_on

    def drain(self, why: str) -> None:
        self.told.append(("drain", why))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def dispatchers(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """Have pools tell fake dispatchers; return those that were made."""
    made: list[Told] = []

    def make() -> Told:
        made.append(Told())
        return made[-1]

    monkeypatch.setattr(module, "Dispatcher", make)
    return made


def pool_of(*programs: FakeProgram, **more: Any) -> Pool:
    def queues() -> dict[str, Queue]:
        return {ONLY: Queue(lambda state: state.instance, ServeConfig)}  # type: ignore[arg-type,return-value]

    limits = {ONLY: Limits(max_restarts=10)}
    return Pool(programs, logs=lambda: Path("logs"), limits=limits, queues=queues, **more)


@contextmanager
def on_signal(act: Callable[[], object]) -> Iterator[None]:
    """Have a signal interrupt this thread every few milliseconds, and its handler do something."""
    usual = signal.signal(signal.SIGALRM, lambda *_: act())
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.003)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def test_the_queue_is_told_of_every_server_and_of_its_end_at_once(dispatchers: list[Told]) -> None:
    program = FakeProgram()
    pool = pool_of(program)
    pool.start()
    (dispatcher,) = dispatchers
    assert dispatcher.told == [("expect", "server-0"), ("add", "server-0", "instance-1")]
    program.runs[0].die("its process ended")
    until(lambda: len(dispatcher.told) == 3)
    assert dispatcher.told[2] == ("remove", "server-0", "server-0: its process ended", True, True)
    program.runs[0].clean_up()
    until(lambda: len(dispatcher.told) == 4)
    assert dispatcher.told[3] == ("add", "server-0", "instance-2")
    pool.drain("as requested")
    program.runs[1].die("preempted", died=False)
    program.runs[1].clean_up(LaunchError("server-0 failed: preempted\nmore lines"))
    until(lambda: pool.states["server-0"].state == State.FAILED)
    assert dispatcher.told[4:] == [
        ("drain", "the service is ending: as requested"),
        ("remove", "server-0", "server-0: preempted", True, False),
        ("remove", "server-0", "server-0 failed: preempted", False, False),
    ]
    pool.close()
    assert dispatcher.is_closed


def test_a_server_to_which_there_can_be_no_connection_yet_is_tried_again(
    dispatchers: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(state: ServerState) -> Any:
        if is_short:
            raise OSError(errno.EMFILE, "Too many open files")
        return state.instance

    monkeypatch.setattr(supervising, "KEEP_SECONDS", 0.05)
    is_short = True
    program = FakeProgram()
    pool = Pool([program], logs=lambda: Path("logs"), queues=lambda: {ONLY: Queue(connect, ServeConfig)})
    pool.start()
    threading.Event().wait(0.2)
    assert not any(told[0] == "add" for told in dispatchers[0].told)
    is_short = False
    until(lambda: ("add", "server-0", "instance-1") in dispatchers[0].told)
    threading.Event().wait(0.2)
    assert len(dispatchers[0].told) == len(set(dispatchers[0].told)), "it was told again what it knew"
    pool.close()


def test_prefix_affinity_is_off_before_items_wait_for_the_first_server(dispatchers: list[Told]) -> None:
    def connect(state: ServerState) -> Any:
        return state.instance

    serve = ServeConfig(prefix_affinity=False)
    pool = Pool([FakeProgram()], logs=lambda: Path("logs"), queues=lambda: {ONLY: Queue(connect, lambda: serve)})
    pool.start()
    until(lambda: len(dispatchers[0].told) == 2)
    assert dispatchers[0].affinities == {False}
    pool.close()


def test_items_wait_for_a_server_that_is_stopped_and_started_at_once(dispatchers: list[Told]) -> None:
    program = FakeProgram(obeys=False)
    pool = pool_of(program)
    pool.start()
    pool.stop_one("server-0")
    pool.begin_one("server-0")
    program.runs[0].report(Ended("told to"))
    program.runs[0].report(Gone())
    until(lambda: len(dispatchers[0].told) == 5)
    assert pool.states["server-0"].generation == 2
    assert [told[:2] for told in dispatchers[0].told] == [
        ("expect", "server-0"), ("add", "server-0"), ("remove", "server-0"), ("expect", "server-0"),
        ("add", "server-0"),
    ]  # fmt: skip
    program.obeys = program.runs[1].obeys = True
    pool.close()


def test_a_server_that_is_given_up_is_told_with_cause_and_reason(dispatchers: list[Told]) -> None:
    program = FakeProgram()
    pool = pool_of(program)
    pool.start()
    program.runs[0].die()
    program.runs[0].clean_up(unkillable=(7,))
    until(lambda: pool.states["server-0"].state == State.FAILED)
    assert dispatchers[0].told[-1] == (
        "remove", "server-0",
        "server-0 failed while serving: killed by SIGKILL; some of its processes cannot be killed: 7",
        False, False,
    )  # fmt: skip
    pool.close()


def test_a_start_after_all_servers_were_given_up_starts_them_again(dispatchers: list[Told]) -> None:
    programs = FakeProgram(0), FakeProgram(1)
    pool = pool_of(*programs)
    pool.start()
    for began, program in zip(([1, 1], [2, 2]), programs, strict=True):  # where one is left, a start does nothing
        program.runs[0].die()
        program.runs[0].clean_up(unkillable=(7,))
        until(lambda name=program.name: pool.states[name].state == State.FAILED)  # type: ignore[misc]
        pool.start()
        assert [len(it.runs) for it in programs] == began
    assert all(state.usable for state in pool.states.values())
    assert [it[:2] for it in dispatchers[0].told][-2:] == [("add", "server-0"), ("add", "server-1")]
    pool.close()


def test_a_start_while_it_ends_waits_for_that_and_works() -> None:
    pool = pool_of(FakeProgram(0), FakeProgram(1))
    for _ in range(20):
        pool.start()
        ending = threading.Thread(target=pool.close)
        ending.start()
        pool.start()
        ending.join(10)
        pool.start()
        assert [state.state for state in pool.states.values()] == [State.READY] * 2
    pool.close()
    assert [state.state for state in pool.states.values()] == [State.STOPPED] * 2


def test_a_start_while_the_queue_ends_waits_for_the_end_of_all(dispatchers: list[Told]) -> None:
    program = FakeProgram()
    pool = pool_of(program)
    pool.start()
    (dispatcher,) = dispatchers
    starting = threading.Thread(target=pool.start)
    waits: list[bool] = []

    def close() -> None:
        if not waits:
            starting.start()
            starting.join(0.2)
            waits.append(starting.is_alive())

    dispatcher.close = close  # type: ignore[method-assign]
    pool.close()
    assert waits == [True]
    starting.join(10)
    assert pool.states["server-0"].state == State.READY
    assert len(program.runs) == 2
    pool.close()


def test_starts_and_ends_from_many_threads_end(dispatchers: list[Told]) -> None:
    programs = [FakeProgram(index) for index in range(3)]
    pool = pool_of(*programs)

    def start(_: int) -> None:
        try:
            pool.start()
        except LaunchError as error:
            assert "while it started" in str(error)  # noqa: PT017

    with ThreadPoolExecutor(8) as threads:
        acts = [threads.submit(start, 0) if number % 2 else threads.submit(pool.close) for number in range(60)]
        for act in acts:
            act.result(30)
    pool.close()
    assert {state.state for state in pool.states.values()} == {State.STOPPED}
    assert all(dispatcher.is_closed for dispatcher in dispatchers)


def test_a_start_that_another_was_quicker_than_leaves_nothing(
    dispatchers: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = supervising.Supervisor._close

    def close_slowly(self: supervising.Supervisor, drain: float | None) -> None:
        if not self.was_asked:
            time.sleep(0.2)
        close(self, drain)

    monkeypatch.setattr(supervising.Supervisor, "_close", close_slowly)
    pool = pool_of(FakeProgram())
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait(10)
        pool.start()

    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            for act in [threads.submit(start) for _ in range(4)]:
                act.result(30)
            live: list[object] = [it for it in dispatchers if not it.is_closed]
            assert live == [*pool.dispatchers.values()]
            pool.close()


def test_all_who_start_it_at_once_find_it_started() -> None:
    pool = pool_of(FakeProgram(0), FakeProgram(1))
    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            for act in [threads.submit(pool.start) for _ in range(4)]:
                act.result(30)
            assert [state.state for state in pool.states.values()] == [State.READY] * 2
            pool.close()


def test_a_forked_process_ends_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(FakeProgram(0), FakeProgram(1))
    pool.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        assert isinstance(pool.dispatchers[ONLY], Told)
        with pytest.raises(GserveError, match="this process was forked from the one that started the service"):
            pool.begin()
        pool.ask_to_close()
    assert [state.state for state in pool.states.values()] == [State.READY] * 2


def test_nothing_of_an_earlier_start_is_kept(dispatchers: list[Told]) -> None:
    program = FakeProgram()
    pool = pool_of(program)
    known: list[weakref.ref[Any]] = []
    for _ in range(3):
        pool.start()
        known.append(weakref.ref(pool.dispatchers[ONLY]))
        pool.close()
        program.runs.clear()
    pool.start()
    dispatchers.clear()
    gc.collect()
    assert [it() for it in known] == [None] * 3
    pool.close()


def test_a_failed_start_leaves_nothing_and_another_one_works() -> None:
    program = FakeProgram()
    program.error = OSError("no more processes")
    pool = pool_of(program)
    with pytest.raises(LaunchError, match="cannot start server-0: no more processes"):
        pool.start()
    assert not pool.dispatchers
    program.error = None
    pool.start()
    assert pool.states["server-0"].generation == 2
    pool.close()


def test_what_is_wrong_with_the_config_is_raised_as_it_is() -> None:
    program = FakeProgram(ready=False)
    pool = pool_of(program)
    starting: list[BaseException] = []

    def start() -> None:
        try:
            pool.start()
        except ConfigError as error:
            starting.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    until(lambda: program.runs)
    wrong = ConfigError("GPU 2 is requested", at="$.serve.gpu_ids")
    program.runs[0].clean_up(wrong)
    thread.join(10)
    assert starting == [wrong]


def test_signal_handlers_may_ask_and_end_it_while_the_main_thread_starts_and_ends_it() -> None:
    pool = pool_of(FakeProgram(0), FakeProgram(1))
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1
        assert len(pool.states) == 2
        if asked % 5 == 0:
            pool.close()

    began = time.monotonic()
    with on_signal(ask):
        while asked < 100 and time.monotonic() - began < 30:
            try:
                pool.start()
            except LaunchError as error:
                assert "while it started" in str(error)  # noqa: PT017
            pool.close()
    assert time.monotonic() - began < 30
    pool.close()
    assert {state.state for state in pool.states.values()} == {State.STOPPED}


def test_a_pool_can_be_told_to_end_without_waiting() -> None:
    pool = pool_of(FakeProgram())
    pool.ask_to_close()
    pool.start()
    pool.ask_to_close()
    until(lambda: pool.states["server-0"].state == State.STOPPED)


def test_a_wait_for_an_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "END_SECONDS", 0.1)
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    pool = pool_of(FakeProgram(obeys=False))
    pool.start()
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert pool.states["server-0"].state == State.FAILED


def test_a_server_of_a_pool_that_is_not_started_says_so() -> None:
    pool = pool_of(FakeProgram())
    with pytest.raises(GserveError, match="server-0 belongs to the service, which is not started"):
        pool.begin_one("server-0")
    pool.stop_one("server-0")
    pool.wait_stopped("server-0")
    pool.drain("x")


# ------------------------------------------------------------------------------------------------------------- records


def record(ready: Any, status: str) -> ServiceRecord:
    return ServiceRecord(
        name="recorded", pid=os.getpid(), started=processes.process_start(os.getpid()) or 0, transport={},
        status=status, servers=[
            records.ServerRecord(it.name, it.address, it.instance, it.token, 4, "m") for it in ready if it.usable
        ],
    )  # fmt: skip


def written() -> tuple[str, list[str]] | None:
    """Return what other processes read: the status, and the instances of the servers."""
    found = records.read_service("recorded")
    return None if found is None else (found.status, [server.instance for server in found.servers])


def deaths() -> list[str]:
    found = records.read_service("recorded")
    return [] if found is None else found.deaths


def test_a_server_that_was_told_to_end_has_not_died() -> None:
    program = FakeProgram()
    pool = pool_of(program, FakeProgram(1), record=Record("recorded", record))
    pool.start()
    program.runs[0].die("preempted", died=False)
    until(lambda: written() == ("ready", ["instance-1"]))
    assert deaths() == []
    program.runs[0].clean_up()
    pool.close()


def test_the_record_tells_other_processes_what_becomes_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "KEEP_SECONDS", 0.05)
    program = FakeProgram(ready=False)
    pool = pool_of(program, record=Record("recorded", record))
    starting = threading.Thread(target=pool.start)
    starting.start()
    until(lambda: written() == ("starting", []))
    until(lambda: program.runs)
    program.runs[0].become_ready()
    starting.join(10)
    until(lambda: written() == ("ready", ["instance-1"]))
    records.remove_service("recorded")
    until(lambda: written() == ("ready", ["instance-1"]))
    assert deaths() == []
    program.runs[0].die()
    until(lambda: written() == ("starting", []))
    assert deaths() == ["instance-1"]
    program.runs[0].clean_up(unkillable=(7,))
    until(lambda: written() == ("failed", []))
    pool.close()
    assert written() is None
    tokens.remove_token(Address(["127.0.0.1"], 1), "token")  # as the end of a server does


def test_a_name_that_is_taken_is_not_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pool_of(FakeProgram(), record=Record("recorded", record))
    first.start()
    program = FakeProgram()
    second = pool_of(program, record=Record("recorded", record))
    with pytest.raises(ConfigError, match="a service named 'recorded' is already running"):
        second.start()
    assert not program.runs
    assert written() == ("ready", ["instance-1"])
    first.close()
    second.start()
    second.drain("as requested")
    until(lambda: written() == ("draining", []))
    second.close()
    assert written() is None


def test_a_state_has_all_that_a_record_needs() -> None:
    pool = pool_of(FakeProgram())
    pool.start()
    state = pool.states["server-0"]
    assert isinstance(state, ServerState)
    assert (state.instance, state.token, state.control) == ("instance-1", "token", "control")
    pool.close()
