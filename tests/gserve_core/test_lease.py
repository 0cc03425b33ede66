"""The lease, spoken by hand: a server as a raw process, JSON lines on its stdin and stdout."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve_core import lease
from gserve_core.host import processes
from gserve_core.messages import Group, RunRequest
from gserve_core.overview import Counters

PROGRAM = Path(__file__).parents[2] / "gserve" / "vllm_server.py"
HELLO = {"type": "hello", "instance": "the-instance", "token": "the-token"}
ENDS_WITHIN = 15.0
"""Seconds: three times what is promised, for a loaded machine; what does not watch its line lives for a minute."""

NOISY = """
import os, subprocess, sys, time
print("noise on stdout, from the import of a plugin", flush=True)
os.write(1, b"and past Python's own buffers\\n")
subprocess.run(["echo", "from a program"], check=True)
time.sleep(float(os.environ.get("IMPORT_SECONDS", "0")))
from dataclasses import dataclass
from typing import ClassVar
from gserve_core.engines.echo import EchoEngine
from gserve import hookimpl

@dataclass(frozen=True, kw_only=True)
class Noisy(EchoEngine):
    name: ClassVar[str] = "noisy"

    async def start(self, llm, report):
        print("noise while it loads", flush=True)
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [Noisy]
"""


class Leased:
    """A server process, and the owner's end of its line."""

    def __init__(self, folder: Path, *arguments: str, engine: dict[str, Any] | None = None) -> None:
        self.log = folder / "log"
        section = json.dumps({"type": "echo", **(engine or {})})
        command = [sys.executable, str(PROGRAM), "--serve", "--model", "m", "--port", "0", "--engine", section]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, "--lease"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                env={**os.environ, "GSERVE_ID": "lease"}, start_new_session=True,
            )  # fmt: skip
        self._rest = b""
        self.heard: list[dict[str, Any]] = []

    def say(self, message: dict[str, Any] | bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def hear(self, kind: str, seconds: float = 60.0) -> dict[str, Any]:
        """Return the next message of a kind; every line that comes must be a message."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while True:
            line, newline, self._rest = self._rest.partition(b"\n")
            if newline:
                message: dict[str, Any] = json.loads(line)
                self.heard.append(message)
                if message["type"] == kind:
                    return message
                continue
            self._rest = line
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no '{kind}' within {seconds:g} s; heard {self.heard}"
            if select.select([self.process.stdout], [], [], remaining)[0]:
                chunk = os.read(self.process.stdout.fileno(), 1 << 16)
                assert chunk, f"the line ended before '{kind}'; heard {self.heard}; log:\n{self.log.read_text()}"
                self._rest += chunk

    def until_loading(self) -> None:
        while self.hear("phase")["text"] != "loading":
            pass

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def leased(folder: Path, *arguments: str, **engine: Any) -> Iterator[Leased]:
    server = Leased(folder, *arguments, engine=engine)
    try:
        yield server
    finally:
        server.close()


def below(pid: int) -> list[int]:
    """Return the children of a process."""
    return [int(it) for task in Path(f"/proc/{pid}/task").iterdir() for it in (task / "children").read_text().split()]


def until_gone(*pids: int, seconds: float = ENDS_WITHIN) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if processes.process_start(pid) is not None]:
        assert time.monotonic() < deadline, f"alive after {seconds:g} s: {alive}"
        time.sleep(0.02)


def status_of(port: int, token: str | None) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request("POST", "/generate", b'{"prompts": ["a"]}', headers)
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def beating(server: Leased) -> Iterator[None]:
    """Send heartbeats meanwhile."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.3):
            with suppress(OSError):
                server.say({"type": "beat"})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def begin_long_work(port: int) -> HTTPConnection:
    connection, reply = begin_work(port, Group(["a " * 100], {"max_tokens": 100}))
    assert reply.status == 200
    return connection


def begin_work(port: int, group: Group) -> tuple[HTTPConnection, HTTPResponse]:
    """Return a connection, and the answer whose head comes with the first heartbeat: the work has begun."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    request = msgspec.msgpack.encode(RunRequest([group], heartbeat=0.05))
    connection.request("POST", "/run", request, {"Authorization": "Bearer the-token"})
    return connection, connection.getresponse()


def test_a_server_tells_its_start_in_order_and_stops_when_told(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say(HELLO)
        ready = server.hear("ready")
        kinds = [message["type"] for message in server.heard]
        assert kinds[0] == "listening"
        assert [*kinds[1:-2], kinds[-2]] == ["phase"] * len(kinds[1:-2]) + ["answered"], "its weights are the last"
        assert [it["text"] for it in server.heard[1:-2]] == [
            "starting the engine",
            "loading",
            "generating the first token",
        ]
        assert ready["info"]["model"] == "m"
        hosts, port = server.heard[0]["address"]
        assert hosts == ["127.0.0.1"]
        assert [status_of(port, token) for token in (None, "the-tokem", "the-token")] == [401, 401, 200]
        (child,) = below(server.process.pid)
        server.say({"type": "stop"})
        assert server.hear("stopped") == {"type": "stopped"}
        assert server.process.wait(ENDS_WITHIN) == 0
        until_gone(child)


def test_a_server_that_is_told_to_drain_finishes_what_it_has(tmp_path: Path) -> None:
    with leased(tmp_path, latency=0.5) as server:
        server.say(HELLO)
        server.hear("ready")
        connection, reply = begin_work(server.heard[0]["address"][1], Group(["a b"]))
        server.say({"type": "drain"})
        assert (reply.status, b"a b" in reply.read()) == (200, True)
        connection.close()
        server.hear("stopped")
        assert server.process.wait(ENDS_WITHIN) == 0


def test_a_server_that_fails_says_why(tmp_path: Path) -> None:
    with leased(tmp_path, fail_start="no such model") as server:
        server.say(HELLO)
        assert server.hear("failed")["cause"] == "no such model"
        assert server.process.wait(ENDS_WITHIN) == 1


@pytest.mark.parametrize("moment", ["before hello", "loading", "idle", "mid-request"])
def test_a_server_and_its_child_end_when_the_line_ends(tmp_path: Path, moment: str) -> None:
    with leased(tmp_path, latency=0.5, load_time=60.0 if moment == "loading" else 0.0) as server:
        working: HTTPConnection | None = None
        children: list[int] = []
        if moment != "before hello":
            server.say(HELLO)
            if moment == "loading":
                server.until_loading()
            else:
                server.hear("ready")
            if moment == "mid-request":
                working = begin_long_work(server.heard[0]["address"][1])
            children = below(server.process.pid)
            assert len(children) == 1
        server.hang_up()
        server.process.wait(ENDS_WITHIN)
        until_gone(*children)
        if working is not None:
            working.close()


def test_a_server_that_nobody_greets_says_what_is_missing(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say(b"who is there?\n")
        server.hang_up()
        assert server.process.wait(60) == 1
        assert "no owner is connected to stdin" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_server_ends_when_its_owner_is_gone_while_a_plugin_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMPORT_SECONDS", "60")
    (tmp_path / "slow_plugin.py").write_text(NOISY)
    plugin = ("--plugins", "slow_plugin", "--plugin_folder", str(tmp_path))
    with leased(tmp_path, *plugin, type="noisy") as server:
        server.say(HELLO)
        deadline = time.monotonic() + 60
        while "from a program" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.hang_up()
        server.process.wait(ENDS_WITHIN)


OWNER = """
import os, subprocess, sys, time
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
server.stdin.write(b'{"type": "hello", "instance": "i", "token": "t"}\\n')
server.stdin.flush()
print(server.pid, flush=True)
for line in server.stdout:
    print(line.decode(), end="", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("load_time", "until"), [(60.0, '"loading"'), (0.0, '"ready"')], ids=["loading", "idle"])
def test_a_server_and_its_child_end_when_the_owner_is_killed(tmp_path: Path, load_time: float, until: str) -> None:
    section = json.dumps({"type": "echo", "load_time": load_time})
    server = [sys.executable, str(PROGRAM), "--serve", "--model", "m", "--port", "0", "--engine", section, "--lease"]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *server], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "GSERVE_ID": "lease"},
    )  # fmt: skip
    assert owner.stdout is not None
    with owner.stdout:
        pid = int(owner.stdout.readline())
        while until not in owner.stdout.readline():
            assert processes.process_start(pid) is not None
        (child,) = below(pid)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        until_gone(pid, child)


