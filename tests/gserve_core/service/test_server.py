"""`VLLMServer`: start, failures of the start, shutdown, and what it keeps to itself."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gserve import (
    BatchError,
    ConfigError,
    GserveError,
    LaunchError,
    LLMConfig,
    PluginError,
    ServeConfig,
    ServerExited,
    StartupTimeout,
    VLLMClient,
    VLLMServer,
    VLLMService,
)
from gserve.log_utils import setup_logging
from gserve_core.command_launcher import LocalProcess
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import run_files, scratch, tokens
from gserve_core.interfaces import Job, Process
from gserve_core.service import server_life as run_module
from gserve_core.service.server_command import pinning
from gserve_core.service.state import State
from gserve_core.testing import our_processes
from gserve_launchers.local import SubprocessLauncher

LLM = LLMConfig("m")
CANARY = "canary-9f1c2e"

TELLTALE = """
import os
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class Telltale(EchoEngine):
    name: ClassVar[str] = "telltale"

    async def start(self, llm, report):
        report(f"hf_token ends in {llm.llm_kwargs.get('hf_token', '')[-6:]}")
        report(f"devices {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        report(f"order {os.environ.get('CUDA_DEVICE_ORDER')}")
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [Telltale]
"""


def new_processes(before: dict[int, str]) -> dict[int, str]:
    return {pid: command for pid, command in our_processes().items() if pid not in before}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def server_pid(before: dict[int, str]) -> int:
    """Return the process id of the server, not of its engine."""
    until(lambda: any("vllm_server.py" in command for command in new_processes(before).values()))
    return next(pid for pid, command in new_processes(before).items() if "vllm_server.py" in command)


def log_of(server: VLLMServer) -> str:
    log = server.status().log
    assert log is not None
    return log.read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[VLLMServer]:
    with VLLMServer(LLM, engine=EchoEngine()) as started:
        yield started


def test_a_started_server_tells_where_it_is_and_what_it_serves(server: VLLMServer) -> None:
    assert server.is_running()
    assert (server.host, type(server.port)) == ("127.0.0.1", int)
    status = server.status()
    assert (status.name, status.state, status.phase, status.error) == ("server-0", State.READY, None, None)
    assert status.info is not None
    assert status.info.model == "m"


def test_its_client_needs_nothing_more(server: VLLMServer) -> None:
    with server.client() as client:
        assert client.health().status == "ok"
        assert client.generate(["a b"]) == [["a b"]]


def test_a_client_finds_the_token_of_a_server_of_the_same_user(server: VLLMServer) -> None:
    assert server.port is not None
    for host in ("127.0.0.1", "localhost"):
        with VLLMClient(host, server.port) as client:
            assert client.generate(["a"]) == [["a"]]
    with VLLMClient("127.0.0.1", server.port, token="wrong") as client, pytest.raises(BatchError, match="its token"):
        client.generate(["a"])


def test_the_token_lies_in_a_file_of_the_user_alone(server: VLLMServer) -> None:
    (file,) = [it for it in run_files.folder().iterdir() if it.name == f"token-127.0.0.1-{server.port}"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(run_files.folder().stat().st_mode) == 0o700
    assert server.record().token in file.read_text()


def test_the_log_is_of_the_user_alone(server: VLLMServer) -> None:
    log = server.status().log
    assert log is not None
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700


def test_the_token_is_in_no_command_line_environment_or_log(server: VLLMServer) -> None:
    token = server.record().token
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            for name in ("cmdline", "environ"):
                try:
                    assert token.encode() not in (entry / name).read_bytes()
                except OSError:
                    continue
    assert token not in log_of(server)
    assert token not in repr(server.status())


def test_start_of_a_started_server_does_nothing(server: VLLMServer) -> None:
    before = server.record()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: server.start(), range(8)))
    assert server.record() == before


def test_a_server_that_never_started_can_be_shut_down_and_asked() -> None:
    server = VLLMServer(LLM, engine=EchoEngine())
    server.shutdown()
    server.shutdown()
    assert not server.is_running()
    assert (server.host, server.port, server.status().state) == ("127.0.0.1", None, State.STOPPED)
    with pytest.raises(GserveError, match="server-0 is stopped, not ready"):
        server.client()


def test_a_serve_config_is_taken_whole_or_not_at_all() -> None:
    with VLLMServer(LLM, serve_config=ServeConfig(env={"MINE": "1"}), engine=EchoEngine()) as server:
        assert server.client().generate(["a b"]) == [["a b"]]
    with pytest.raises(ConfigError, match="and verbose inside serve_config, not beside it"):
        VLLMServer(LLM, port=8000, serve_config=ServeConfig(), engine=EchoEngine())
    with pytest.raises(ConfigError, match=r"a VLLMServer is one server, but serve_config\.servers is 2: use a VLLMS"):
        VLLMServer(LLM, serve_config=ServeConfig(servers=2), engine=EchoEngine())
    with pytest.raises(ConfigError, match=r"a VLLMServer is one server, but serve_config\.min_ready is 2: use a VLL"):
        VLLMServer(LLM, serve_config=ServeConfig(min_ready=2), engine=EchoEngine())


def test_a_server_lives_again_after_shutdown_under_another_identity() -> None:
    server = VLLMServer(LLM, engine=EchoEngine())
    with server:
        first = server.record()
        address = server.port
    assert not server.is_running()
    assert address is not None
    assert tokens.find_access("127.0.0.1", address).token is None
    with server:
        second = server.record()
        with VLLMClient(port=second.address.port, token=second.token, instance=first.instance) as old:
            assert isinstance(old.generate(["a"], on_error="return")[0], GserveError)
        with server.client() as client:
            assert client.generate(["a"]) == [["a"]]
    assert first.instance != second.instance
    assert first.token != second.token


def test_start_and_shutdown_from_many_threads_leave_nothing() -> None:
    before = our_processes()
    server = VLLMServer(LLM, engine=EchoEngine())

    def start(_: int) -> None:
        with suppress(LaunchError):  # it was stopped while it started
            server.start()

    with ThreadPoolExecutor(8) as pool:
        starts = pool.map(start, range(4))
        time.sleep(0.3)
        list(pool.map(lambda _: server.shutdown(), range(4)))
        list(starts)
    server.shutdown()
    assert server.status().state == State.STOPPED
    assert not new_processes(before)


def test_servers_started_from_a_pool_outlive_it() -> None:
    servers = [VLLMServer(LLM, engine=EchoEngine()) for _ in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(VLLMServer.start, servers))
        time.sleep(0.5)
        assert all(server.is_running() for server in servers)
        assert len({server.port for server in servers}) == 4
    finally:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(VLLMServer.shutdown, servers))


def test_a_start_that_fails_tells_cause_log_and_its_last_lines() -> None:
    before = our_processes()
    server = VLLMServer(LLM, engine=EchoEngine(fail_start="boom"))
    began = time.monotonic()
    with pytest.raises(ServerExited) as caught:
        server.start()
    assert time.monotonic() - began < 30
    text = str(caught.value)
    assert text.startswith("server-0 failed while loading: boom (log: ")
    assert caught.value.log is not None
    assert str(caught.value.log) in text
    assert "last lines of the log:" in text
    assert "failed: boom" in text
    assert caught.value.returncode == 1
    assert not new_processes(before)
    assert not server.is_running()


def test_a_server_that_is_killed_while_it_loads_is_told_at_once() -> None:
    before = our_processes()
    server = VLLMServer(LLM, engine=EchoEngine(load_time=60))

    def kill() -> None:
        until(lambda: server.status().phase == "loading")
        os.kill(server_pid(before), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ServerExited, match="killed by SIGKILL"):
        server.start()
    killer.join()
    assert not new_processes(before)


def test_a_server_that_dies_later_is_failed_and_can_be_started_again() -> None:
    before = our_processes()
    with VLLMServer(LLM, engine=EchoEngine(die_on="poison")) as server:
        with server.client() as client:
            (result,) = client.generate(["poison"], on_error="return")
        assert isinstance(result, GserveError)
        until(lambda: server.status().state == State.FAILED)
        assert not server.is_running()
        assert "the engine died: the echo process was killed by SIGKILL" in str(server.status().error)
        assert all("gserve nursery" in command for command in new_processes(before).values())
        server.start()
        assert server.is_running()
        assert server.status().error is None


def test_a_start_without_progress_is_given_up() -> None:
    before = our_processes()
    server = VLLMServer(LLM, startup_timeout=1.5, engine=EchoEngine(load_time=60))
    with pytest.raises(StartupTimeout, match=r"no progress for 1\.5 s \(startup_timeout\) while"):
        server.start()
    assert server.status().state == State.STOPPED
    assert not new_processes(before)


def run_script(tmp_path: Path, text: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


INTERRUPTED = """
import os, signal, threading, time
from gserve import LLMConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine
server = VLLMServer(LLMConfig("m"), engine=EchoEngine(load_time=60))
def interrupt():
    while server.status().phase != "loading":
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    server.start()
except KeyboardInterrupt:
    print("interrupted", server.status().state)
"""


def test_an_interrupted_start_leaves_nothing(tmp_path: Path) -> None:
    before, files = our_processes(), set(run_files.folder().iterdir())
    ended = run_script(tmp_path, INTERRUPTED)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("interrupted stopped\n", "", 0)
    assert not new_processes(before)
    assert set(run_files.folder().iterdir()) == files


def test_the_port_that_is_given_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with VLLMServer(LLM, port=port, engine=EchoEngine()) as server:
        assert server.port == port


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            VLLMServer(LLM, port=port, engine=EchoEngine()).start()


def test_a_runtime_folder_that_is_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = our_processes()
    (tmp_path / "gserve").mkdir()
    (tmp_path / "gserve").chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(GserveError, match=r"must be a folder of yours alone \(mode 0700\)"):
        VLLMServer(LLM, engine=EchoEngine()).start()
    with pytest.raises(GserveError, match="must be a folder of yours alone"):
        VLLMClient()
    assert not new_processes(before)


def test_a_runtime_folder_that_goes_bad_later_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = our_processes()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = VLLMServer(LLM, engine=EchoEngine())
    server.begin()
    until((tmp_path / "gserve").exists)
    (tmp_path / "gserve").chmod(0o755)
    with pytest.raises(ServerExited, match="must be a folder of yours alone"):
        server.wait_ready()
    server.shutdown()
    assert not new_processes(before)
    (tmp_path / "gserve").chmod(0o700)


def test_secrets_reach_the_server_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "telltale.py").write_text(TELLTALE)
    monkeypatch.syspath_prepend(str(tmp_path))
    telltale = import_module("telltale")
    before = our_processes()
    llm = LLMConfig("m", llm_kwargs={"hf_token": CANARY, "note": "seen"})
    with VLLMServer(llm, gpu_ids=[3], engine=telltale.Telltale(), plugins=["telltale"], startup_timeout=30) as server:
        commands = new_processes(before)
        assert any("--model m " in command for command in commands.values())
        assert not any("seen" in command for command in commands.values()), "all else comes over the lease"
        assert not any(CANARY in command for command in commands.values())
        for pid in commands:
            assert CANARY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        log = log_of(server)
        assert f"hf_token ends in {CANARY[-6:]}" in log
        assert "devices 3" in log
        assert "order PCI_BUS_ID" in log, "as nvidia-smi counts, by which GPUs are locked"
        assert CANARY not in log


@pytest.mark.parametrize(
    ("given", "ids", "seen"),
    [
        (None, [0], "0"),
        (None, [0, 1], "0,1"),
        ("", [1], "1"),
        ("4,5", [1], "5"),
        ("4,5", [1, 0], "5,4"),
        ("7", [0], "7"),
    ],
)
def test_a_server_sees_its_gpus_only(given: str | None, ids: list[int], seen: str) -> None:
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert pinning(ids, environ) == {"CUDA_VISIBLE_DEVICES": seen}


def test_gpu_ids_count_the_gpus_that_we_see_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    job = VLLMServer(LLM, gpu_ids=[1], engine=EchoEngine()).job(Path(os.devnull))
    assert (job.env["CUDA_VISIBLE_DEVICES"], job.gpus) == ("5", 1)
    with pytest.raises(ConfigError, match=r"GPU 2 is requested, but CUDA_VISIBLE_DEVICES has 2 \(4,5\)"):
        VLLMServer(LLM, gpu_ids=[2], engine=EchoEngine()).start()
    assert pinning(None) == {}


LEVELS = """
import sys
from gserve import LLMConfig, VLLMServer
from gserve.log_utils import setup_logging
from gserve_core.engines.echo import EchoEngine
if len(sys.argv) > 1 or {setup}:
    setup_logging({level!r})
job = VLLMServer(LLMConfig("m"), engine=EchoEngine()).job(__import__("pathlib").Path("/dev/null"))
print(job.env["GSERVE_LOG_LEVEL"])
"""


@pytest.mark.parametrize(
    ("setup", "level", "environ", "expected"),
    [
        (False, None, None, "INFO"),
        (False, None, "DEBUG", "DEBUG"),
        (True, None, "DEBUG", "DEBUG"),
        (True, "DEBUG", None, "DEBUG"),
        (True, "WARNING", "DEBUG", "WARNING"),
    ],
)
def test_the_log_level_reaches_servers(
    tmp_path: Path, setup: bool, level: str | None, environ: str | None, expected: str
) -> None:
    more = {} if environ is None else {"GSERVE_LOG_LEVEL": environ}
    ended = run_script(tmp_path, LEVELS.format(setup=setup, level=level), **more)
    assert ended.stdout == f"{expected}\n", ended.stderr


def test_a_server_logs_at_the_level_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSERVE_LOG_LEVEL", "ERROR")
    with VLLMServer(LLM, engine=EchoEngine()) as server:
        assert "listening on" not in log_of(server)
    monkeypatch.setenv("GSERVE_LOG_LEVEL", "INFO")
    with VLLMServer(LLM, engine=EchoEngine()) as server:
        assert "listening on" in log_of(server)


def test_an_unknown_log_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown log level 'LOUD'"):
        setup_logging("LOUD")


VERBOSE = """
from gserve import LLMConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine
with VLLMServer(LLMConfig("m"), verbose={verbose}, engine=EchoEngine()) as server:
    print(server.is_running())
"""


@pytest.mark.parametrize("verbose", [True, False])
def test_the_log_is_shown_where_it_was_asked_for(tmp_path: Path, verbose: bool) -> None:
    ended = run_script(tmp_path, VERBOSE.format(verbose=verbose))
    assert ended.stdout == "True\n"
    lines = ended.stderr.splitlines()
    assert all(line.startswith("[server-0] ") for line in lines)
    assert any("ready: m" in line for line in lines) is verbose


def test_an_engine_that_the_server_cannot_find_is_refused_with_the_way_out() -> None:
    class Private(EchoEngine):
        pass

    with pytest.raises(PluginError, match="must find the engine"):
        VLLMServer(LLM, engine=Private()).start()


@pytest.mark.parametrize("ends_by", ["shutdown", "SIGKILL"])
def test_the_temporary_files_of_a_server_go_with_it(ends_by: str) -> None:
    others = our_processes()
    server = VLLMServer(LLMConfig("any"), engine=EchoEngine())
    with server:
        folder = scratch.path_of(server.record().instance)
        assert folder.is_dir()
        (folder / "left").touch()
        if ends_by == "SIGKILL":
            (pid,) = [pid for pid, it in our_processes().items() if "vllm_server.py" in it and pid not in others]
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while server.status().state != "failed" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not folder.exists()
    assert not folder.exists()


SEEING = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class Seeing(EchoEngine):
    name: ClassVar[str] = "seeing"
    file: str = ""
    api_key: str = ""

    async def start(self, llm, report):
        Path(self.file).write_text(repr((llm, llm.llm_kwargs.get("hf_token"), self.api_key)))
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [Seeing]
"""


@pytest.mark.parametrize("nursery", [True, False])
def test_the_engine_sees_the_config_as_the_user_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: bool
) -> None:
    (tmp_path / "seeing.py").write_text(SEEING)
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = import_module("seeing").Seeing(file=str(tmp_path / "seen"), api_key=CANARY)
    llm = LLMConfig(
        "m", tokenizer="t", dtype="auto", seed=7, max_model_len=77, quantization=None, gpu_memory_utilization=0.5,
        enforce_eager=True, lora_path="/nowhere",
        llm_kwargs={"hf_token": CANARY, "seed": 8, "deep": {"list": [1, None, 0.1]}},
    )  # fmt: skip
    launcher = SubprocessLauncher(nursery=nursery)
    with VLLMServer(llm, engine=engine, plugins=["seeing"], launcher=launcher) as server:
        assert (tmp_path / "seen").read_text() == repr((llm, CANARY, CANARY))
        assert sum(map(len, server.job(tmp_path / "log").command)) < 500
        assert server.is_running()


