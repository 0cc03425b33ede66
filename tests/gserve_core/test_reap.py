"""What killed services leave behind is found and ended, and nothing else.

Other tests run on this machine at the same time, and root sees everybody's processes: only what a test has started
itself is ended here. The command `gserve reap` is tested in a machine of its own, as far as processes go.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gserve_core import reap
from gserve_core.host import processes, run_files, scratch, tokens
from gserve_core.interfaces import Address
from gserve_core.service import records

OWNER = """
import sys
from gserve import LLMConfig, VLLMServer
from gserve_core.engines.echo import EchoEngine
with VLLMServer(LLMConfig("demo"), engine=EchoEngine()) as server:
    print(server.record().instance, server.port, flush=True)
    sys.stdin.read()
"""


class Owner:
    """A program that owns a server."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.instance, port = self.process.stdout.readline().split()
        self.port = int(port)

    def orphans(self) -> list[reap.Process]:
        return [process for process in reap.orphans() if process.instance == self.instance]

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def owner() -> Iterator[Owner]:
    one = Owner()
    yield one
    one.close()


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_killed_service_could_not_end_itself_is_ended_and_its_files_removed(owner: Owner) -> None:
    folder = scratch.path_of(owner.instance)
    assert folder.is_dir()
    ours = processes.processes_of(owner.instance)
    assert len(ours) == 2, "the server and the process of its engine"
    for pid in ours:
        os.kill(pid, signal.SIGSTOP)
    assert owner.orphans() == []
    owner.process.kill()
    owner.process.wait()
    found = owner.orphans()
    assert sorted(process.pid for process in found) == sorted(ours)
    assert any("vllm_server.py" in str(process) for process in found)
    assert folder not in reap.unused_files()
    assert reap.end(found) == []
    assert processes.processes_of(owner.instance) == []
    assert owner.orphans() == []
    files = [path for path in reap.unused_files() if path == folder or path.name == f"token-127.0.0.1-{owner.port}"]
    assert len(files) == 2
    for path in files:
        reap.remove(path)
        assert not path.exists()


def test_a_living_service_and_its_files_are_left_alone(owner: Owner) -> None:
    assert owner.orphans() == []
    files = reap.unused_files()
    assert scratch.path_of(owner.instance) not in files
    assert not any(str(owner.port) in path.name for path in files)
    assert len(processes.processes_of(owner.instance)) == 2


SERVER = """
import os, sys
from gserve_core.host import scratch
scratch.make(sys.argv[1])
os.execvp("sh", ["sh", "-c", sys.argv[2]])
"""


class Marked:
    """A process with the environment of a server, which has made its temporary folder."""

    def __init__(self, owner: str, command: str = "exec sleep 600") -> None:
        self.instance = uuid.uuid4().hex
        environ = os.environ | {processes.ID_VARIABLE: self.instance, processes.OWNER_VARIABLE: owner}
        program = [sys.executable, "-c", SERVER, self.instance, f"echo running; {command}"]
        self.process = subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "running\n"
        eventually(lambda: self.process.pid in processes.processes_of(self.instance))

    def orphans(self) -> list[reap.Process]:
        return [process for process in reap.orphans() if process.instance == self.instance]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        shutil.rmtree(scratch.path_of(self.instance))


@pytest.fixture
def marked() -> Iterator[Callable[..., Marked]]:
    made: list[Marked] = []

    def make(owner: str, command: str = "exec sleep 600") -> Marked:
        made.append(Marked(owner, command))
        return made[-1]

    yield make
    for one in made:
        one.close()


def dead_owner() -> str:
    """Return the mark of a process that has ended."""
    program = "from gserve_core.host import processes; print(processes.owner_mark())"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_of_a_living_owner_is_no_orphan(marked: Callable[..., Marked]) -> None:
    assert marked(processes.owner_mark()).orphans() == []


MARKS = (processes.ID_VARIABLE, processes.OWNER_VARIABLE, processes.SERVER_VARIABLE, "TMPDIR")