def test_a_server_ends_when_no_beat_comes(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say({**HELLO, "ttl": 4.0})
        with beating(server):
            server.hear("ready")
            (child,) = below(server.process.pid)
            time.sleep(5.0)  # with heartbeats it lives longer than that
            assert server.process.poll() is None
        server.process.wait(4.0 + ENDS_WITHIN)
        until_gone(child)


def test_where_only_the_end_of_the_line_counts_a_server_needs_no_heartbeat(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say({**HELLO, "stall_timeout": 1.0})
        server.hear("ready")
        time.sleep(3.0)
        assert server.process.poll() is None
        assert server.hear("pulse")
        server.hang_up()
        server.process.wait(ENDS_WITHIN)


def test_a_server_that_was_stopped_does_not_count_that_time_as_silence(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say({**HELLO, "ttl": 6.0})  # two checks after the end of the stop count for up to 3 s
        with beating(server):
            server.hear("ready")
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(7.0)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        with beating(server):
            server.say({"type": "stop"})
            server.hear("stopped")
            assert server.process.wait(ENDS_WITHIN) == 0
        assert "the owner is gone" not in server.log.read_text()


def test_what_is_told_to_an_owner_that_has_stopped_reading_does_not_hold_the_server_up(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        assert server.process.stdout is not None
        fcntl.fcntl(server.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        server.say(HELLO)
        address = server.hear("listening")["address"]
        line = os.open(f"/proc/self/fd/{server.process.stdout.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
        with suppress(BlockingIOError):
            while True:
                os.write(line, b"\n")  # until it takes nothing more
        os.close(line)
        deadline = time.monotonic() + 60
        while status_of(address[1], "the-token") != 200:  # 503 while it starts
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.say({"type": "stop"})
        assert server.process.wait(ENDS_WITHIN) == 0


def test_how_long_a_drain_lasts_is_said_by_the_owner(tmp_path: Path) -> None:
    with leased(tmp_path, latency=1.0) as server:
        server.say(HELLO)
        server.hear("ready")
        working = begin_long_work(server.heard[0]["address"][1])
        server.say({"type": "drain", "seconds": 600.0})
        time.sleep(1.0)
        assert server.process.poll() is None
        began = time.monotonic()
        server.say({"type": "drain", "seconds": 1.0})  # the last one counts
        server.hear("stopped")
        assert 0.5 < time.monotonic() - began < ENDS_WITHIN
        working.close()
        assert server.process.wait(ENDS_WITHIN) == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_to_all_processes_of_a_job_ends_no_server(tmp_path: Path, number: int) -> None:
    with leased(tmp_path) as server:
        server.say(HELLO)
        server.hear("ready")
        os.killpg(server.process.pid, number)
        assert status_of(server.heard[0]["address"][1], "the-token") == 200


NOTICE = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGUSR1)
sys.path = [it for it in sys.path if it != os.path.dirname(__file__)]
del sys.modules["uvloop"]
import uvloop
"""


def test_a_notice_while_a_server_imports_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text(NOTICE)
    ended = subprocess.run(
        [sys.executable, str(PROGRAM), "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "vllm_server.py" in ended.stdout


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_a_server_by_hand_runs_with_standard_streams_closed(tmp_path: Path, closed: str) -> None:
    command = [sys.executable, str(PROGRAM), "--serve", "--model", "m", "--port", "0", "--engine", '{"type":"echo"}']
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {closed}', "bash", *command], env={**os.environ, "GSERVE_ID": "closed"}
    )
    try:
        deadline = time.monotonic() + 20
        while not below(process.pid):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        streams = [str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)]
        assert streams[0] == "/dev/null"
        assert ("2>&-" not in closed) or set(streams) == {"/dev/null"}
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_the_owner_sends_heartbeats_while_nobody_receives() -> None:
    read, write = os.pipe()
    stdout, theirs = os.pipe()
    with os.fdopen(write, "wb", 0) as stdin, os.fdopen(stdout, "rb", 0) as out:
        owner = lease.OwnerEnd(stdin, out, lease.Hello("i", "t"))
        lines = lease.Lines(read)
        heard: list[bytes] = []
        deadline = time.monotonic() + lease.HEARTBEAT_SECONDS + 30
        while b'{"type":"beat"}' not in heard:
            assert time.monotonic() < deadline
            heard += lines.read(0.2) or []
        owner.close()
        owner.close()
        owner.send(lease.Stop())
        while (more := lines.read(0.2)) is not None:
            heard += more
        assert b'{"type":"stop"}' not in heard
    os.close(read)
    os.close(theirs)


def test_what_does_not_fit_into_the_line_follows_in_order() -> None:
    read, write = os.pipe()
    stdout, theirs = os.pipe()
    with os.fdopen(write, "wb", 0) as stdin, os.fdopen(stdout, "rb", 0) as out:
        owner = lease.OwnerEnd(stdin, out, lease.Hello("i", "t", folder="x" * 300_000))
        threads = [threading.Thread(target=owner.send, args=(lease.Drain(float(it)),)) for it in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines = lease.Lines(read)
        heard: list[lease.Down] = []
        deadline = time.monotonic() + 20
        while len(heard) < 21:
            assert time.monotonic() < deadline
            heard += [it for it in lease.decode(lines.read(0.2) or []) if not isinstance(it, lease.Beat)]
        assert isinstance(heard[0], lease.Hello)
        assert {it.seconds for it in heard[1:] if isinstance(it, lease.Drain)} == set(map(float, range(20)))
        owner.close()
    os.close(read)
    os.close(theirs)


def test_what_a_plugin_prints_does_not_disturb_the_line(tmp_path: Path) -> None:
    (tmp_path / "noisy_plugin.py").write_text(NOISY)
    plugin = ("--plugins", "noisy_plugin", "--plugin_folder", str(tmp_path))
    with leased(tmp_path, *plugin, type="noisy") as server:
        server.say(HELLO)
        server.hear("ready")  # takes nothing but messages
        log = server.log.read_text()
        for noise in ("noise on stdout", "past Python's own", "from a program", "noise while it loads"):
            assert noise in log


def test_the_engine_inherits_nothing_of_the_line(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say(HELLO)
        server.hear("ready")
        assert server.process.stdin is not None
        assert server.process.stdout is not None
        line = {Path(f"/proc/self/fd/{it.fileno()}").readlink() for it in (server.process.stdin, server.process.stdout)}

        def held(pid: int) -> set[Path]:
            return {it.readlink() for it in Path(f"/proc/{pid}/fd").iterdir()}

        (child,) = below(server.process.pid)
        assert line <= held(server.process.pid)
        assert not line & held(child)


def test_lines_that_are_no_messages_are_passed_over(tmp_path: Path) -> None:
    garbage = b'Welcome to the cluster!\n{"type": "hullo"}\n\xff\xfe\n\n[1, 2]\n' + b"x" * 3_000_000 + b"\n"
    with leased(tmp_path) as server:
        server.say(garbage)
        server.say(HELLO)
        server.hear("ready", 20)
        server.say(garbage)
        server.say({"type": "stop"})
        server.hear("stopped")
        assert server.process.wait(ENDS_WITHIN) == 0


def test_a_hello_that_comes_in_pieces_with_more_behind_it_is_understood(tmp_path: Path) -> None:
    with leased(tmp_path, load_time=60.0) as server:
        text = json.dumps(HELLO).encode() + b'\n{"type": "beat"}\n{"type": "stop"}\n'
        server.say(text[:20])
        time.sleep(1.0)
        server.say(text[20:])
        server.hear("stopped")
        assert server.process.wait(ENDS_WITHIN) == 0


def test_a_server_does_not_mind_an_owner_that_does_not_read(tmp_path: Path) -> None:
    with leased(tmp_path) as server:
        server.say(HELLO)
        assert server.process.stdout is not None
        server.process.stdout.close()
        deadline = time.monotonic() + 60
        while "ready: m" not in server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.say({"type": "stop"})
        assert server.process.wait(ENDS_WITHIN) == 0


def test_a_heart_that_could_not_begin_begins_with_the_next_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    heart = lease._Heartbeats()
    beats: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            heart.add(Beating(beats))
    heart.add(Beating(beats))
    assert len(heart._ends) == 1
    deadline = time.monotonic() + 20
    while not beats:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.01)


class Beating(lease.OwnerEnd):
    """A lease that only counts its heartbeats."""

    def __init__(self, beats: list[int]) -> None:
        self._beats = beats

    def send_heartbeat(self) -> bool:
        self._beats.append(1)
        return len(self._beats) < 3


GRANDCHILD = """
import os, sys
from gserve_core.lease import ServerEnd
from gserve_core.host.server_log import ServerLog
line, log = ServerEnd(), ServerLog()
child = os.fork()
if not child:
    own = [os.open("/etc/passwd", os.O_RDONLY) for _ in range(5)]  # they get the numbers that were closed
    grandchild = os.fork()
    if not grandchild:
        for number in own:
            os.fstat(number)
        os._exit(0)
    os._exit(os.waitpid(grandchild, 0)[1] != 0)
os._exit(os.waitpid(child, 0)[1] != 0)
"""


def test_what_a_child_has_opened_stays_open_in_what_it_forks() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", GRANDCHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(lease.encode(lease.Hello("i", "t")))
        process.stdin.flush()
        said = process.stderr.read()
        assert process.wait(60) == 0, said
        assert b"Exception ignored" not in said


WITHOUT_THREADS = """
import threading
from gserve_core import lease

def refuse(thread):
    raise RuntimeError("can't start new thread")

class Closed:
    def read(self, seconds):
        return None

class Hello:
    ttl = None

server = lease.ServerEnd.__new__(lease.ServerEnd)
server._lines, server.hello, server._handlers, server.start_cleanup = Closed(), Hello(), None, lambda: None
threading.Thread.start = refuse
server._run_reader()
"""


def test_a_server_that_can_start_no_thread_ends_with_its_owner_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], start_new_session=True, timeout=60.0, check=False, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def test_messages_of_a_server_of_another_version_are_read() -> None:
    older = msgspec.json.decode(b'{"type":"pulse","finished":3,"alone":true}', type=lease.Pulse)
    assert older == lease.Pulse(3, alone=True, counters=Counters())
    newer = b'{"type":"pulse","counters":{"items":3,"of_the_future":1},"of_the_future":1}'
    assert msgspec.json.decode(newer, type=lease.Pulse) == lease.Pulse(counters=Counters(items=3))
