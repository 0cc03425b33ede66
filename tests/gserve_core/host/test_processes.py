"""Real processes: found by their environment, and below this one, also where some of them cannot be read."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve_core.host import processes


@pytest.fixture
def family() -> Iterator[list[int]]:
    """Return the ids of a child and of its child."""
    program = "import subprocess, sys; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{program}; child.wait()"], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        below = int(child.stdout.readline())
        yield [child.pid, below]
        os.kill(below, signal.SIGKILL)
        child.wait(30)


def test_descendants_are_found_also_where_another_process_cannot_be_read(
    family: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = psutil.Process.ppid

    def ppid(process: psutil.Process) -> int:
        if process.pid == 1:
            raise psutil.AccessDenied(1)
        if process.pid == os.getpid():
            raise OSError(24, "Too many open files")
        return usual(process)

    monkeypatch.setattr(psutil.Process, "ppid", ppid)
    assert set(family) <= {process.pid for process in processes.descendants()}


def test_a_process_is_found_whose_environment_has_an_empty_entry() -> None:
    environ: Any = (ctypes.c_char_p * 4)(b"A=1", b"", b"GSERVE_ID=odd", None)
    arguments: Any = (ctypes.c_char_p * 3)(b"sleep", b"600", None)
    libc = ctypes.CDLL(None)
    child = os.fork()
    if child == 0:
        libc.execve(b"/bin/sleep", arguments, environ)
        os._exit(1)
    try:
        deadline = time.monotonic() + 30
        while not (found := processes.processes_of("odd")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found == [child]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_process_that_cannot_be_read_hides_no_other(family: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Path.read_bytes

    def read(path: Path) -> bytes:
        if str(path) == f"/proc/{family[0]}/environ":
            raise OSError(24, "Too many open files")
        return usual(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    found = {pid for pid, _ in processes.environments()}
    assert family[0] not in found
    assert family[1] in found
