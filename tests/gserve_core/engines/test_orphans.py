"""Processes end with the server that they belong to, when nobody is left to end them: real processes, no engine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve_core.host import processes

SERVER = """
import os, subprocess, sys, threading, time
from gserve_core.host import processes
from gserve_core.engines import orphans
name = f"{os.getpid()}:{processes.process_start(os.getpid())}"
if sys.argv[1] == "named":
    os.environ["GSERVE_SERVER"] = name
orphans.watch()
assert threading.active_count() == 1, "the server does not watch itself"
child = subprocess.Popen([sys.executable, "-c", CHILD])
forked = os.fork()
if not forked:
    time.sleep(600)
print(child.pid, forked, flush=True)
time.sleep(600)
"""
CHILD = """
import os, time
from gserve_core.engines import orphans
orphans.watch()
orphans.watch()
grandchild = os.fork()
time.sleep(600)
"""


@pytest.fixture
def named() -> str:
    return "named"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "gserve-0123456789ab"
    folder.mkdir()
    (folder / "socket").touch()
    return folder


@pytest.fixture
def server(scratch: Path, named: str) -> Iterator[tuple[int, list[int]]]:
    """Start a "server" in a session of its own; give its process id, and those of its group."""
    program = SERVER.replace("CHILD", repr(CHILD))
    environ = {name: value for name, value in os.environ.items() if name != "GSERVE_SERVER"}
    with subprocess.Popen(
        [sys.executable, "-c", program, named], env=environ | {"TMPDIR": str(scratch)}, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        line = server.stdout.readline()
        deadline = time.monotonic() + 20.0
        while len(below := group(server.pid)) < 4:  # the server, its child, that one's fork, its own fork
            assert time.monotonic() < deadline, f"only {below}; {line}"
            time.sleep(0.05)
        time.sleep(0.5)  # they watch now
        yield server.pid, below
        for pid in group(server.pid):
            os.kill(pid, signal.SIGKILL)


def wait_gone(folder: Path) -> None:
    deadline = time.monotonic() + 60.0
    while folder.exists():
        assert time.monotonic() < deadline, f"{folder} is left: {[*folder.iterdir()]}"
        time.sleep(0.05)


def group(leader: int) -> list[int]:
    """Return the live processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and processes.process_start(int(entry.name)) is not None:
            try:
                if os.getpgid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except ProcessLookupError:
                pass
    return found


def test_children_and_forks_end_with_the_server_and_its_folder_goes(
    server: tuple[int, list[int]], scratch: Path
) -> None:
    pid, below = server
    assert len(below) == 4
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60.0
    while left := group(pid):
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.05)
    wait_gone(scratch)


WITHOUT_DESCRIPTORS = """
import os, resource, time
from gserve_core.engines import orphans
orphans.GRACE = 0.0
orphans.watch()
while not any("pidfd" in os.path.realpath(f"/proc/self/fd/{number}") for number in range(3, 9)):
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
time.sleep(2.5)  # it has looked twice
print("alive", flush=True)
time.sleep(600)
"""


def test_a_process_without_descriptors_sees_the_end_of_its_server_and_none_before(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as server:
        environ = os.environ | {
            "TMPDIR": str(tmp_path), "GSERVE_SERVER": f"{server.pid}:{processes.process_start(server.pid)}",
        }  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-c", WITHOUT_DESCRIPTORS], env=environ, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            said = child.stdout.readline()
            server.kill()
            assert (said, child.wait(60.0)) == ("alive\n", -signal.SIGKILL)


@pytest.mark.parametrize("named", ["nameless"])
def test_where_no_server_is_named_nothing_is_done(server: tuple[int, list[int]], scratch: Path) -> None:
    pid, below = server
    os.kill(pid, signal.SIGKILL)
    time.sleep(4.0)
    assert set(group(pid)) == set(below) - {pid}
    assert scratch.exists()


def test_the_folder_goes_too_where_the_process_ends_by_itself(scratch: Path) -> None:
    program = (
        "import time\nfrom gserve_core.engines import orphans\norphans.GRACE = 60.0\norphans.watch()\ntime.sleep(0.5)"
    )
    gone = f"{os.getpid()}:1"
    environ = os.environ | {"TMPDIR": str(scratch), "GSERVE_SERVER": gone}
    ended = subprocess.run([sys.executable, "-c", program], env=environ, timeout=60.0, check=False)
    assert ended.returncode == 0, "its own end is the quicker one"
    wait_gone(scratch)


LATE = """
import os, time
from pathlib import Path
from gserve_core.engines import orphans
orphans.GRACE = 60.0
orphans.watch()
time.sleep(1.0)
folder = Path(os.environ["TMPDIR"])
folder.mkdir(exist_ok=True)
(folder / "late").touch()
"""


def test_the_folder_goes_too_where_a_process_writes_to_it_until_it_ends_by_itself(scratch: Path) -> None:
    environ = os.environ | {"TMPDIR": str(scratch), "GSERVE_SERVER": f"{os.getpid()}:1", "GSERVE_ID": "0123456789ab"}
    ended = subprocess.run([sys.executable, "-c", LATE], env=environ, timeout=60.0, check=False)
    assert ended.returncode == 0
    wait_gone(scratch)


def test_the_folder_goes_too_where_the_owner_lives_and_does_nothing(scratch: Path) -> None:
    environ = os.environ | {
        "TMPDIR": str(scratch), "GSERVE_SERVER": f"{os.getpid()}:1", "GSERVE_OWNER": processes.owner_mark(),
    }  # fmt: skip
    program = "import time\nfrom gserve_core.engines import orphans\norphans.watch()\ntime.sleep(600)"
    ended = subprocess.run([sys.executable, "-c", program], env=environ, timeout=60.0, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_gone(scratch)


def test_a_link_to_the_folder_goes_with_it(scratch: Path, tmp_path: Path) -> None:
    link = tmp_path / "short" / scratch.name
    link.parent.mkdir()
    link.symlink_to(scratch)
    environ = os.environ | {"TMPDIR": str(link), "GSERVE_SERVER": f"{os.getpid()}:1", "GSERVE_ID": "0123456789ab"}
    subprocess.run([sys.executable, "-c", LATE], env=environ, timeout=60.0, check=False)
    wait_gone(scratch)
    assert not link.is_symlink()


def test_a_folder_that_is_not_the_servers_own_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    program = "import os, time\nfrom gserve_core.engines import orphans\norphans.watch()\ntime.sleep(600)"
    gone = f"{os.getpid()}:1"  # this process did not start with the machine: whoever did is gone
    environ = os.environ | {"TMPDIR": str(tmp_path), "GSERVE_SERVER": gone}
    ended = subprocess.run([sys.executable, "-c", program], env=environ, timeout=60.0, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "precious").exists()
