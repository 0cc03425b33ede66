"""The nursery in a server's step or job: a server that died is back in the same place, and no place outlives its use."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve import LaunchError, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core import runtime
from gserve_core.engines.echo import EchoEngine
from gserve_core.server import State
from gserve_core.testing.slurm import SlurmCluster
from gserve_launchers.slurm import SlurmLauncher

LLM = LLMConfig("demo")
TELL = "import json, os, sys; print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """Begin with an idle cluster, and hold the test to leave no job and no process of one."""
    slurm_cluster.wait_idle(60)
    yield
    slurm_cluster.wait_idle(15)


def test_x(slurm_cluster):
    with VLLMService(LLM, ServeConfig(servers=2), launcher=SlurmLauncher(), engine=EchoEngine()) as service:
        print(slurm_cluster.run("squeue", "--steps", "--format=%i|%j|%N"))
        for server in service.servers:
            pids = runtime.processes_of(server.record().instance)
            print(subprocess.run(["ps", "-o", "pid,ppid,sid,args", "-p", ",".join(map(str, pids))], capture_output=True, text=True).stdout)
        print(subprocess.run(["ps", "-axf", "-o", "pid,ppid,sid,args"], capture_output=True, text=True).stdout)
        first = service.servers[0]
        for pid in runtime.processes_of(first.record().instance):
            if "--lease" in psutil.Process(pid).cmdline():
                os.kill(pid, 9)
        began = time.monotonic()
        while not service.status()[0].restarts: time.sleep(0.05); assert time.monotonic() < began + 10
        while service.status()[0].state != State.READY: time.sleep(0.05); assert time.monotonic() < began + 30
        print("back after", time.monotonic() - began)
        print(slurm_cluster.run("squeue", "--steps", "--format=%i|%j|%N"))
        print(service.generate(["a", "b"]))
        for f in sorted(service.status()[0].log.parent.iterdir()): print(f, f.read_text())
        began = time.monotonic()
    print("shutdown", time.monotonic() - began)
