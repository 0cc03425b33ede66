"""The cores of a machine: divided by the services of one user, and freed by the death of their owner."""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core import testing
from gserve_core.host import core_locks, folders, gpu_locks
from gserve_core.interfaces import Job, Process
from gserve_launchers.local import SubprocessLauncher

CORES = [90001, 90002, 90003]
"""Numbers of cores that no machine has: the tests may run beside real servers."""
HOLDER = """
import sys
from gserve_core.host import core_locks
claim = core_locks.claim([int(core) for core in sys.argv[1:]])
print(*claim.cores, flush=True)
sys.stdin.read()
"""


def holder(*cores: int) -> "tuple[subprocess.Popen[str], list[int]]":
    """Start another process that claims cores; return it and what it got."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, cores)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [int(core) for core in process.stdout.readline().split()]


@pytest.fixture(autouse=True)
def no_files() -> Iterator[None]:
    folders.note.cache_clear()
    yield
    for core in CORES:
        (gpu_locks.FOLDER / f"gserve-core-{os.getuid()}-{core}.lock").unlink(missing_ok=True)


def test_a_process_gets_what_others_have_not_locked() -> None:
    other, theirs = holder(CORES[0])
    assert theirs == [CORES[0]]
    claim = core_locks.claim(CORES)
    assert (claim.cores, claim.is_shared) == (CORES[1:], False)
    again = core_locks.claim(CORES)
    assert again.cores == CORES[1:], "the servers of one process have the same cores to divide"
    claim.release()
    claim.release()
    third, thirds = holder(*CORES)
    assert thirds == CORES, "the other server of this process has its cores still, so all are shared"
    third.communicate("")
    again.release()
    third, thirds = holder(*CORES)
    assert thirds == CORES[1:]
    third.communicate("")
    other.communicate("")


def test_without_a_free_core_all_are_shared_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    other, theirs = holder(*CORES)
    assert theirs == CORES
    with caplog.at_level(logging.WARNING):
        claims = [core_locks.claim(CORES) for _ in range(2)]
    assert [(it.cores, it.is_shared) for it in claims] == [(CORES, True)] * 2
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"process {other.pid} of "), warning
    assert "uses all cores that this service may use" in warning
    for it in claims:
        it.release()
    other.kill()
    other.communicate()
    claim = core_locks.claim(CORES)
    assert not claim.is_shared, "the death of its owner frees a core"
    claim.release()


def test_a_forked_process_keeps_no_core_locked() -> None:
    claim = core_locks.claim(CORES)
    context = multiprocessing.get_context("fork")
    end = context.Event()
    child = context.Process(target=end.wait)
    child.start()
    claim.release()
    other, theirs = holder(*CORES)
    assert theirs == CORES
    other.communicate("")
    end.set()
    child.join()


def test_a_server_keeps_its_cores_until_it_has_been_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CORES))

    def launched(**more: Any) -> tuple[Process, str]:
        """Start a program as a server, and return it and the cores to which it is bound."""
        job = Job(
            name="s", command=["sh", "-c", 'echo "$BOUND_TO"; exec sleep 600'], env={}, log=tmp_path / "log",
            bind_cores=lambda cores: {"BOUND_TO": "|".join(",".join(map(str, own)) for own in cores)}, **more,
        )  # fmt: skip
        process = SubprocessLauncher().launch(job)
        return process, process.stdout.readline().decode().strip()

    other, _ = holder(CORES[0])
    one, cores = launched(gpus=0)
    assert cores == f"{CORES[1]},{CORES[2]}"
    two, cores = launched(gpus=0, index=1, servers=2)
    assert cores == f"{CORES[2]}"
    one.stop(1.0)
    assert all_of(CORES) == CORES, "all are in use, so they are shared"
    two.stop(1.0)
    assert all_of(CORES) == CORES[1:]
    other.communicate("")
    alone, cores = launched(gpus=0)
    assert cores == "", "alone, an engine binds itself"
    alone.stop(1.0)
    pinned, cores = launched(gpu_ids=(0,))
    assert (cores, all_of(CORES)) == ("", CORES), "a server with GPUs locks no core"
    pinned.stop(1.0)


def all_of(cores: list[int]) -> list[int]:
    """Return what another process gets of these cores."""
    process, found = holder(*cores)
    process.communicate("")
    return found


# ------------------------------------------------------------------------------------------------------- of services

BOUND = """
from dataclasses import dataclass
from typing import ClassVar
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class Bound(EchoEngine):
    name: ClassVar[str] = "bound"

    def bind_cores(self, cores):
        return {"BOUND_TO": "|".join(",".join(map(str, own)) for own in cores)}

@hookimpl
def gserve_register_engines():
    return [Bound]
"""
SERVICE = """
import sys
from pathlib import Path
from gserve import VLLMService
from gserve_core.host import gpu_locks
gpu_locks.FOLDER = Path(sys.argv[2])  # other services of this user may have locked cores of this machine
with VLLMService.from_yaml(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def bound_to(owner: int) -> list[str | None]:
    """Return the cores of the servers that a process owns, as their environment has them; None: not bound."""
    found = []
    for pid, command in testing.our_processes().items():
        if "vllm_server.py" in command and "--forks" not in command:
            environ = dict(
                it.partition("=")[::2] for it in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in it
            )
            if environ.get("GSERVE_OWNER", "").startswith(f"{owner}:"):
                found.append(environ.get("BOUND_TO"))
    return sorted(found, key=str)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_services_of_one_user_divide_the_cores(tmp_path: Path) -> None:
    (tmp_path / "bound.py").write_text(BOUND)
    config = {"llm": {"model_name": "m"}, "engine": {"type": "bound"}, "plugins": ["bound"]}
    (tmp_path / "service.yaml").write_text(json.dumps({**config, "launcher": {"type": "subprocess", "nursery": False}}))
    first, second, *_ = sorted(os.sched_getaffinity(0))

    def start(*cores: int) -> "subprocess.Popen[str]":
        program = [sys.executable, "-c", SERVICE, str(tmp_path / "service.yaml"), str(tmp_path)]
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    taken = start(first)
    assert bound_to(taken.pid) == [None], "alone on its cores, an engine binds itself"
    beside = start(first, second)
    assert bound_to(beside.pid) == [str(second)], "it takes what is free"
    for process in (taken, beside):
        assert not process.communicate("")[1], "it warns of nothing"
        assert process.returncode == 0
