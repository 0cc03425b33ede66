"""What holds for the whole suite: own folders for state, and nothing left behind after any test."""

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from gserve_core import testing
from gserve_core.host import processes, run_files
from tests.slurm import cluster

default_signals = testing.default_signals
nothing_left = testing.nothing_left
slurm_cluster = cluster.slurm_cluster
pytest_terminal_summary = cluster.pytest_terminal_summary
ENGINE = (
    "tests/gserve_core/engines/vllm/", "tests/clients/", "tests/test_faults_vllm.py", "tests/test_quickstart.py",
    "tests/test_seed_readme.py", "tests/gserve_core/host/test_core_locks.py", "tests/slurm/test_vllm_on_nodes.py",
    "tests/slurm/test_vllm_ranks.py",
)  # fmt: skip
"""Tests that start real vLLM. Two cores bear one engine at a time: with several test processes, all are in one."""
SLURM = ("tests/slurm/",)
"""Tests that need the cluster, of which one is enough."""
LONGEST = ("engine", "slurm", "tests/test_faults.py", "tests/ssh/")
"""The longest scopes, in the order in which they begin: a long one that began last would run alone at the end."""
ROOT = Path(__file__).parent.parent
SURROUNDINGS = ("GSERVE_", "SLURM_", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_", "SACCT_")
"""Beginnings of the variables by which a user's shell, or a job of SLURM, would change what is tested."""


class OneEngine(LoadScopeScheduling):
    """Gives whole files to test processes; all that start real vLLM to one of them, all that use SLURM to one."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope_of(nodeid)


def _scope_of(nodeid: str) -> str:
    if nodeid.startswith(ENGINE):
        return "engine"
    return "slurm" if nodeid.startswith(SLURM) else nodeid.partition("::")[0]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest scopes first where several test processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _rank(_scope_of(item.nodeid)))


def _rank(scope: str) -> int:
    return next((rank for rank, beginning in enumerate(LONGEST) if scope.startswith(beginning)), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI, let a test fail that is skipped since this machine lacks something. Long forms may be skipped."""
    report = yield
    if os.environ.get("CI") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if "LONG=1" not in reason:
            report.outcome, report.longrepr = "failed", f"{reason} (under CI what cannot be tested is a failure)"
    return report


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEngine:
    """Choose how tests are spread over processes."""
    return OneEngine(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, default_signals: None) -> Iterator[None]:
    """Keep the suite's state and logs apart from the user's, and what it starts from what the user's shell has set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        for name in [*os.environ]:
            if name == "CUDA_VISIBLE_DEVICES" or name.startswith(SURROUNDINGS):
                patch.delenv(name)
        patch.setenv(run_files.PLACE_VARIABLE, "")  # the second place, which all sessions of a user share
        patch.setenv(testing.RUN_VARIABLE, uuid.uuid4().hex)
        tree = _changed_files()
        yield
        assert not testing.end_leftovers({}), "processes left behind by the suite"
        assert not testing.our_files(), "state files left behind by the suite"
        if os.environ.get("CI"):  # elsewhere somebody may be at work in it
            assert _changed_files() == tree, "the suite changed files of the checkout"


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules that a test has imported from its own folder: another test may have one of the same name."""
    paths, modules, base = [*sys.path], {*sys.modules}, str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = paths
    for name in sys.modules.keys() - modules:
        module = sys.modules[name]
        if isinstance(module, ModuleType) and str(vars(module).get("__file__")).startswith(base):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def clean(nothing_left: None) -> Iterator[None]:
    """Fail where a test leaves a process, a state file or a listening socket behind; end the processes."""
    before, sockets = {*psutil.pids()}, _listening()
    began = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    yield
    _, left = psutil.wait_procs(_started_since(began, before), timeout=testing.END_SECONDS)
    told = [f"{process.pid} {_command(process)}" for process in left]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=testing.END_SECONDS)
    assert not told, f"processes left behind: {told}"
    assert not _listening() - sockets, "listening sockets left behind"


def _started_since(began: float, before: set[int]) -> list[psutil.Process]:
    """Return the live processes that this one has started since then (in clock ticks), and all below them.

    before: ids of the processes of that time, which are not looked at. Ids are given out again only after all others.
    """
    mark = f"\0{testing.RUN_VARIABLE}={os.environ[testing.RUN_VARIABLE]}\0".encode()
    started = []
    for pid in {*psutil.pids()} - before:
        with suppress(OSError, psutil.Error):
            process = psutil.Process(pid)
            is_ours = process.ppid() == os.getpid()
            is_ours = is_ours or mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
            start = processes.process_start(pid)
            if is_ours and start is not None and start >= int(began):
                started.append(process)
    return started


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "that has ended by now"


def _listening() -> set[int]:
    found = psutil.Process().net_connections("inet")
    return {it.laddr.port for it in found if it.type == socket.SOCK_STREAM and it.status == psutil.CONN_LISTEN}


def _changed_files() -> str:
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