def environ(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def user() -> Iterator[Callable[..., int]]:
    """Start programs of a user, in sessions of their own or in ours; they end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*, new_session: bool = True, **marks: str) -> int:
        program = [sys.executable, "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(program, env=os.environ | marks, start_new_session=new_session))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("new_session", [True, False])
def test_a_program_that_only_inherited_the_marks_of_a_server_is_no_orphan(
    marked: Callable[..., Marked], user: Callable[..., int], new_session: bool
) -> None:
    one = marked(dead_owner())
    started = processes.process_start(one.process.pid)
    marks = {name: value for name, value in environ(one.process.pid).items() if name in MARKS}
    user(new_session=new_session, **marks)
    user(new_session=new_session, **marks, **{processes.SERVER_VARIABLE: f"{one.process.pid}:{started}"})
    user(new_session=new_session, **{processes.ID_VARIABLE: one.instance})
    user(new_session=new_session, **marks | {processes.ID_VARIABLE: uuid.uuid4().hex})
    assert [process.pid for process in one.orphans()] == [one.process.pid]
    one.process.kill()
    one.process.wait()
    assert one.orphans() == []


def test_the_processes_of_a_server_s_session_are_its_own_also_when_it_has_ended(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner(), "sleep 600 & echo $!; wait")
    assert one.process.stdout is not None
    child = int(one.process.stdout.readline())
    assert {process.pid for process in one.orphans()} == {one.process.pid, child}
    one.process.kill()
    one.process.wait()
    assert [process.pid for process in one.orphans()] == [child]
    assert reap.end(one.orphans()) == []


def test_what_descends_from_a_server_is_its_own_in_whatever_session(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner(), "setsid -w sh -c 'sleep 600 & echo $!; wait' & wait")
    assert one.process.stdout is not None
    below = int(one.process.stdout.readline())
    found = one.orphans()
    assert below in {process.pid for process in found}
    assert len(found) >= 3
    assert reap.end(found) == []


def test_a_process_of_a_dead_owner_is_one(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner())
    assert [process.pid for process in one.orphans()] == [one.process.pid]
    eventually(lambda: str(one.orphans()[0]) == f"process {one.process.pid} (sleep 600)")  # the shell becomes that


def test_an_owner_is_dead_also_when_another_process_has_its_id_now(marked: Callable[..., Marked]) -> None:
    pid, started, boot = processes.owner_mark().split(":")
    assert len(marked(f"{pid}:{int(started) - 1}:{boot}").orphans()) == 1


def test_a_process_whose_owner_is_on_another_machine_or_unknown_is_no_orphan(marked: Callable[..., Marked]) -> None:
    pid, started, _ = dead_owner().split(":")
    for mark in (f"{pid}:{started}:{uuid.uuid4()}", "", "who?", "1:2:3:4"):
        assert marked(mark).orphans() == []


def test_a_process_may_end_in_order(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner(), "trap 'echo in order; exit' TERM; echo ready; while :; do sleep 0.05; done")
    assert one.process.stdout is not None
    assert one.process.stdout.readline() == "ready\n"
    assert reap.end([it for it in one.orphans() if it.pid == one.process.pid]) == []
    assert one.process.communicate()[0] == "in order\n"


def test_a_process_that_does_not_end_is_killed(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner(), "trap '' TERM; echo ready; exec sleep 600")
    assert one.process.stdout is not None
    assert one.process.stdout.readline() == "ready\n"
    assert reap.end(one.orphans()) == []
    assert one.process.wait() == -signal.SIGKILL


def test_a_process_that_has_the_id_of_one_that_was_found_is_left_alone(marked: Callable[..., Marked]) -> None:
    one = marked(dead_owner())
    (found,) = one.orphans()
    assert reap.end([replace(found, started=found.started - 1)]) == []
    assert one.process.poll() is None


def test_a_temporary_folder_is_used_as_long_as_the_server_lives_also_one_started_by_hand(tmp_path: Path) -> None:
    instance = uuid.uuid4().hex
    using = f"from gserve_core.host import scratch; print(scratch.make({instance!r}), flush=True); input()"
    unused = "from gserve_core.host import scratch; print(*scratch.unused(()))"
    environ = os.environ | {"TMPDIR": str(tmp_path)}

    def found() -> str:
        return subprocess.run(
            [sys.executable, "-c", unused], env=environ, capture_output=True, text=True
        ).stdout.strip()

    with subprocess.Popen(
        [sys.executable, "-c", using], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        folder = server.stdout.readline().strip()
        assert Path(folder) == tmp_path / f"gserve-{instance[:12]}"
        assert found() == ""
        server.kill()
    assert found() == folder
    Path(folder).rename(tmp_path / "gserve-0")
    (tmp_path / "gserve-ab12ab12ab12").symlink_to(tmp_path)
    assert found() == ""


def test_the_token_of_a_server_that_does_not_answer_is_kept_while_its_socket_is_open(owner: Owner) -> None:
    server = min(processes.processes_of(owner.instance))
    os.kill(server, signal.SIGSTOP)
    try:
        assert not any(str(owner.port) in path.name for path in reap.unused_files())
    finally:
        os.kill(server, signal.SIGCONT)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    reap.remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_state_files_that_nobody_owns_are_found() -> None:
    address = Address(["127.0.0.1"], 1)
    tokens.write_token(address, "token")
    pid, started, _ = dead_owner().split(":")
    records.write_service(records.ServiceRecord("dead", int(pid), int(started), [], {"type": "http"}))
    alive = records.ServiceRecord("alive", os.getpid(), processes.process_start(os.getpid()) or 0, [], {"type": "http"})
    records.write_service(alive)
    try:
        assert [path.name for path in records.stale_files()] == ["service-dead", "token-127.0.0.1-1"]
    finally:
        for path in run_files.folder().iterdir():
            path.unlink()
