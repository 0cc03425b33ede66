"""One writer for a file of results."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve import ConfigError
from gserve_core.batch import output_lock
from gserve_core.batch.output_lock import Holder, check_free, only_writer, this_process

HOLD = """
import sys, time
from pathlib import Path
from gserve_core.batch.output_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@contextmanager
def holder(output: Path, **environ: str) -> "Iterator[subprocess.Popen[str]]":
    """Give another process that writes `output`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], env=os.environ | environ, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "has it\n"
        yield process


@pytest.fixture(params=["flock", "no flock", "no hard links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take away what some file systems do not have, in this process."""

    def none(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", none)
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", none)
    return str(request.param)


def left_by(output: Path, **changed: Any) -> Path:
    """Write the lock of a process that was killed on another machine."""
    there = {"host": "elsewhere", "mark": "1:2:another-boot", "pid": 1}
    value = msgspec.structs.replace(this_process(), **(there | changed))
    path = output.with_name(f".{output.name}.lock")
    path.write_bytes(msgspec.json.encode(value))
    return path


@pytest.mark.usefixtures("file_system")
def test_a_second_writer_is_refused_and_told_who_the_first_is(output: Path) -> None:
    with holder(output, SLURM_JOB_ID="77") as first:
        said = rf"out.jsonl: already being written by process {first.pid} on \S+, SLURM job 77: wait for its end"
        with pytest.raises(ConfigError, match=said), only_writer(output):
            pytest.fail("two writers")
        with pytest.raises(ConfigError, match=said):
            check_free(output)
    check_free(output)
    with only_writer(output), pytest.raises(ConfigError, match=f"process {os.getpid()} "), only_writer(output):
        pytest.fail("two writers")
    assert list(output.parent.iterdir()) == []


@pytest.mark.usefixtures("file_system")
def test_a_holder_that_was_killed_holds_it_no_more(output: Path) -> None:
    with holder(output) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with only_writer(output):
            pass
    assert list(output.parent.iterdir()) == []


def test_it_is_the_files_whatever_its_name_and_also_once_it_was_replaced(output: Path) -> None:
    output.write_text("")
    link = output.with_name("link.jsonl")
    link.symlink_to(output)
    with holder(output):
        new = output.with_name("new")
        new.write_text("new")
        new.replace(output)
        with pytest.raises(ConfigError, match="already being written"), only_writer(link):
            pytest.fail("two writers")


def test_devices_and_pipes_have_none() -> None:
    with only_writer(Path(os.devnull)), only_writer(Path(os.devnull)):
        pass


def test_where_it_cannot_be_written_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the results: No such file"), only_writer(tmp_path / "no" / "x"):
        pytest.fail("it has it")


def test_a_holder_on_another_machine_counts_as_alive_until_its_job_is_over(output: Path) -> None:
    path = left_by(output, job="77")
    said = rf"process 1 on elsewhere, SLURM job 77.*\(if that has ended, remove {path}\)"
    with pytest.raises(ConfigError, match=said), only_writer(output):
        pytest.fail("two writers")
    with only_writer(output, lambda job: job == "77"):
        pass
    left_by(output)
    with pytest.raises(ConfigError, match="process 1 on elsewhere: wait"), only_writer(output, lambda _: True):
        pytest.fail("two writers")


def test_an_earlier_run_of_the_same_job_holds_it_no_more(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    left_by(output, job="77", restarts=2)
    with pytest.raises(ConfigError, match="job 77"), only_writer(output):
        pytest.fail("two tasks of one job")
    left_by(output, job="77", restarts=1)
    with only_writer(output):
        pass


def test_a_machine_that_was_started_again_holds_it_no_more(output: Path) -> None:
    left_by(output, host=this_process().host)
    with only_writer(output):
        pass
    assert list(output.parent.iterdir()) == []


def test_many_that_come_at_once_have_it_one_after_the_other(output: Path) -> None:
    program = """
import sys
from pathlib import Path
from gserve import ConfigError
from gserve_core.batch.output_lock import only_writer
output, busy, done = Path(sys.argv[1]), Path(sys.argv[1] + ".busy"), 0
while done < 25:
    try:
        with only_writer(output):
            busy.touch(exist_ok=False)
            busy.unlink()
            done += 1
    except ConfigError:
        pass
"""
    several = [subprocess.Popen([sys.executable, "-c", program, str(output)]) for _ in range(4)]
    assert [process.wait(60) for process in several] == [0] * 4
    assert list(output.parent.iterdir()) == []


def test_a_holder_is_shown_with_its_job() -> None:
    one = Holder(host="n1", pid=4, mark="", namespace="", job="5")
    assert str(one) == "process 4 on n1, SLURM job 5"
    assert output_lock.this_process().pid == os.getpid()


def test_one_that_is_taken_before_its_maker_has_locked_it_is_not_its_makers(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on file systems without hard links, where it is there for a moment before it is locked."""

    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    usual = output_lock._flock
    others: list[Any] = []

    def late(descriptor: int) -> bool | None:
        if not others and output_lock._lock_path(output).exists():  # type: ignore[union-attr]
            others.append(only_writer(output))
            others[0].__enter__()
        return usual(descriptor)

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(output_lock, "_flock", late)
    with pytest.raises(ConfigError, match="already being written"), only_writer(output):
        pass
    others[0].__exit__(None, None, None)
    with only_writer(output):
        pass