UNREAD = """
import os, signal, sys, time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.host import processes
from gserve_core.engines.echo import EchoEngine
{setup}
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)  # it is full, and nobody reads it
with VLLMService(LLMConfig("m"), ServeConfig(verbose=True), engine=EchoEngine()) as service:
    (server,) = service.servers
    for restarts in (1, 2):
        for pid in processes.processes_of(server.record().instance):
            os.kill(pid, signal.SIGKILL)
        while service.status()[0].restarts < restarts or service.status()[0].state != "ready":
            time.sleep(0.02)
    print(service.generate(["a"]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    "setup",
    [
        "",
        "from gserve.log_utils import setup_logging; setup_logging()",
        "import logging; logging.basicConfig(level=logging.INFO)",
    ],
    ids=["no handler", "gserve's", "the program's own"],
)
def test_a_stderr_that_nobody_reads_holds_nothing_up(tmp_path: Path, setup: str) -> None:
    script = UNREAD.format(setup=setup)
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.wait(90) == 0
            assert owner.stdout is not None
            assert owner.stdout.read() == "[['a']]\n"
        finally:
            owner.kill()


CLOSED = """
import sys
from pathlib import Path
from gserve import LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("m"), engine=EchoEngine()) as service:
    Path(sys.argv[1]).write_text(str(service.generate(["a"])))
