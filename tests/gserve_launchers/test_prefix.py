"""The option `prefix`: servers under another program, as in a container."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core import testing
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_core.interfaces import Launcher
from gserve_launchers.local import SubprocessLauncher
from gserve_launchers.slurm.launcher import SlurmLauncher

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""A program in process namespaces of its own, where it is process 1, as in a container."""
can_unshare = subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
in_namespace = pytest.mark.skipif(not can_unshare, reason="this user cannot make process namespaces")
OWNER = f"""
import sys, time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.local import SubprocessLauncher
launcher = SubprocessLauncher(prefix={NAMESPACE})
with VLLMService(LLMConfig("demo"), launcher=launcher, engine=EchoEngine()) as service:
    print("ready", flush=True)
    time.sleep(600)
"""


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)


def servers() -> list[int]:
    return [
        pid for pid, command in testing.our_processes().items()
        if command.startswith(sys.executable) and "vllm_server.py" in command
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", [["env", "MARK=a b"], ["setsid", "--wait"], NAMESPACE])
def test_a_server_works_and_returns_under_a_prefix(prefix: list[str]) -> None:
    if prefix == NAMESPACE and not can_unshare:
        pytest.skip("this user cannot make process namespaces")
    launcher = SubprocessLauncher(prefix=prefix, nice=1)
    with VLLMService(LLMConfig("demo"), ServeConfig(), launcher=launcher, engine=EchoEngine()) as service:
        assert service.generate(["a"]) == [["a"]]
        (pid,) = servers()
        if prefix[0] == "env":
            assert dict(processes.environments())[pid]["MARK"] == "a b"
        os.kill(pid, signal.SIGKILL)
        until(lambda: service.status()[0].generation == 2 and service.status()[0].usable)
        assert service.generate(["b"]) == [["b"]]


@in_namespace
def test_a_server_that_is_process_1_ends_with_its_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        (pid,) = servers()
        assert psutil.Process(pid).parent().name() == "unshare"  # type: ignore[union-attr]
        owner.kill()
        owner.wait()
        until(lambda: not testing.our_processes())
    for file in testing.our_files():
        file.unlink()


@pytest.mark.parametrize(
    "launcher", [SubprocessLauncher(prefix=["numactl", "-l"]), SlurmLauncher(prefix=["numactl", "-l"])]
)
def test_the_prefix_stands_before_the_command_of_the_server(launcher: Launcher, tmp_path: Path) -> None:
    service = VLLMService(LLMConfig("demo"), launcher=launcher, engine=EchoEngine())
    ((_, command),) = service.jobs()
    place = command.index("numactl")
    assert command[place + 1 : place + 3] == ["-l", sys.executable]
    assert command[-1] == "--lease"
