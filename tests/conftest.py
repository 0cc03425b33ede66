"""What holds for the whole suite: own folders for state, and nothing left behind after any test."""

import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from gserve_core import runtime, testing
from gserve_core.testing import slurm

nothing_left = testing.nothing_left
slurm_cluster = slurm.slurm_cluster
pytest_terminal_summary = slurm.pytest_terminal_summary
ENGINE = (
    "tests/gserve_core/engines/", "tests/test_faults_vllm.py", "tests/test_quickstart.py", "tests/test_seed_readme.py",
    "tests/slurm/test_vllm_on_nodes.py",
)  # fmt: skip
"""Tests that start real vLLM. Two cores bear one engine at a time: with several test processes, all are in one."""
SLURM = ("tests/slurm/",)
"""Tests that need the cluster, of which one is enough."""
ROOT = Path(__file__).parent.parent


class OneEngine(LoadScopeScheduling):
    """Gives whole files to test processes; all that start real vLLM to one of them, all that use SLURM to one."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ENGINE):
            return "engine"
        return "slurm" if nodeid.startswith(SLURM) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEngine:
    """Choose how tests are spread over processes."""
    return OneEngine(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the suite's state and logs apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv(runtime.PLACE_VARIABLE, "")  # the second place, which all sessions of a user share
        for name in ("GSERVE_LOG_LEVEL", "GSERVE_TOKEN", "GSERVE_ATTACH", "CUDA_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        patch.setenv(testing.RUN_VARIABLE, uuid.uuid4().hex)
        tree = _changed_files()
        yield
        assert not testing.end_leftovers({}), "processes left behind by the suite"
        assert not testing.our_files(), "state files left behind by the suite"
        if os.environ.get("CI"):  # elsewhere somebody may be at work in it
            assert _changed_files() == tree, "the suite changed files of the checkout"


@pytest.fixture(autouse=True)
def clean(nothing_left: None) -> Iterator[None]:
    """Fail where a test leaves a process, a state file or a listening socket behind."""
    children, sockets = _children(), _listening()
    yield
    assert not _children() - children, "child processes left behind"
    assert not _listening() - sockets, "listening sockets left behind"


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


def _listening() -> set[int]:
    found = psutil.Process().net_connections("inet")
    return {it.laddr.port for it in found if it.type == socket.SOCK_STREAM and it.status == psutil.CONN_LISTEN}


def _changed_files() -> str:
    return subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
