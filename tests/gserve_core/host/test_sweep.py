"""A server that is killed while it ends, because its owner is gone, leaves no temporary files."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gserve_core import testing

OWNER = """
import time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=EchoEngine()):
    print("ready", flush=True)
    time.sleep(600)
"""
SECONDS = 60.0


def test_a_server_that_is_killed_between_the_end_of_its_engine_and_its_own_leaves_no_files(tmp_path: Path) -> None:
    environ = os.environ | {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", OWNER], env=environ, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        ours = testing.our_processes()
        (server,) = [pid for pid, command in ours.items() if "vllm_server.py" in command]
        (engine,) = [pid for pid, command in ours.items() if "engines.echo" in command]
        assert [*tmp_path.glob("gserve-*")]
        owner.kill()
        deadline = time.monotonic() + SECONDS
        while engine in testing.our_processes():
            assert time.monotonic() < deadline
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(server, signal.SIGKILL)
    while left := [*tmp_path.glob("gserve-*")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
