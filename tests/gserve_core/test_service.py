"""`VLLMService`: its life, what is left of it, and services that other processes use."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve import BatchError, ConfigError, GserveError, LaunchError, LLMConfig, ServeConfig, VLLMService
from gserve_core import runtime
from gserve_core.engines.echo import EchoEngine
from gserve_core.state import State
from gserve_core.testing import our_processes

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


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
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


def test_the_record_of_a_service_is_of_the_user_alone(named: VLLMService) -> None:
    file = runtime.folder() / "service-the-service"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert runtime.find_service("the-service").pid == os.getpid()


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
    with pytest.raises(ConfigError, match="a service named 'the-service' runs already"):
        VLLMService(LLM, engine=EchoEngine(), name="the-service").start()
    ended = python(CLASHING)
    assert ended.returncode == 1
    assert f"a service named 'the-service' runs already (process {os.getpid()})" in ended.stderr
    assert runtime.find_service("the-service").pid == os.getpid()


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
        assert not (runtime.folder() / "service-again").exists()
        with pytest.raises(GserveError, match="the service is not running"):
            service.generate(["a"])
    service.shutdown()


def test_one_server_that_fails_fails_the_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = our_processes()
    (tmp_path / "flaky.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    from flaky import OneFails

    engine = OneFails(marker=str(tmp_path / "marker"))
    service = VLLMService(LLM, TWO, engine=engine, plugins=["flaky"])
    began = time.monotonic()
    with pytest.raises(LaunchError, match="the second one fails") as caught:
        service.start()
    assert time.monotonic() - began < 15
    assert "last lines of the log" in str(caught.value)
    assert not service.is_running()
    assert not new_processes(before)


def test_all_servers_that_fail_tell_why() -> None:
    before = our_processes()
    with pytest.raises(LaunchError, match="boom"):
        VLLMService(LLM, TWO, engine=EchoEngine(fail_start="boom"), name="failing").start()
    assert not new_processes(before)
    with pytest.raises(ConfigError, match="no service named 'failing'"):
        runtime.find_service("failing")


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
        assert command[:2] == [sys.executable, str(Path(__file__).parents[2] / "gserve" / "vllm_server.py")]
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
    before, files = our_processes(), set(runtime.folder().iterdir())
    line, code = SCRIPT_ENDS[end]
    ended = python(SCRIPT.replace("END", line))
    assert (ended.stdout, ended.returncode) == ("started\n", code), ended.stderr
    until(lambda: not new_processes(before))
    with pytest.raises(ConfigError, match="no service named 'scripted'"):
        runtime.find_service("scripted")
    assert set(runtime.folder().iterdir()) == files


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
        time.sleep(1.0)
        service.shutdown()
        calling.join(5)
        assert not calling.is_alive()
    assert errors[0].results[0] == ["a"]
    assert "the service was closed" in str(errors[0].results[1])


ON_GPUS = """
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class OnGpus(EchoEngine):
    '''Like echo, but servers with it must not share a GPU.'''

    name: ClassVar[str] = "on-gpus"
    uses_gpus: ClassVar[bool] = True
    api_key: str = ""

@hookimpl
def gserve_register_engines():
    return [OnGpus]
"""


def on_gpus(folder: Path, *overrides: str) -> VLLMService:
    (folder / "on_gpus.py").write_text(ON_GPUS)
    (folder / "c.yaml").write_text(
        "llm: {model_name: m}\nserve: {gpu_ids: [91, 92]}\nplugins: [on_gpus]\nengine: {type: on-gpus}\n"
    )
    return VLLMService.from_yaml(folder / "c.yaml", overrides=overrides)


def test_a_gpu_has_one_owner_and_the_second_is_told_who(tmp_path: Path) -> None:
    with on_gpus(tmp_path) as first:
        holders = {pid for server in first.servers for pid in runtime.processes_of(server.record().instance)}
        began = time.monotonic()
        with pytest.raises(LaunchError, match=r"starting the process: GPU 92 is held by process \d+") as caught:
            on_gpus(tmp_path, "serve.gpu_ids=[92, 93]").start()
        assert time.monotonic() - began < 10
        named = re.search(r"held by process (\d+)", str(caught.value))
        assert named
        assert int(named[1]) in holders
        os.kill(int(named[1]), signal.SIGKILL)
        until(lambda: first.status()[1].restarts == 1 and first.status()[1].state == State.READY)
    with on_gpus(tmp_path) as again:
        assert again.generate(["free again"]) == [["free again"]]


def test_several_servers_of_a_service_share_a_gpu(tmp_path: Path) -> None:
    with on_gpus(tmp_path, "serve.share_gpu=true", "serve.gpu_ids=[95, 95, 96]", "engine.load_time=0.5") as service:
        assert [server.gpu_ids for server in service.status()] == [(95,), (95,), (96,)]
        assert len({server.port for server in service.status()}) == 3
        assert service.generate([str(item) for item in range(600)]) == [[str(item)] for item in range(600)]


def test_services_that_share_a_gpu_start_one_after_the_other(tmp_path: Path) -> None:
    share = ("serve.share_gpu=true", "serve.gpu_ids=[94]", "engine.load_time=1.0")
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


def test_secret_options_of_an_engine_are_not_in_its_command(tmp_path: Path) -> None:
    service = on_gpus(tmp_path, "engine.api_key=canary-canary")
    assert "canary" not in str(service.jobs())
    assert "canary" not in repr(service.jobs())
    with service:
        commands = [
            Path(f"/proc/{pid}/cmdline").read_text()
            for server in service.servers
            for pid in runtime.processes_of(server.record().instance)
        ]
        servers = [command for command in commands if "vllm_server.py" in command]
        assert len(servers) == 2
        assert not any("canary" in command for command in servers)
        assert service.generate(["a"]) == [["a"]]
