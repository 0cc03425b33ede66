"""`VLLMService`: its life, what is left of it, and services that other processes use."""

import gc
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gserve import (
    BatchError,
    ConfigError,
    GserveError,
    ItemError,
    ItemLost,
    Job,
    LaunchError,
    LLMConfig,
    ServeConfig,
    VLLMService,
)
from gserve_core.batch.items import Seeds
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import gpu_locks, processes, run_files
from gserve_core.interfaces import Process
from gserve_core.service import records
from gserve_core.service.state import State
from gserve_core.testing import our_processes
from gserve_launchers.local import SubprocessLauncher

LLM = LLMConfig("m")
TWO = ServeConfig(servers=2)

FLAKY = """
import os
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class OneFails(EchoEngine):
    '''Loads for a minute, but for the server that comes second to the marker file, which fails.'''

    name: ClassVar[str] = "one-fails"
    marker: str

    async def start(self, llm, report):
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise RuntimeError("the second one fails") from None
        report("loading for long")
        import asyncio
        await asyncio.sleep(60)

@hookimpl
def gserve_register_engines():
    return [OneFails]
"""


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def new_processes(before: dict[int, str]) -> dict[int, str]:
    return {pid: command for pid, command in our_processes().items() if pid not in before}


def python(text: str, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=60, check=False, **more
    )


@pytest.fixture(scope="module")
def named() -> Iterator[VLLMService]:
    with VLLMService(LLM, TWO, engine=EchoEngine(), name="the-service") as service:
        yield service


def test_a_started_service_runs_all_its_servers(named: VLLMService) -> None:
    assert named.is_running()
    assert [status.state for status in named.status()] == [State.READY] * 2
    assert len({server.port for server in named.servers}) == 2
    named.start()
    assert named.generate(["a", "b"]) == [["a"], ["b"]]


ATTACHED = """
import sys
from gserve import VLLMService
with VLLMService.attach(*sys.argv[1:]) as service:
    print(service.generate(["from afar"]), [str(it.state) for it in service.status()], service.is_running())
    print(len(service.servers))
"""


def test_another_process_uses_a_named_service_and_leaves_it_running(named: VLLMService) -> None:
    for arguments, environ in ((["the-service"], {}), ([], {"GSERVE_ATTACH": "the-service"})):
        ended = python(ATTACHED, *arguments, env={**os.environ, **environ})
        assert ended.stdout == "[['from afar']] ['ready', 'ready'] True\n0\n", ended.stderr
    assert named.is_running()
    assert named.generate(["a"]) == [["a"]]


def test_a_service_one_that_is_attached_and_a_client_sample_as_the_seed_of_the_model_says() -> None:
    seeds = Seeds(42)
    calls = [seeds.of_next_call(), seeds.of_next_call()]
    expected = [[[f"a seed-{seed(0)}"], [f"b seed-{seed(1)}"]] for seed in calls if seed is not None]
    with (
        VLLMService(LLMConfig("m", seed=42), engine=EchoEngine(sample=True), name="seeded") as service,
        VLLMService.attach("seeded") as attached,
        service.servers[0].client() as client,
        service.servers[0].client() as another,
    ):
        for first, second in ((service, service), (attached, attached), (client, another)):
            assert [first.generate(["a", "b"]), second.generate(["a", "b"])] == expected


def test_the_record_of_a_service_is_of_the_user_alone(named: VLLMService) -> None:
    file = run_files.folder() / "service-the-service"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert records.find_service("the-service").pid == os.getpid()


def test_a_service_that_is_not_there_is_told_with_the_nearest_name(named: VLLMService) -> None:
    with pytest.raises(ConfigError, match="no service named 'the-servise' is running here; did you mean 'the-service'"):
        VLLMService.attach("the-servise")
    with pytest.raises(GserveError, match="GSERVE_ATTACH is not set"):
        VLLMService.attach()


CLASHING = """
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
VLLMService(LLMConfig("m"), engine=EchoEngine(), name="the-service").start()
"""


