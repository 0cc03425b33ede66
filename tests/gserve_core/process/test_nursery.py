"""The nursery: what it forks is a server like any other, and its own end costs nothing."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve import LLMConfig, ServeConfig, StartupTimeout, VLLMServer, VLLMService
from gserve_core import lease
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes, scratch
from gserve_core.host.logs import flush
from gserve_core.service.server_command import PROGRAM
from gserve_core.service.state import State
from gserve_launchers.local import SubprocessLauncher

LLM = LLMConfig("m")

PRELOADING = """
import os, signal, time
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class Preloading(EchoEngine):
    name: ClassVar[str] = "preloading"
    fault: str = ""

    def preload(self):
        print("preloading")
        if self.fault == "slow":
            time.sleep(600)
        elif self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "stopped":
            os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif self.fault == "wrong":
            raise RuntimeError("no such library")

@hookimpl
def gserve_register_engines():
    return [Preloading]
"""


def preloading(folder: Path, fault: str, serve: str = "{servers: 2}") -> VLLMService:
    (folder / "preloading.py").write_text(PRELOADING)
    (folder / "c.yaml").write_text(
        f"llm: {{model_name: m}}\nserve: {serve}\nplugins: [preloading]\nengine: {{type: preloading, fault: {fault}}}\n"
    )
    return VLLMService.from_yaml(folder / "c.yaml")


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def nurseries(of: int | None = None) -> list[psutil.Process]:
    """Return the nurseries of a process, by default of this one."""
    found = []
    for child in psutil.Process(of).children():
        command = child.cmdline()
        if "nursery" in command or "--forks" in command:
            found.append(child)
    return found


def server_process(server: VLLMServer) -> psutil.Process:
    """Return the process of a ready server."""
    below = [psutil.Process(pid) for pid in processes.processes_of(server.record().instance)]
    (found,) = [process for process in below if "--lease" in process.cmdline()]
    return found


def is_gone(process: psutil.Process) -> bool:
    """Say whether a process has ended; who has to reap it may not have done so yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def service() -> Iterator[VLLMService]:
    with VLLMService(LLM, ServeConfig(gpu_ids=[0, 1]), engine=EchoEngine()) as started:
        yield started


def test_all_servers_of_a_service_are_forked_from_one_nursery_which_ends_with_it() -> None:
    with VLLMService(LLM, ServeConfig(servers=3), engine=EchoEngine()) as service:
        (nursery,) = nurseries()
        assert {server_process(server).ppid() for server in service.servers} == {nursery.pid}
        assert service.generate(["a", "b"]) == [["a"], ["b"]]
    assert not nurseries()
    service.start()
    (another,) = nurseries()
    assert another.pid != nursery.pid
    service.shutdown()


def test_a_forked_server_has_a_session_an_environment_a_log_and_a_command_of_its_own(service: VLLMService) -> None:
    servers = [server_process(server) for server in service.servers]
    assert [os.getsid(process.pid) for process in servers] == [process.pid for process in servers]
    for index, (server, process) in enumerate(zip(service.servers, servers, strict=True)):
        assert process.cmdline()[1].endswith("vllm_server.py")
        assert "--forks" not in process.cmdline()
        assert process.environ()[processes.ID_VARIABLE] == server.record().instance
        log = service.status()[index].log
        assert log is not None
        assert f"listening on 127.0.0.1:{server.port}" in log.read_text()


