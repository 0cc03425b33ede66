"""MPS daemons. There is no GPU here: a program in the place of NVIDIA's has its sockets, and a process below it."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gserve import ConfigError, LaunchError, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core import reap
from gserve_core.config import load
from gserve_core.host import folders, gpu_locks, processes
from gserve_core.service.plan import Plan

PIPES = "CUDA_MPS_PIPE_DIRECTORY"
ENGINE = """
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class OnGpus(EchoEngine):
    name: ClassVar[str] = "on-gpus"
    uses_gpus: ClassVar[bool] = True

    async def start(self, llm, report):
        sees = os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "")
        Path(os.environ["FOLDER"], os.environ["GSERVE_ID"]).write_text(" ".join(sees))
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [OnGpus]
"""
DAEMON = """
import os, socket, subprocess, sys, time
assert sys.argv[1:] == ["-f"], sys.argv
print("Starting control daemon", flush=True)
if os.path.exists(FOLDER + "/wrong"):
    time.sleep(3)  # so that all servers wait
    sys.exit("the GPU is in exclusive mode")
listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control")
server = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # like nvidia-cuda-mps-server, it ends with the daemon
with open(FOLDER + "/pids", "a") as pids:
    print(os.getppid(), os.getpid(), server.pid, file=pids)
listening.listen()
while True:
    listening.accept()
