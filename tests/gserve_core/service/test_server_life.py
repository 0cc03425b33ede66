"""One generation of a server, with a launcher that starts nothing: what it reports, and what it does to the process."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gserve import LaunchError, LLMConfig, ServeConfig
from gserve_core import lease
from gserve_core.config import Config
from gserve_core.engines.echo import EchoEngine
from gserve_core.interfaces import Address, EngineInfo, Job, Launcher, Process
from gserve_core.plugins import assemble
from gserve_core.service import server_life as module
from gserve_core.service.nursery import Nursery
from gserve_core.service.server_life import ServerProgram, ServerRun
from gserve_core.service.state import Ended, Gone, Logging, Queued, Ready, Released
from tests.gserve_core.fake_servers import until


class NoProcess:
    """What a launcher hands out: the test is the server at the other end of its pipes. Implements `Process`."""

    def __init__(self) -> None:
        down, up = os.pipe(), os.pipe()
        self.stdin = os.fdopen(down[1], "wb", 0)
        self.stdout = os.fdopen(up[0], "rb", 0)
        self._down = os.fdopen(down[0], "rb", 0)
        self._up = os.fdopen(up[1], "wb", 0)
        os.set_blocking(self._down.fileno(), False)
        self._said = b""
        self.code: int | None = None
        self.reason: str | None = None
        self.queue: str | None = None
        self.stops: list[float] = []
        self.may_stop = threading.Event()
        self.may_stop.set()

    def say(self, *messages: lease.Up) -> None:
        self._up.write(b"".join(map(lease.encode, messages)))

    def become_ready(self) -> None:
        self.say(lease.Listening(Address(["127.0.0.1"], 4321)), lease.Ready(EngineInfo(model="m")))

    def end(self, code: int = -9) -> None:
        self.code = code
        self._up.close()

    def heard(self) -> bytes:
        self._said += self._down.read() or b""
        return self._said

    def poll(self) -> int | None:
        return self.code

    def stop(self, grace: float) -> int:
        self.may_stop.wait(20)
        self.stops.append(grace)
        if self.code is None:
            self.end()
        self.stdin.close()
        return self.code or 0

    def waiting(self) -> str | None:
        return self.queue

    def why(self) -> str | None:
        return self.reason

    def close(self) -> None:
        for stream in (self.stdin, self.stdout, self._down, self._up):
            stream.close()


@dataclass(frozen=True, kw_only=True)
class NoLauncher(Launcher):
    name: ClassVar[str] = "no-launcher"
    process: Any = field(default_factory=NoProcess)
    error: Exception | None = None
    hold: Any = field(default_factory=threading.Event)
    released: list[Any] = field(default_factory=list)

    def launch(self, job: Job) -> Process:
        self.hold.wait(20)
        if self.error is not None:
            raise self.error
        return self.process  # type: ignore[no-any-return]

    def release(self, process: Process) -> None:
        self.released.append(process)


@dataclass(frozen=True, kw_only=True)
class Elsewhere(NoLauncher):
    name: ClassVar[str] = "elsewhere"
    owner_variable: ClassVar[str | None] = "SOMEWHERE"


class Case:
    """A server that runs, and what it has reported."""

    def __init__(self, launcher: NoLauncher, folder: Path, **serve: Any) -> None:
        self.launcher = launcher
        self.process: NoProcess = launcher.process
        self.reports: list[Any] = []
        llm = LLMConfig("m")
        program = ServerProgram(
            llm=llm, serve=ServeConfig(**serve), gpu_ids=None, nursery=Nursery(),
            parts=assemble(Config(llm), launcher=launcher, engine=EchoEngine()),
        )  # fmt: skip
        self.run: ServerRun = program.begin(folder / "logs", self.reports.append, None)

    def of(self, kind: type[Any]) -> list[Any]:
        return [report for report in list(self.reports) if isinstance(report, kind)]

    def wait(self, kind: type[Any]) -> Any:
        until(lambda: self.of(kind), 20)
        return self.of(kind)[0]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Case]]:
    """Return a function that begins a generation; see it end."""
    cases: list[Case] = []

    def start(launcher: NoLauncher | None = None, *, launched: bool = True, **serve: Any) -> Case:
        case = Case(launcher or NoLauncher(), tmp_path, **serve)
        cases.append(case)
        if launched:
            case.launcher.hold.set()
        return case

    yield start
    for case in cases:
        case.launcher.hold.set()
        case.process.may_stop.set()
        case.run.stop()
        case.wait(Gone)
        case.process.close()


def test_a_death_is_reported_before_the_cleanup(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.wait(Ready)
    case.process.may_stop.clear()
    case.process.end()
    assert case.wait(Ended).died
    assert not case.of(Gone)
    case.process.may_stop.set()
    gone = case.wait(Gone)
    assert "killed by SIGKILL" in str(gone.failure)
    assert case.wait(Logging).log.exists()


def test_a_death_is_reported_with_what_the_server_last_said_of_its_work(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.process.say(lease.Pulse(), lease.Pulse(7), lease.Pulse(9, alone=True))
    case.process.end()
    ended = case.wait(Ended)
    assert (ended.died, ended.finished, ended.alone) == (True, 9, True)


def test_one_that_says_that_it_stops_has_not_died(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.process.say(lease.Stopped())
    case.process.end(0)
    assert not case.wait(Ended).died
    assert case.wait(Gone).failure is not None, "nobody has told it to"


def test_one_that_hangs_is_killed_and_has_died(begin: Callable[..., Case]) -> None:
    case = begin(stall_timeout=0.3)
    case.process.become_ready()
    ended = case.wait(Ended)
    assert ended.died
    assert "it hangs" in ended.why
    case.wait(Gone)
    assert case.process.stops[0] == 0.0


def test_one_that_has_failed_and_does_not_end_is_killed_and_has_died(
    begin: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    case = begin(stall_timeout=None)
    case.process.become_ready()
    case.process.say(lease.Failed("the engine hangs"))
    ended = case.wait(Ended)
    assert ended.died
    assert "the engine hangs" in str(case.wait(Gone).failure)
    assert case.process.stops == [0.0]


def test_a_start_without_progress_is_no_death_of_items(begin: Callable[..., Case]) -> None:
    case = begin(startup_timeout=0.3)
    assert not case.wait(Ended).died
    assert "no progress for 0.3 s" in str(case.wait(Gone).failure)


@pytest.mark.parametrize(
    ("reason", "died"),
    [
        ("SLURM reports PREEMPTED for its job 4: another job preempted it", False),
        ("SLURM reports NODE_FAIL for its job 4: its node failed", False),
        ("SLURM reports TIMEOUT for its job 4: its time limit was reached (time)", False),
        ("SLURM reports OUT_OF_MEMORY for its job 4: it needed more memory than it had requested (mem)", True),
        (None, True),
    ],
)
def test_what_a_scheduler_has_ended_has_not_died(
    begin: Callable[..., Case], reason: str | None, died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "127.0.0.1")
    case = begin(Elsewhere())
    case.process.become_ready()
    case.process.reason = reason
    case.process.end()
    assert case.wait(Ended).died is died
    assert reason is None or reason in str(case.wait(Gone).failure)


def test_one_that_is_silent_since_its_scheduler_has_suspended_it_has_not_died(
    begin: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "127.0.0.1")
    case = begin(Elsewhere(), stall_timeout=0.3)
    case.process.reason = "SLURM reports SUSPENDED for its job 4: it was suspended"
    case.process.become_ready()
    ended = case.wait(Ended)
    assert (ended.died, ended.why) == (False, case.process.reason)
    assert case.process.reason in str(case.wait(Gone).failure)


def test_one_that_is_told_to_stop_has_neither_died_nor_failed(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.wait(Ready)
    case.run.stop()
    until(lambda: b'"type":"stop"' in case.process.heard())
    assert case.launcher.released == [case.process]
    case.process.say(lease.Stopped())
    case.process.end(0)
    assert not case.wait(Ended).died
    assert case.wait(Gone).failure is None


def test_one_that_may_finish_what_it_has_is_told_so_and_stopped_after_that_time(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.wait(Ready)
    began = time.monotonic()
    case.run.stop(0.5)
    until(lambda: b'"type":"stop"' in case.process.heard())
    assert time.monotonic() - began >= 0.5
    drained, _, _ = case.process.heard().partition(b'"type":"stop"')
    assert b'{"type":"drain","seconds":0.5}' in drained
    case.process.end(0)
    assert case.wait(Gone).failure is None


def test_one_that_does_not_stop_is_killed(begin: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    case = begin()
    case.process.become_ready()
    case.wait(Ready)
    case.run.stop()
    assert not case.wait(Ended).died
    case.wait(Gone)
    assert case.process.stops == [0.0]


def test_a_stop_during_the_launch_ends_what_comes_of_it(begin: Callable[..., Case]) -> None:
    case = begin(launched=False)
    until(lambda: case.of(Logging))
    case.process.queue = "waiting for SLURM's answer"
    case.run.stop()
    assert not case.of(Gone), "the launcher cannot be interrupted"
    case.launcher.hold.set()
    assert case.wait(Gone).failure is None
    assert case.process.stops


@pytest.mark.parametrize(("launcher", "has_limits"), [(NoLauncher, True), (Elsewhere, False)])
def test_limits_of_the_owner_are_those_of_servers_on_its_machine_only(
    begin: Callable[..., Case], launcher: type[NoLauncher], has_limits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "127.0.0.1")
    case = begin(launcher())
    until(lambda: b"\n" in case.process.heard())
    (hello,) = lease.decode(case.process.heard().splitlines()[:1])
    assert isinstance(hello, lease.Hello)
    assert bool(hello.limits) is (hello.umask is not None) is has_limits


def test_a_launch_that_fails_is_told(begin: Callable[..., Case]) -> None:
    for error in (LaunchError("no such program"), OSError("no more processes")):
        case = begin(NoLauncher(error=error))
        assert str(error) in str(case.wait(Gone).failure)
        assert isinstance(case.wait(Gone).failure, LaunchError)


def test_what_it_waits_for_is_told(begin: Callable[..., Case]) -> None:
    launcher = NoLauncher()
    launcher.process.queue = "the queue: Priority"
    case = begin(launcher, startup_timeout=0.5)
    assert case.wait(Queued).phase == "the queue: Priority"


def test_release_ends_what_the_launcher_keeps(begin: Callable[..., Case]) -> None:
    case = begin()
    case.process.become_ready()
    case.process.end()
    case.wait(Gone)
    case.run.release()
    case.wait(Released)
    assert case.launcher.released == [case.process]
    assert len(case.process.stops) == 2