def test_a_name_is_taken_once(named: VLLMService) -> None:
    with pytest.raises(ConfigError, match="a service named 'the-service' is already running"):
        VLLMService(LLM, engine=EchoEngine(), name="the-service").start()
    ended = python(CLASHING)
    assert ended.returncode == 1
    assert f"a service named 'the-service' is already running (process {os.getpid()})" in ended.stderr
    assert records.find_service("the-service").pid == os.getpid()


@pytest.mark.parametrize("name", ["../up", "a/b", "", " ", "a" * 65, "é", "a\n"])
def test_a_name_that_cannot_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name of at most 64 letters"):
        VLLMService(LLM, engine=EchoEngine(), name=name).start()


def test_a_service_lives_again_after_shutdown() -> None:
    service = VLLMService(LLM, engine=EchoEngine(), name="again")
    with pytest.raises(GserveError, match="the service is not running: call start"):
        service.generate(["a"])
    service.shutdown()
    for _ in range(2):
        with service:
            assert service.generate(["a"]) == [["a"]]
        assert not service.is_running()
        assert not (run_files.folder() / "service-again").exists()
        with pytest.raises(GserveError, match="the service is not running"):
            service.generate(["a"])
    service.shutdown()


def test_one_server_that_fails_fails_the_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = our_processes()
    (tmp_path / "flaky.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = import_module("flaky").OneFails(marker=str(tmp_path / "marker"))
    service = VLLMService(LLM, TWO, engine=engine, plugins=["flaky"])
    began = time.monotonic()
    with pytest.raises(LaunchError, match="the second one fails") as caught:
        service.start()
    assert time.monotonic() - began < 30
    assert "last lines of the log" in str(caught.value)
    assert not service.is_running()
    assert not new_processes(before)


def test_all_servers_that_fail_tell_why() -> None:
    before = our_processes()
    with pytest.raises(LaunchError, match="boom"):
        VLLMService(LLM, TWO, engine=EchoEngine(fail_start="boom"), name="failing").start()
    assert not new_processes(before)
    with pytest.raises(ConfigError, match="no service named 'failing'"):
        records.find_service("failing")


YAML = """
llm: {model_name: m}
serve: {servers: 1, host: localhost}
engine: {type: echo, latency: 0.001}
"""


def test_a_service_from_yaml_takes_overrides(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    service = VLLMService.from_yaml(file, overrides=["serve.servers=2", "llm.max_model_len=4"])
    assert len(service.jobs()) == 2
    with service:
        first, second = service.generate(["a b", "a b c d e"], on_error="return")
        assert first == ["a b"]
        assert "leaves no room" in str(second)
    file.write_text(YAML.replace("latency", "latenzy"))
    with pytest.raises(ConfigError, match=re.escape(f"{file}:4: unknown key 'latenzy'; did you mean 'latency'?")):
        VLLMService.from_yaml(file)


def test_jobs_show_the_commands_and_start_nothing() -> None:
    before = our_processes()
    llm = LLMConfig("m", llm_kwargs={"hf_token": "canary"})
    service = VLLMService(llm, ServeConfig([0, 1], port=4000), engine=EchoEngine(latency=0.5))
    jobs = service.jobs()
    assert [job.env["CUDA_VISIBLE_DEVICES"] for job, _ in jobs] == ["0", "1"]
    for index, (job, command) in enumerate(jobs):
        assert command == list(job.command)
        assert command[:2] == [sys.executable, str(Path(__file__).parents[3] / "gserve" / "vllm_server.py")]
        assert command[command.index("--port") + 1] == str(4000 + index)
        assert '"latency":0.5' in command[command.index("--engine") + 1]
        assert "canary" not in " ".join(command)
    assert not new_processes(before)


SCRIPT = """
import os, sys, time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
service = VLLMService(LLMConfig("m"), ServeConfig(servers=2), engine=EchoEngine(latency=0.01), name="scripted")
service.start()
pending = service.generate_iter(["a " * 1000] * 50, {"max_tokens": 1000})
import threading
threading.Thread(target=lambda: list(pending), daemon=True).start()
time.sleep(0.2)
print("started", flush=True)
END
"""
SCRIPT_ENDS = {
    "the end of the script": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise RuntimeError('unhandled')", 1),
    "os._exit": ("os._exit(4)", 4),
    "kill -9": ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "SIGTERM": ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
}


@pytest.mark.parametrize("end", SCRIPT_ENDS)
def test_nothing_is_left_of_a_service_whose_script_ends_without_shutdown(end: str) -> None:
    before, files = our_processes(), set(run_files.folder().iterdir())
    line, code = SCRIPT_ENDS[end]
    ended = python(SCRIPT.replace("END", line))
    assert (ended.stdout, ended.returncode) == ("started\n", code), ended.stderr
    until(lambda: not new_processes(before))
    with pytest.raises(ConfigError, match="no service named 'scripted'"):
        records.find_service("scripted")
    assert set(run_files.folder().iterdir()) == files


def test_shutdown_during_a_call_ends_the_call_with_what_it_has() -> None:
    with VLLMService(LLM, engine=EchoEngine(latency=0.5)) as service:
        errors: list[BatchError] = []

        def call() -> None:
            try:
                service.generate(["a", "a " * 100], {"max_tokens": 100})
            except BatchError as error:
                errors.append(error)

        calling = threading.Thread(target=call)
        calling.start()
        until(lambda: service.status()[0].counters.items)  # the first one is told at once
        time.sleep(1.5)  # its answer comes on another way
        service.shutdown()
        calling.join(60)
        assert not calling.is_alive()
    assert errors[0].results[0] == ["a"]
    assert "the service was closed" in str(errors[0].results[1])


ON_GPUS = """
import asyncio, os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class OnGpus(EchoEngine):
    '''Like echo, but servers with it must not share a GPU. They start together with those in the folder `meet`.'''

    name: ClassVar[str] = "on-gpus"
    uses_gpus: ClassVar[bool] = True
    api_key: str = ""
    meet: str = ""

    def starts_alone(self, llm):
        return not self.meet

    async def start(self, llm, report):
        if self.meet:
            (Path(self.meet) / str(os.getpid())).touch()
            while len(os.listdir(self.meet)) < 2:
                await asyncio.sleep(0.05)
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [OnGpus]
"""


FIRST_GPU = 10 * os.getpid()
"""GPUs that nobody else on this machine has, another run of these tests neither."""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the ids of four GPUs, on a machine that does not know how many it has."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ids = [FIRST_GPU + number for number in range(4)]
    yield ids
    for gpu in ids:
        for file in gpu_locks.FOLDER.glob(f"gserve-gpu-{gpu}.*"):
            file.unlink()


def on_gpus(folder: Path, *overrides: str) -> VLLMService:
    (folder / "on_gpus.py").write_text(ON_GPUS)
    (folder / "c.yaml").write_text(
        f"llm: {{model_name: m}}\nserve: {{gpu_ids: [{FIRST_GPU}, {FIRST_GPU + 1}]}}\nplugins: [on_gpus]\n"
        "engine: {type: on-gpus}\n"
    )
    return VLLMService.from_yaml(folder / "c.yaml", overrides=overrides)


def test_a_gpu_has_one_owner_and_the_second_is_told_who(tmp_path: Path, gpus: list[int]) -> None:
    with on_gpus(tmp_path) as first:
        holders = {pid for server in first.servers for pid in processes.processes_of(server.record().instance)}
        began = time.monotonic()
        with pytest.raises(LaunchError, match=rf"GPU {gpus[1]} is held by process \d+") as caught:
            on_gpus(tmp_path, f"serve.gpu_ids={gpus[1:3]}").start()
        assert time.monotonic() - began < 30
        named = re.search(r"held by process (\d+)", str(caught.value))
        assert named
        assert int(named[1]) in holders
        os.kill(int(named[1]), signal.SIGKILL)
        until(lambda: first.status()[1].restarts == 1 and first.status()[1].state == State.READY)
    with on_gpus(tmp_path) as again:
        assert again.generate(["free again"]) == [["free again"]]


def test_several_servers_of_a_service_share_a_gpu(tmp_path: Path, gpus: list[int]) -> None:
    one, other, *_ = gpus
    ids = f"serve.gpu_ids=[{one}, {one}, {other}]"
    with on_gpus(tmp_path, "serve.share_gpu=true", ids, "engine.load_time=0.5") as service:
        assert [server.gpu_ids for server in service.status()] == [(one,), (one,), (other,)]
        assert len({server.port for server in service.status()}) == 3
        assert service.generate([str(item) for item in range(600)]) == [[str(item)] for item in range(600)]


def test_each_gpu_has_several_servers_and_no_others(tmp_path: Path, gpus: list[int]) -> None:
    with on_gpus(tmp_path, "serve.servers_per_gpu=2") as service:
        assert [server.gpu_ids for server in service.status()] == [(gpu,) for gpu in gpus[:2] for _ in range(2)]
        assert service.generate([str(item) for item in range(600)]) == [[str(item)] for item in range(600)]
        with pytest.raises(LaunchError, match=f"GPU {gpus[1]} is held by process"):
            on_gpus(tmp_path, f"serve.gpu_ids={gpus[1:3]}").start()
        os.kill(next(iter(processes.processes_of(service.servers[2].record().instance))), signal.SIGKILL)
        until(lambda: service.status()[2].restarts == 1 and service.status()[2].state == State.READY)
        assert service.status()[2].gpu_ids == (gpus[1],)


def test_servers_that_measure_no_memory_start_together_on_their_gpu(tmp_path: Path, gpus: list[int]) -> None:
    (tmp_path / "meeting").mkdir()
    one = f"serve.gpu_ids={gpus[:1]}"
    with on_gpus(tmp_path, "serve.servers_per_gpu=2", one, f"engine.meet={tmp_path / 'meeting'}") as service:
        assert service.generate(["a"]) == [["a"]]


def test_a_reload_changes_the_number_of_servers_on_each_gpu(tmp_path: Path, gpus: list[int]) -> None:
    with on_gpus(tmp_path, "serve.servers_per_gpu=2") as service:
        service.reload(overrides=["serve.servers_per_gpu=3", f"serve.gpu_ids={gpus[:1]}"], path=tmp_path / "c.yaml")
        assert [server.gpu_ids for server in service.status()] == [(gpus[0],)] * 3
        assert service.generate([str(item) for item in range(100)]) == [[str(item)] for item in range(100)]
        service.scale(3)
        with pytest.raises(ConfigError, match=r"expected a multiple of 3, .* up to 3, got 4"):
            service.scale(4)


def test_services_that_share_a_gpu_start_one_after_the_other(tmp_path: Path, gpus: list[int]) -> None:
    share = ("serve.share_gpu=true", f"serve.gpu_ids={gpus[:1]}", "engine.load_time=1.0")
    services = [on_gpus(tmp_path, *share) for _ in range(2)]
    began = time.monotonic()
    starting = [threading.Thread(target=service.start) for service in services]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join(60)
    assert time.monotonic() - began >= 2.0
    try:
        assert [service.generate(["a"]) for service in services] == [[["a"]]] * 2
    finally:
        for service in services:
            service.shutdown()


@pytest.mark.usefixtures("gpus")
def test_secret_options_of_an_engine_are_not_in_its_command(tmp_path: Path) -> None:
    service = on_gpus(tmp_path, "engine.api_key=canary-canary")
    assert "canary" not in str(service.jobs())
    assert "canary" not in repr(service.jobs())
    with service:
        commands = [
            Path(f"/proc/{pid}/cmdline").read_text()
            for server in service.servers
            for pid in processes.processes_of(server.record().instance)
        ]
        servers = [command for command in commands if "vllm_server.py" in command]
        assert len(servers) == 2
        assert not any("canary" in command for command in servers)
        assert service.generate(["a"]) == [["a"]]


class SlowLauncher(SubprocessLauncher):
    """Launches once it may, and notes that it was asked."""

    def launch(self, job: Job) -> Process:
        LAUNCHES.append(job)
        assert MAY_LAUNCH.wait(60)
        return super().launch(job)


LAUNCHES: list[Job] = []
MAY_LAUNCH = threading.Event()


def test_a_slow_launcher_holds_up_neither_other_launches_nor_questions() -> None:
    LAUNCHES.clear()
    MAY_LAUNCH.clear()
    service = VLLMService(LLM, TWO, engine=EchoEngine(), launcher=SlowLauncher())

    def start() -> None:
        with pytest.raises(LaunchError, match="was stopped while it started"):
            service.start()

    starting = threading.Thread(target=start)
    starting.start()
    try:
        until(lambda: len(LAUNCHES) == 2, 30)  # the first one is not over
        until(lambda: [status.state for status in service.status()] == [State.STARTING] * 2)
        began = time.monotonic()
        for server in service.servers:
            server.ask_to_stop()
        assert time.monotonic() - began < 30.0
    finally:
        MAY_LAUNCH.set()
    starting.join(30)
    service.shutdown()
    assert [status.state for status in service.status()] == [State.STOPPED] * 2


def test_a_service_that_nobody_holds_any_more_ends() -> None:
    before = our_processes()
    service = VLLMService(LLM, TWO, engine=EchoEngine(), name="dropped")
    service.start()
    assert service.generate(["a"]) == [["a"]]
    known = weakref.ref(service)
    del service
    gc.collect()
    assert known() is None
    until(lambda: not new_processes(before), 20.0)
    until(lambda: records.read_service("dropped") is None)


def test_a_service_that_is_iterated_over_is_held() -> None:
    before = our_processes()

    def outcomes() -> Iterator[tuple[int, Any]]:
        service = VLLMService(LLM, engine=EchoEngine(latency=0.01))
        service.start()
        return service.generate_iter(["a", "b"] * 50)

    results = outcomes()
    gc.collect()
    assert {found[0].text for _, found in results} == {"a", "b"}
    del results
    gc.collect()
    until(lambda: not new_processes(before), 20.0)


AT_THE_END = """
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

class Holder:
    def __init__(self):
        self.service = VLLMService(LLMConfig("m"), engine=EchoEngine())
        self.service.start()

    def __del__(self):
        try:
            self.service.generate(["a"])
        except Exception as error:
            assert "not running" in str(error), error
        self.service.shutdown()
        self.service.shutdown(drain=5.0)

holder = Holder()
print(holder.service.generate(["a"]))
"""


def test_a_shutdown_at_the_very_end_of_the_interpreter_returns_at_once() -> None:
    before = our_processes()
    ended = python(AT_THE_END)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("[['a']]\n", "", 0)
    until(lambda: not new_processes(before))


def test_a_log_folder_that_was_removed_is_made_again() -> None:
    with VLLMService(LLM, engine=EchoEngine()) as service:
        (status,) = service.status()
        assert status.log is not None
        shutil.rmtree(status.log.parent)
        for pid in processes.processes_of(status.instance):
            os.kill(pid, signal.SIGKILL)
        until(lambda: service.status()[0].restarts == 1 and service.is_running(), 20.0)
        log = service.status()[0].log
        assert log is not None
        assert log.exists()


def test_a_shutdown_with_time_lets_the_servers_finish_what_they_have() -> None:
    prompts = [f"item {index}" for index in range(200)]
    service = VLLMService(LLM, engine=EchoEngine(latency=0.25, capacity=4))
    service.start()
    outcomes: dict[int, Any] = {}
    some = threading.Event()

    def call() -> None:
        for index, outcome in service.generate_iter(prompts):
            outcomes[index] = outcome
            some.set()

    calling = threading.Thread(target=call)
    calling.start()
    assert some.wait(20)
    service.shutdown(drain=60.0)
    calling.join(20)
    assert len(outcomes) == 200
    done = [index for index, outcome in outcomes.items() if not isinstance(outcome, ItemError)]
    assert len(done) >= 8
    assert all(outcomes[index][0].text == prompts[index] for index in done)
    lost = {str(outcome) for outcome in outcomes.values() if isinstance(outcome, ItemError)}
    assert lost == {"the service is ending: as requested"}
    with pytest.raises(GserveError, match="the service is not running"):
        service.generate(["a"])
    assert [status.state for status in service.status()] == [State.STOPPED]


def test_a_service_whose_only_server_is_given_up_fails_the_calls_of_who_is_attached() -> None:
    serve = ServeConfig(max_restarts=0)
    with VLLMService(LLM, serve, engine=EchoEngine(), name="given-up") as service:
        with VLLMService.attach("given-up") as attached:
            assert attached.generate(["a"]) == [["a"]]
            for pid in processes.processes_of(service.status()[0].instance):
                os.kill(pid, signal.SIGKILL)
            until(lambda: service.status()[0].state == State.FAILED)
            (result,) = attached.generate(["b"], on_error="return")
            assert isinstance(result, ItemLost)
            assert "all servers of the service 'given-up' have failed" in str(result)
        with pytest.raises(GserveError, match="all servers of the service 'given-up' have failed"):
            VLLMService.attach("given-up")


def test_a_killed_server_leaves_nothing_in_the_temporary_folder_that_its_config_names(tmp_path: Path) -> None:
    serve = ServeConfig(max_restarts=0, env={"TMPDIR": str(tmp_path)})
    with VLLMService(LLM, serve, engine=EchoEngine()) as service:
        assert len(list(tmp_path.glob("gserve-*"))) == 1
        for pid in processes.processes_of(service.status()[0].instance):
            os.kill(pid, signal.SIGKILL)
        until(lambda: service.status()[0].state == State.FAILED)
    assert list(tmp_path.glob("gserve-*")) == []


def test_who_is_attached_finds_a_service_that_is_started_again_under_its_name() -> None:
    service = VLLMService(LLM, engine=EchoEngine(), name="anew")
    service.start()
    with VLLMService.attach("anew") as attached:
        assert attached.generate(["a"]) == [["a"]]
        service.shutdown()
        results: list[Any] = []
        calling = threading.Thread(target=lambda: results.extend(attached.generate(["b"], on_error="return")))
        calling.start()
        with service:
            calling.join(30)
            assert results == [["b"]]
        assert len(attached.status()) == 1


def test_a_service_can_be_asked_and_used_and_ended_by_a_signal_handler() -> None:
    with VLLMService(LLM, TWO, engine=EchoEngine()) as service:
        asked = 0

        def ask(*_: object) -> None:
            nonlocal asked
            asked += 1
            assert len(service.status()) == 2
            service.is_running()
            if asked == 100:
                service.shutdown()

        usual = signal.signal(signal.SIGALRM, ask)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.01)
        try:
            deadline = time.monotonic() + 30
            with suppress(GserveError):
                while time.monotonic() < deadline:
                    service.generate(["a"])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, usual)
        assert asked >= 100
        assert [status.state for status in service.status()] == [State.STOPPED] * 2