"""
OWNER = """
import sys, time
from pathlib import Path
from gserve import VLLMService
service = VLLMService.from_yaml(Path(sys.argv[1]))
service.start()
print("ready", flush=True)
time.sleep(600)
"""
WAIT = 30.0
"""Maximum wait for something that takes a second, in seconds."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with the config `c.yaml`: two servers on each of two GPUs. Nothing may be left at the end."""
    gpus = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    programs = {
        "nvidia-smi": "#!/bin/sh\n" + "".join(f"echo {index}, {gpu}\n" for index, gpu in enumerate(gpus)),
        "nvidia-cuda-mps-control": f"#!{sys.executable} -IS\nFOLDER = {str(tmp_path)!r}\n{DAEMON}",
    }
    for place in ("bin", "tmp"):
        (tmp_path / place).mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "pids").touch()
    (tmp_path / "on_gpus.py").write_text(ENGINE)
    (tmp_path / "c.yaml").write_text(
        "llm: {model_name: m}\nplugins: [on_gpus]\nengine: {type: on-gpus}\n"
        f"serve: {{gpu_ids: [0, 1], servers_per_gpu: 2, gpu_sharing: mps, env: {{FOLDER: {tmp_path}}}}}\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in ("CUDA_VISIBLE_DEVICES", PIPES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield tmp_path
    until(lambda: not [pid for daemon in daemons(tmp_path) for pid in daemon if is_alive(pid)])
    until(lambda: not list((tmp_path / "tmp").iterdir()))
    for gpu in gpus:
        for file in gpu_locks.FOLDER.glob(f"gserve-gpu-{gpu}.*"):
            file.unlink()


def daemons(folder: Path) -> list[list[int]]:
    """Return the processes of each daemon that was ever started: its keeper, itself, and its server."""
    return [[int(pid) for pid in line.split()] for line in (folder / "pids").read_text().splitlines()]


def is_alive(pid: int) -> bool:
    return processes.process_start(pid) is not None


def environ(pid: int) -> dict[str, str]:
    return dict(processes.environments())[pid]


def sharing(folder: Path, service: VLLMService) -> list[list[str]]:
    """Return the GPU of each server, and the folder of the daemon that it uses."""
    return [(folder / server.record().instance).read_text().split() for server in service.servers]


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Have another process run the service for the block, and kill it then."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(folder / "c.yaml")], stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"ready\n"
            yield
        finally:
            owner.kill()


def until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_servers_of_a_gpu_share_a_daemon_that_sees_no_other_gpu(folder: Path) -> None:
    with VLLMService.from_yaml(folder / "c.yaml") as service:
        one, two, three, four = sharing(folder, service)
        assert one == two
        assert three == four
        assert one[0] != three[0]
        assert {environ(pid)["CUDA_VISIBLE_DEVICES"] for _, pid, _ in daemons(folder)} == {one[0], three[0]}
        assert {environ(pid)[PIPES] for _, pid, _ in daemons(folder)} == {one[1], three[1]}
        assert {Path(sockets).resolve().stat().st_mode & 0o777 for _, sockets in (one, three)} == {0o700}
        service.scale(2)
        assert [is_alive(pid) for _, pid, _ in daemons(folder)].count(True) == 1, "the other GPU has no servers now"
        assert service.generate(["a"]) == [["a"]]
    assert not [pid for daemon in daemons(folder) for pid in daemon if is_alive(pid)], "shutdown has waited"
    log = service.status()[0].log
    assert log is not None
    assert "Starting control daemon" in log.with_name(f"mps-{one[0][:12]}.log").read_text()
    assert [*folders.newest_logs(log.parent)] == [f"server-{index}" for index in range(4)]


@pytest.mark.parametrize("which", [0, 1], ids=["the keeper", "the daemon"])
def test_a_daemon_that_was_killed_is_replaced_when_a_server_starts_again(folder: Path, which: int) -> None:
    with VLLMService.from_yaml(folder / "c.yaml", overrides=["serve.gpu_ids=[0]"]) as service:
        before, _ = sharing(folder, service)
        [killed] = daemons(folder)
        os.kill(killed[which], signal.SIGKILL)
        until(lambda: not [pid for pid in killed if is_alive(pid)])
        for server in service.servers:
            os.kill(processes.processes_of(server.record().instance)[0], signal.SIGKILL)
        until(lambda: [server.restarts for server in service.status() if server.usable] == [1, 1])
        after, other = sharing(folder, service)
        assert after == other != before
        assert service.generate(["a", "b"]) == [["a"], ["b"]]


def test_a_daemon_ends_with_an_owner_that_is_killed(folder: Path) -> None:
    with owned(folder):
        assert len(daemons(folder)) == 2
    until(lambda: not [pid for daemon in daemons(folder) for pid in daemon if is_alive(pid)])
    until(lambda: not list((folder / "tmp").iterdir()))


def test_what_a_frozen_keeper_leaves_behind_is_found_by_reap(folder: Path) -> None:
    with owned(folder):
        [frozen, ended] = daemons(folder)
        os.kill(frozen[0], signal.SIGSTOP)
    until(lambda: not [pid for pid in ended if is_alive(pid)])
    left = [process for process in reap.orphans() if process.pid in frozen]
    assert {process.pid for process in left} == {*frozen}
    assert not reap.end(left)
    for path in reap.unused_files():
        if path.parent == folder / "tmp":
            reap.remove(path)


def test_a_model_without_mps_beside_one_with_it_sees_no_daemon(folder: Path) -> None:
    rest = "".join(line + "\n" for line in (folder / "c.yaml").read_text().splitlines()[1:3])
    own = "{llm: {model_name: m}, serve: {gpu_ids: [%d], share_gpu: true, %s env: {FOLDER: %s}}}"
    one, other = own % (0, "gpu_sharing: mps,", folder), own % (1, "", folder)
    (folder / "c.yaml").write_text(f"{rest}models:\n  a: {one}\n  b: {other}\n")
    with VLLMService.from_yaml(folder / "c.yaml") as service:
        nursery = service.servers[0].program.nursery
        nursery.kill()
        for server in service.servers:
            os.kill(processes.processes_of(server.record().instance)[0], signal.SIGKILL)
            until(lambda server=server: (it := server.status()).usable and it.restarts == 1)  # type: ignore[misc]
        with_daemon, without = sharing(folder, service)
        assert len(with_daemon) == 2
        assert len(without) == 1, "no folder"


def test_a_server_alone_on_its_gpu_and_an_engine_without_gpus_have_no_daemon(folder: Path) -> None:
    for changed in ("serve.servers_per_gpu=1", "engine.type=echo"):
        with VLLMService.from_yaml(folder / "c.yaml", overrides=[changed]) as service:
            assert service.generate(["a"]) == [["a"]]
    assert not daemons(folder)


def test_why_a_daemon_does_not_start_is_told_to_all_servers_that_wait_for_it(folder: Path) -> None:
    (folder / "wrong").touch()
    service = VLLMService.from_yaml(folder / "c.yaml", overrides=["serve.servers_per_gpu=4", "serve.gpu_ids=[0]"])
    with pytest.raises(
        LaunchError, match=r"MPS daemon does not start on GPU-.*: the GPU is in exclusive mode; its log"
    ):
        service.start()
    (log,) = next(it.log for it in service.status() if it.log).parent.glob("mps-*.log")
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.read_text().count("Starting control daemon") == 1


def test_gpus_without_a_uuid_have_no_daemon(folder: Path) -> None:
    (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(LaunchError, match=r"needs the UUIDs of its GPUs, got '[01]': see whether nvidia-smi works"):
        VLLMService.from_yaml(folder / "c.yaml").start()
    assert not daemons(folder)


def test_a_reloaded_model_uses_the_daemon_of_the_models_that_stay(folder: Path) -> None:
    rest = "".join(line + "\n" for line in (folder / "c.yaml").read_text().splitlines()[1:3])
    own = "{llm: {model_name: m}, serve: {gpu_ids: [0], share_gpu: true, gpu_sharing: mps, env: {FOLDER: %s, A: '%s'}}}"
    kept, old, new = (own % (folder, value) for value in ("kept", "old", "new"))
    (folder / "c.yaml").write_text(f"{rest}models:\n  a: {kept}\n  b: {old}\n")
    with VLLMService.from_yaml(folder / "c.yaml") as service:
        (folder / "c.yaml").write_text(f"{rest}models:\n  a: {kept}\n  b: {new}\n")
        service.reload()
        one, other = sharing(folder, service)
        assert one == other
        assert len(daemons(folder)) == 1


def test_what_a_daemon_needs_is_checked_before_a_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPES, "/theirs")
    with pytest.raises(ConfigError, match=r"CUDA_MPS_PIPE_DIRECTORY is set.*/theirs.*unset it, or remove gpu_sharing"):
        VLLMService.from_yaml(folder / "c.yaml").start()
    monkeypatch.delenv(PIPES)
    (folder / "bin" / "nvidia-cuda-mps-control").unlink()
    with pytest.raises(
        ConfigError, match=r"needs nvidia-cuda-mps-control, .* and PATH has none: install it, or remove"
    ):
        VLLMService.from_yaml(folder / "c.yaml").start()
    with pytest.raises(ConfigError, match="gpu_sharing is for several servers, and a VLLMServer is one"):
        VLLMServer(LLMConfig("m"), serve_config=ServeConfig(share_gpu=True, gpu_sharing="mps"))
    config, _ = load(folder / "c.yaml", ["launcher.type=slurm", "serve.gpu_ids=null", "serve.servers_per_gpu=1"])
    with pytest.raises(
        ConfigError, match="gpu_sharing is for servers on this machine, and the launcher 'slurm' starts"
    ):
        Plan.of(config, folder)