"""


def test_a_program_without_standard_streams_has_a_service(tmp_path: Path) -> None:
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", CLOSED, str(tmp_path / "answer")]
    assert subprocess.run(command, timeout=90, check=False).returncode == 0
    assert (tmp_path / "answer").read_text() == "[['a']]"


SURROUNDINGS = """
import os, resource, signal, time
from pathlib import Path
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.host import processes
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.local import SubprocessLauncher

def look():
    found = set()
    for pid in processes.processes_of(server.record().instance):
        told = Path(f"/proc/{{pid}}/status").read_text().splitlines()
        limits = Path(f"/proc/{{pid}}/limits").read_text().splitlines()
        environ = Path(f"/proc/{{pid}}/environ").read_bytes().split(bytes(1))
        found.add((
            [line for line in told if line.startswith("Umask")][0].split()[1],
            [line for line in limits if line.startswith("Max core")][0].split()[4],
            b"LATER=1" in environ, b"FIRST=1" in environ,
        ))
    return found

resource.setrlimit(resource.RLIMIT_CORE, (1000, resource.getrlimit(resource.RLIMIT_CORE)[1]))
os.umask(0o027)
os.environ["FIRST"] = "1"
launcher = SubprocessLauncher(nursery={nursery})
with VLLMService(LLMConfig("m"), ServeConfig(), engine=EchoEngine(), launcher=launcher) as service:
    (server,) = service.servers
    print(look())
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (500, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.environ["LATER"] = "1"
    del os.environ["FIRST"]
    for pid in processes.processes_of(server.record().instance):
        os.kill(pid, signal.SIGKILL)
    while service.status()[0].restarts < 1 or service.status()[0].state != "ready":
        time.sleep(0.02)
    print(look())
"""


@pytest.mark.parametrize("nursery", [True, False])
def test_a_server_that_is_started_again_has_what_the_first_one_had(tmp_path: Path, nursery: bool) -> None:
    ended = run_script(tmp_path, SURROUNDINGS.format(nursery=nursery))
    assert ended.stdout == "{('0027', '1000', False, True)}\n" * 2, ended.stderr


IGNORING = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.host import processes
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.local import SubprocessLauncher
import psutil
launcher = SubprocessLauncher(nursery={nursery})
with VLLMService(LLMConfig("m"), ServeConfig(), engine=EchoEngine(), launcher=launcher) as service:
    (server,) = service.servers
    nurseries = [it.pid for it in psutil.Process().children() if "--forks" in it.cmdline() or "nursery" in it.cmdline()]
    for pid in processes.processes_of(server.record().instance):
        os.kill(pid, signal.SIGKILL)
    while service.status()[0].restarts < 1 or service.status()[0].state != "ready":
        time.sleep(0.02)
    print(service.generate(["a"]), len(nurseries), all(map(psutil.pid_exists, nurseries)))
"""


@pytest.mark.parametrize("nursery", [True, False])
def test_where_sigchld_is_ignored_deaths_are_survived_and_told_right(tmp_path: Path, nursery: bool) -> None:
    ended = run_script(tmp_path, IGNORING.format(nursery=nursery))
    assert ended.stdout == f"[['a']] {int(nursery)} True\n", ended.stderr
    assert "exit code 0" not in ended.stderr
    assert ("was killed by SIGKILL" if nursery else "unknown exit code, since SIGCHLD is ignored") in ended.stderr


FIRST = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.host import processes
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.local import SubprocessLauncher

def zombies():
    told = [Path(f"/proc/{{pid}}/stat").read_text() for pid in os.listdir("/proc") if pid.isdigit()]
    return [it for it in told if it.rpartition(")")[2].split()[0] == "Z"]

assert os.getpid() == 1
launcher = SubprocessLauncher(nursery={nursery})
with VLLMService(LLMConfig("m"), ServeConfig(), engine=EchoEngine(processes=2), launcher=launcher) as service:
    (server,) = service.servers
    for restarts in (1, 2):
        environ = os.environ | {{processes.ID_VARIABLE: server.record().instance}}
        subprocess.run(["sh", "-c", "setsid sleep 600 &"], env=environ, check=True)  # it leaves the group
        os.kill(min(processes.processes_of(server.record().instance)), signal.SIGKILL)
        while service.status()[0].restarts < restarts or service.status()[0].state != "ready":
            time.sleep(0.02)
print(zombies())
"""


@pytest.mark.parametrize("nursery", [True, False])
def test_an_owner_that_is_process_1_leaves_no_zombies(tmp_path: Path, nursery: bool) -> None:
    isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a PID namespace")
    ended = subprocess.run(
        [*isolated, sys.executable, "-c", FIRST.format(nursery=nursery)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.stdout == "[]\n", ended.stderr


def test_a_server_whose_end_fails_ends_with_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[LocalProcess] = []

    def fail(process: LocalProcess, grace: float) -> int:
        ended.append(process)
        process.stdout.close()
        raise OSError(errno.EMFILE, "Too many open files")

    before = our_processes()
    server = VLLMServer(LLM, engine=EchoEngine(), launcher=SubprocessLauncher(nursery=False))
    server.start()
    with monkeypatch.context() as patch:
        patch.setattr(LocalProcess, "stop", fail)
        server.shutdown()
    until(lambda: not new_processes(before))
    until(lambda: ended[0].poll() is not None)


def test_a_place_is_kept_over_a_start_that_fails_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the disk with the logs is full for a moment: SLURM's job stays meanwhile, with its GPUs."""
    launched: list[Any] = []
    previous: list[Any] = []

    class Keeping(SubprocessLauncher):
        def launch(self, job: Job) -> Process:
            previous.append(job.previous)
            launched.append(super().launch(job))
            return launched[-1]  # type: ignore[no-any-return]

    usual = run_module._new_log
    logs: list[Path] = []

    def full(folder: Path, name: str) -> Path:
        logs.append(folder)
        if len(logs) == 2:
            raise GserveError("No space left on device")
        return usual(folder, name)

    monkeypatch.setattr(run_module, "_new_log", full)
    config = ServeConfig(max_restarts=5)
    with VLLMService(LLM, config, engine=EchoEngine(), launcher=Keeping(nursery=False)) as service:
        launched[0].stop(0.0)
        until(lambda: len(previous) == 2)
        assert previous[1] is launched[0]
        assert service.generate(["a"]) == [["a"]]