def test_a_forked_server_inherits_no_line_of_another(service: VLLMService) -> None:
    def sockets_and_pipes(process: psutil.Process) -> set[str]:
        targets = {str(entry.readlink()) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
        return {target for target in targets if target.startswith(("socket:", "pipe:"))}

    first, second = (server_process(server) for server in service.servers)
    assert not sockets_and_pipes(first) & sockets_and_pipes(second)
    assert not sockets_and_pipes(first) & sockets_and_pipes(nurseries()[0])


def test_a_server_that_is_killed_is_forked_again_and_its_end_is_named(
    service: VLLMService, caplog: pytest.LogCaptureFixture
) -> None:
    (nursery,) = nurseries()
    server_process(service.servers[0]).kill()
    until(lambda: service.status()[0].restarts == 1 and service.status()[0].state == State.READY)
    flush()
    assert "its process was killed by SIGKILL" in caplog.text
    assert server_process(service.servers[0]).ppid() == nursery.pid
    assert service.generate(["a", "b", "c"]) == [["a"], ["b"], ["c"]]


def test_the_death_of_the_nursery_costs_nothing(service: VLLMService, caplog: pytest.LogCaptureFixture) -> None:
    before = [server.record() for server in service.servers]
    (nursery,) = nurseries()
    nursery.kill()
    assert service.generate([f"{index}" for index in range(100)]) == [[f"{index}"] for index in range(100)]
    assert [server.record() for server in service.servers] == before
    server_process(service.servers[0]).kill()
    until(lambda: service.status()[0].restarts == 1 and service.status()[0].state == State.READY)
    flush()
    assert "its process has ended, and the nursery that forked it did not report the exit code" in caplog.text
    (another,) = nurseries()
    assert server_process(service.servers[0]).ppid() == another.pid
    assert service.servers[1].record() == before[1]


def test_a_nursery_that_dies_while_it_imports_leaves_servers_that_are_started_plainly(tmp_path: Path) -> None:
    with preloading(tmp_path, "killed") as service:
        assert {server_process(server).ppid() for server in service.servers} == {os.getpid()}
        assert service.generate(["a", "b"]) == [["a"], ["b"]]


def test_what_fails_to_be_imported_stops_no_server(tmp_path: Path) -> None:
    with preloading(tmp_path, "wrong") as service:
        assert service.generate(["a"]) == [["a"]]
        log = service.status()[0].log
        assert log is not None
        assert "no such library" in log.with_name("nursery.log").read_text()


def test_a_nursery_that_hangs_is_done_without(service: VLLMService) -> None:
    (nursery,) = nurseries()
    nursery.suspend()
    try:
        server_process(service.servers[0]).kill()
        until(lambda: service.status()[0].restarts == 1 and service.status()[0].state == State.READY, 60)
        assert server_process(service.servers[0]).ppid() == os.getpid()
    finally:
        nursery.kill()


def test_a_start_is_cancelled_while_the_nursery_imports(tmp_path: Path) -> None:
    service = preloading(tmp_path, "slow")
    failed: list[BaseException] = []

    def start() -> None:
        try:
            service.start()
        except BaseException as error:
            failed.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    until(lambda: service.status()[0].phase == "importing modules, once for all servers")
    until(nurseries)
    service.shutdown()
    starting.join(60)
    assert not starting.is_alive()
    assert len(failed) == 1
    assert not nurseries()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_nursery_that_imports_ends_with_its_owner(tmp_path: Path, number: int) -> None:
    preloading(tmp_path, "slow")
    script = "from gserve import VLLMService; VLLMService.from_yaml('c.yaml').start()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL) as owner:
        until(lambda: nurseries(owner.pid))
        (nursery,) = nurseries(owner.pid)
        until(lambda: nursery.num_threads() == 2)  # the second one waits for the end of the owner
        owner.send_signal(number)
    until(lambda: is_gone(nursery))


def test_a_fork_of_the_owner_keeps_no_nursery_alive() -> None:
    script = """
        import os, time
        from gserve import VLLMService, LLMConfig
        from gserve_core.engines.echo import EchoEngine
        VLLMService(LLMConfig("m"), engine=EchoEngine()).start()
        if (child := os.fork()) == 0:
            time.sleep(600)
        print(child, flush=True)
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        (nursery,) = nurseries(owner.pid)
        owner.kill()
        until(lambda: is_gone(nursery))
        assert child.is_running()
        child.kill()


def test_a_launcher_without_a_nursery_starts_each_server_as_a_program() -> None:
    launcher = SubprocessLauncher(nursery=False)
    with VLLMService(LLM, ServeConfig(servers=2), engine=EchoEngine(), launcher=launcher) as service:
        assert not nurseries()
        assert {server_process(server).ppid() for server in service.servers} == {os.getpid()}


def test_a_server_alone_has_a_nursery_until_it_is_shut_down() -> None:
    with VLLMServer(LLM, engine=EchoEngine()) as server:
        (nursery,) = nurseries()
        server_process(server).kill()
        until(lambda: server.status().state == State.FAILED)
        server.start()
        assert server_process(server).ppid() == nursery.pid
    assert not nurseries()


# -------------------------------------------------------------------------------------------------- in a server's place


class Place:
    """A nursery in a server's place, seen by its owner, who speaks the lease with it."""

    def __init__(self, *options: str) -> None:
        words = ["--serve", "--model", "m", "--port", "0", *options, "--again", "--lease"]
        command = [sys.executable, str(PROGRAM), *words]
        env = os.environ | {processes.ID_VARIABLE: uuid.uuid4().hex}
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        self._lines = lease.Lines(self.process.stdout.fileno())
        self.instance = ""
        self.ttl: float | None = None

    def say(self, message: lease.Down) -> None:
        self.stdin.write(lease.encode(message))

    def hear(self, awaited: str) -> str:
        """Return the first line that begins so."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.say(lease.Beat())
            lines = self._lines.read(0.1)
            assert lines is not None, f"it has ended with {self.process.wait()}, and '{awaited}' was awaited"
            for line in lines:
                if line.startswith(awaited.encode()):
                    return line.decode()
        raise AssertionError(f"not said: {awaited}")

    def begin(self) -> psutil.Process:
        """Have a server begin; return its process once it is ready."""
        self.instance = uuid.uuid4().hex
        self.say(lease.Hello(self.instance, "a-token-of-a-test", ttl=self.ttl))
        self.hear('{"type":"ready"')
        below = [psutil.Process(pid) for pid in processes.processes_of(self.instance)]
        (server,) = [process for process in below if process.cmdline()[-1:] == ["--lease"]]
        assert server.ppid() == self.process.pid
        return server

    def ended(self) -> int:
        """Return the exit code that is told of the server that has died; nothing of it may be left then."""
        line = self.hear("ended ")
        assert not processes.processes_of(self.instance)
        assert not scratch.path_of(self.instance).exists()
        _, instance, code = line.split()
        assert instance == self.instance
        return int(code)


@pytest.fixture
def place() -> Iterator[Place]:
    one = Place("--engine", '{"type":"echo","processes":2}')
    yield one
    one.process.kill()
    one.process.wait()
    one.stdin.close()
    assert one.process.stdout is not None
    one.process.stdout.close()
    until(lambda: not processes.processes_of(one.instance))


def test_a_server_is_forked_again_in_its_place_as_often_as_it_dies(place: Place) -> None:
    place.stdin.write(b"a greeting\n{}\n")
    forked = set()
    for _ in range(3):
        server = place.begin()
        assert os.getsid(server.pid) == server.pid
        assert server.environ()[processes.ID_VARIABLE] == place.instance
        forked.add(server.pid)
        server.kill()
        assert place.ended() == -signal.SIGKILL
    assert len(forked) == 3


def test_a_server_whose_engine_dies_leaves_its_place_too(place: Place) -> None:
    (engine,) = [child for child in place.begin().children() if "engine" in child.cmdline()]
    engine.kill()
    assert place.ended() == 1
    place.begin()


def test_a_server_that_hangs_is_ended_where_its_owner_says_so(place: Place) -> None:
    place.begin().suspend()
    place.stdin.write(b"end\n")
    assert place.ended() == -signal.SIGKILL
    place.begin()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("both", [False, True], ids=["alone", "with its server"])
def test_a_signal_ends_the_place_with_its_server_in_order(place: Place, number: int, both: bool) -> None:
    server = place.begin()
    if both:
        server.send_signal(number)
    place.process.send_signal(number)
    place.hear('{"type":"stopped"')
    assert place.process.wait(60) == 0


def test_a_server_that_ends_in_order_ends_its_place(place: Place) -> None:
    place.begin()
    place.say(lease.Stop())
    place.hear('{"type":"stopped"')
    assert place.process.wait(60) == 0


@pytest.mark.parametrize("state", ["serving", "stopped", "dead", "not begun"])
def test_a_place_ends_with_its_owner(place: Place, state: str) -> None:
    if state != "not begun":
        server = place.begin()
        if state == "stopped":
            server.suspend()
        elif state == "dead":
            server.kill()
            place.ended()
    place.stdin.close()
    assert place.process.wait(30) == {"serving": 0, "not begun": 0}.get(state, 128 + signal.SIGKILL)


def test_a_signal_between_two_lives_ends_the_place(place: Place) -> None:
    place.begin().kill()
    place.ended()
    place.process.terminate()
    assert place.process.wait(60) == 128 + signal.SIGKILL, "as the last server has ended"


def test_a_server_ends_when_its_place_is_killed(place: Place) -> None:
    place.begin()
    place.process.kill()
    until(lambda: not processes.processes_of(place.instance))


def test_a_place_that_imports_ends_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "preloading.py").write_text(PRELOADING)
    engine = '{"type":"preloading","fault":"slow"}'
    place = Place("--engine", engine, "--plugins", "preloading", "--plugin_folder", str(tmp_path))
    with contextlib.closing(place.stdin):
        place.hear('{"type":"phase","text":"importing')
        nursery = psutil.Process(place.process.pid)
        until(lambda: nursery.num_threads() == 2)  # the second one waits for the end of the owner
    assert place.process.wait(60) == 0
    assert place.process.stdout is not None
    place.process.stdout.close()


# --------------------------------------------------------------------------------------------- starts that do not move


def not_moving(folder: Path, fault: str, startup_timeout: float) -> VLLMService:
    """Return a service whose nursery hangs while it imports, or whose forks are stopped before they say a word."""
    return preloading(folder, fault, f"{{servers: 2, startup_timeout: {startup_timeout}}}")


@pytest.mark.parametrize("fault", ["slow", "stopped"])
def test_a_start_that_shows_no_progress_ends_in_time_whatever_stands_still(tmp_path: Path, fault: str) -> None:
    service = not_moving(tmp_path, fault, 6.0)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    began = time.monotonic()
    with pytest.raises(StartupTimeout, match=r"no progress for 6 s \(startup_timeout\) while importing"):
        service.start()
    assert time.monotonic() - began < 40
    assert not {child.pid for child in psutil.Process().children(recursive=True)} - before


@pytest.mark.parametrize("fault", ["slow", "stopped"])
def test_a_start_that_shows_no_progress_can_be_shut_down(tmp_path: Path, fault: str) -> None:
    service = not_moving(tmp_path, fault, 600.0)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    failed: list[BaseException] = []

    def start() -> None:
        try:
            service.start()
        except BaseException as error:
            failed.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    until(nurseries)
    if fault == "stopped":
        until(lambda: [it for it in psutil.Process().children(recursive=True) if it.status() == psutil.STATUS_STOPPED])
    service.shutdown()
    starting.join(30)
    assert not starting.is_alive()
    assert failed
    assert not {child.pid for child in psutil.Process().children(recursive=True)} - before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_to_all_processes_of_a_job_ends_no_nursery(place: Place, number: int) -> None:
    server = place.begin()
    for process in (place.process, server):
        process.send_signal(number)
    place.stdin.write(b"end\n")
    assert place.ended() == -signal.SIGKILL
    place.begin()


def test_a_place_that_was_stopped_with_its_server_keeps_it(place: Place) -> None:
    place.ttl = 6.0  # up to 3 s count by the first second after the stop
    server = place.begin()
    for process in (place.process, server):
        process.send_signal(signal.SIGSTOP)
    time.sleep(7.0)
    for process in (place.process, server):
        process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert server.is_running()
    place.say(lease.Stop())
    place.hear('{"type":"stopped"')
    assert place.process.wait(20) == 0
