"""Servers without processes, for tests of what looks after servers. A test says what happens to them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gserve_core.errors import GserveError, LaunchError
from gserve_core.interfaces import Address, EngineInfo
from gserve_core.lease import Order
from gserve_core.service.state import (
    AdaptersSet,
    Ended,
    Gone,
    Listening,
    Phase,
    Published,
    Ready,
    Released,
    Report,
    ServerState,
    Start,
    State,
)


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.005)


class FakeRun:
    """One generation of a fake server: the test makes its reports."""

    def __init__(self, number: int, report: Callable[[Report], object], *, obeys: bool) -> None:
        self.start = Start(f"instance-{number}", "token", "control")
        self.report = report
        self.obeys = obeys
        self.stops: list[float | None] = []
        self.orders: list[Order] = []
        self.releases = 0
        self.finished = 0
        self.alone = False

    def become_ready(self, port: int = 1) -> None:
        self.report(Listening(Address(["127.0.0.1"], port)))
        self.report(Phase("loading"))
        self.report(Ready(EngineInfo(model="m", capacity=4)))

    def die(self, why: str = "killed by SIGKILL", *, died: bool = True) -> None:
        """Die, and leave the cleanup to `clean_up`."""
        self.report(Ended(why, died, self.finished, self.alone))

    def clean_up(self, failure: GserveError | None = None, unkillable: tuple[int, ...] = ()) -> None:
        self.report(Gone(failure or LaunchError("server-0 failed while serving: killed by SIGKILL"), unkillable))

    def stop(self, drain: float | None = None) -> None:
        self.stops.append(drain)
        if self.obeys and drain is None:
            self.report(Ended("told to"))
            self.report(Gone())

    def order(self, order: Order) -> None:
        self.orders.append(order)
        self.report(AdaptersSet(order.number, {}))

    def resume(self) -> None:
        """Do nothing: it is never paused."""

    def release(self) -> None:
        self.releases += 1
        self.report(Released())


class FakeProgram:
    """A server that can be started; `runs` are its generations."""

    def __init__(self, index: int = 0, *, ready: bool = True, obeys: bool = True) -> None:
        self.name = f"server-{index}"
        self.host = "127.0.0.1"
        self.port: int | None = None
        self.ready = ready
        self.obeys = obeys
        self.error: Exception | None = None
        self.runs: list[FakeRun] = []
        self.previous: list[object] = []
        self.logs: list[Path] = []

    @property
    def state(self) -> ServerState:
        return ServerState(name=self.name, host=self.host, port=self.port)

    def begin(self, logs: Path, report: Callable[[Report], object], previous: object) -> FakeRun:
        if self.error is not None:
            raise self.error
        run = FakeRun(len(self.runs) + 1, report, obeys=self.obeys)
        self.runs.append(run)
        self.previous.append(previous)
        self.logs.append(logs)
        if self.ready:
            run.become_ready()
        return run


class Notes:
    """Hooks of a supervisor: they note what they are told, and answer as the test says."""

    def __init__(self) -> None:
        self.states: list[ServerState] = []
        self.refusal: Exception | None = None
        self.kept = 0
        self.closed: list[float | None] = []
        self.gone: list[str] = []
        self.is_draining = self.is_over = False

    def open(self) -> Path:
        if self.refusal is not None:
            raise self.refusal
        return Path("logs")

    def changed(self, old: ServerState, new: ServerState) -> None:
        self.states.append(new)

    def removed(self, name: str) -> None:
        self.gone.append(name)

    def draining(self) -> None:
        self.is_draining = True

    def keep(self) -> None:
        self.kept += 1

    def closing(self, drain: float | None) -> None:
        self.closed.append(drain)

    def ended(self) -> None:
        self.is_over = True

    def seen(self, name: str = "server-0") -> list[State]:
        """Return the states that a server went through."""
        found: list[State] = []
        for state in list(self.states):
            if state.name == name and (not found or found[-1] != state.state):
                found.append(state.state)
        return found


def published(*programs: FakeProgram) -> Published:
    return Published(program.state for program in programs)