FORKED_THREADS = """
import os, threading
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("m"), ServeConfig(servers=2), engine=EchoEngine()) as service:
    pid = os.fork()
    if not pid:
        failed = []
        def call():
            for _ in range(20):
                failed.extend(it for it in service.generate(["a"], on_error="return") if it != ["a"])
        threads = [threading.Thread(target=call) for _ in range(8)]
        [it.start() for it in threads]
        [it.join() for it in threads]
        print(failed, flush=True)
        service.shutdown()
        os._exit(0)
    os.waitpid(pid, 0)
    print(service.generate(["parent again"]), flush=True)
"""


def test_threads_of_a_forked_process_all_find_the_servers() -> None:
    ended = python(FORKED_THREADS)
    assert ended.stdout == "[]\n[['parent again']]\n", ended.stderr


@pytest.mark.parametrize("ends", [False, True])
def test_where_all_servers_and_the_nursery_are_killed_at_once_every_call_ends(ends: bool) -> None:
    before = our_processes()
    with VLLMService(LLM, TWO, engine=EchoEngine(latency=0.01, capacity=8)) as service:
        results: list[Any] = []

        def call() -> None:
            try:
                results.append(len(service.generate([f"item {index}" for index in range(100)], on_error="return")))
            except GserveError as error:
                results.append(error)

        calls = [threading.Thread(target=call, daemon=True) for _ in range(4)]
        for calling in calls:
            calling.start()
        time.sleep(0.2)
        for pid in new_processes(before):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if ends:
            service.shutdown()
        for calling in calls:
            calling.join(60)
        assert len(results) == 4
        assert ends or results == [100] * 4
