"""Processes of this machine: how they are ended, and that they outlive the threads that started them."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gserve import LaunchError
from gserve_core import lease
from gserve_core.command_launcher import LocalProcess
from gserve_core.engines.vllm.engine import CORES_VARIABLE, VLLMEngine
from gserve_core.host import processes
from gserve_core.host.child_process import output_of
from gserve_core.host.process_groups import group_is_alive
from gserve_core.interfaces import Job
from gserve_launchers.local import SubprocessLauncher

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = subprocess.Popen([sys.executable, "-c", '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("set", flush=True)
time.sleep(600)
'''])
print(below.pid, flush=True)
time.sleep(600)
"""
ORPHANER = """
import subprocess, sys
print(subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL).pid, flush=True)
sys.stdin.readline()
sys.exit(7)
"""


def launched(job: Job) -> LocalProcess:
    process = SubprocessLauncher().launch(job)
    assert isinstance(process, LocalProcess)
    return process


def launch(tmp_path: Path, *command: str) -> LocalProcess:
    return launched(Job(name="job", command=command, log=tmp_path / "log"))


def python(tmp_path: Path, text: str) -> LocalProcess:
    return launch(tmp_path, sys.executable, "-c", text)


def lines(process: LocalProcess, count: int) -> list[bytes]:
    text = b""
    while text.count(b"\n") < count:
        text += os.read(process.stdout.fileno(), 100)
    return text.split(b"\n")[:count]


def until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while processes.process_start(pid) is not None:
        assert time.monotonic() < deadline, f"{pid} is alive"
        time.sleep(0.01)


def test_a_process_that_ignores_sigterm_is_killed_with_all_below_it(tmp_path: Path) -> None:
    process = python(tmp_path, STUBBORN)
    below = next(int(line) for line in lines(process, 2) if line.isdigit())
    began = time.monotonic()
    assert process.stop(0.5) == -signal.SIGKILL
    assert 0.4 < time.monotonic() - began < 20
    until_gone(below)
    assert not group_is_alive(process.pid)


def test_what_a_process_left_below_it_is_ended_too(tmp_path: Path) -> None:
    process = python(tmp_path, ORPHANER)
    below = int(lines(process, 1)[0])
    process.stdin.write(b"\n")
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert processes.process_start(below) is not None
    assert process.stop(0.5) == 7
    until_gone(below)


def test_stop_is_idempotent_from_any_number_of_threads(tmp_path: Path) -> None:
    process = python(tmp_path, "import time; time.sleep(600)")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: process.stop(5), range(16))) == {-signal.SIGTERM}
    assert process.stop(5) == process.poll() == -signal.SIGTERM
    assert process.stdin.closed
    assert process.stdout.closed


@pytest.mark.parametrize(
    ("text", "code"),
    [("", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)],
    ids=["exit 0", "exit 3", "SIGKILL"],
)
def test_the_exit_code_is_that_of_the_process(tmp_path: Path, text: str, code: int) -> None:
    process = python(tmp_path, text)
    deadline = time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() == code
    assert process.stop(1) == code


@pytest.mark.parametrize("program", ["/nonexistent/program", "/etc/passwd", "/", "a\0b"])
def test_a_program_that_cannot_be_started_is_named(tmp_path: Path, program: str) -> None:
    with pytest.raises(LaunchError, match="cannot start"):
        launch(tmp_path, program)


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    job = Job(name="job", command=["true"], log=tmp_path / "no" / "such" / "folder")
    with pytest.raises(LaunchError, match="No such file or directory"):
        SubprocessLauncher().launch(job)


@pytest.mark.parametrize(
    ("servers", "index", "ranks", "cores"),
    [(1, 0, 0, "None"), (1, 0, 1, "None"), (2, 1, 0, "2,3"), (1, 0, 2, "0,1|2,3"), (2, 1, 2, "2|3")],
)
def test_servers_and_ranks_without_gpus_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: int, index: int, ranks: int, cores: str
) -> None:
    monkeypatch.delenv(CORES_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    command = [sys.executable, "-c", f"import os; print(os.environ.get({CORES_VARIABLE!r}))"]
    job = Job(name="job", command=command, log=tmp_path / "log", servers=servers, index=index, gpus=ranks)
    process = launched(replace(job, bind_cores=VLLMEngine().bind_cores))
    assert lines(process, 1) == [cores.encode()]
    process.stop(1)


def test_a_process_leads_a_session_of_its_own(tmp_path: Path) -> None:
    process = python(tmp_path, "import time; time.sleep(600)")
    try:
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
    finally:
        process.stop(1)


def test_servers_outlive_the_threads_that_started_them(tmp_path: Path) -> None:
    def begin(index: int) -> tuple[LocalProcess, lease.OwnerEnd]:
        program = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
        job = Job(name=f"job-{index}", command=[sys.executable, "-S", "-c", program], log=tmp_path / f"{index}.log")
        process = launched(job)
        return process, lease.OwnerEnd(process.stdin, process.stdout, lease.Hello(f"i{index}", "t"))

    with ThreadPoolExecutor(20) as pool:
        started = list(pool.map(begin, range(20)))
    try:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
        time.sleep(0.5)
        assert [process.poll() for process, _ in started] == [None] * 20
    finally:
        for process, owner in started:
            owner.close()
            process.stop(5)


def test_a_process_whose_name_is_no_text_stops_no_end(tmp_path: Path) -> None:
    """The kernel cuts names after 15 bytes, where that may be in the middle of a letter."""
    named = "import sys; open('/proc/self/comm', 'wb').write(b'donn\\xc3'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", named], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        odd.stdout.readline()
        process = python(tmp_path, STUBBORN)
        lines(process, 2)
        assert process.stop(0.1) == -signal.SIGKILL
        odd.kill()


ASKS = """
import signal, subprocess
from gserve_core.host.child_process import output_of
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
assert output_of(["echo", "rows"], {}, 9.0) == "rows\\n"
assert output_of(["true"], {}, 9.0) == ""
try:
    output_of(["sh", "-c", "echo refused >&2; exit 1"], {}, 9.0)
except subprocess.CalledProcessError as error:
    assert error.stderr == "refused\\n"
else:
    raise AssertionError("no answer was taken for one")
"""


def test_a_command_that_fails_is_seen_to_fail_where_sigchld_is_ignored() -> None:
    subprocess.run([sys.executable, "-c", ASKS], check=True)


def test_a_command_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        output_of(["sleep", "60"], {}, 0.2)
    assert time.monotonic() - began < 20
