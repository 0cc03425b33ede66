"""What the rows see with: processes by their marks in /proc, sockets, the states of servers, and what became of items.

Nothing here asks gserve whether all is well, but for the states of the servers, which are what is measured.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil

from gserve import ItemError, VLLMServer, VLLMService
from gserve_core.service.state import State
from gserve_core.testing import RUN_VARIABLE

ID = b"GSERVE_ID="
ROLES = {  # what the command of a process holds, and what the process is
    "srun --nodes": "srun",  # it has the server's command as its arguments
    "slurm/task.py": "task",
    "gserve nursery": "nursery",
    "vllm_server.py": "server",
    "gserve_core.engines.echo_process engine": "engine",
    "gserve_core.engines.echo_process worker": "worker",
    "VLLM::EngineCore": "engine",
    "VLLM::Worker": "worker",
}
LOOK = 0.01
"""Seconds between two looks at anything."""


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition` holds; return its value. Raises AssertionError: it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not so within {seconds:g} s"
        time.sleep(LOOK)
    return value


def raised[E: BaseException](kind: type[E], function: Callable[..., object], *arguments: Any) -> E:
    """Return the exception of this kind that `function` raises. Raises AssertionError: it raises none."""
    try:
        function(*arguments)
    except kind as error:
        return error
    raise AssertionError(f"{function} raised no {kind.__name__}")


# ----------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Marked:
    """A live process that carries the mark of a run. `instance`: the server that it belongs to; "" where to none."""

    pid: int
    instance: str
    command: str

    @property
    def role(self) -> str:
        """Say what it is: a "server", its "engine", "worker", "nursery", "srun" or "task", or "other"."""
        return next((role for words, role in ROLES.items() if words in self.command), "other")


def marked(run: str | None = None) -> list[Marked]:
    """Return the live processes of a run (default: this one's) but for this process itself. Zombies do not live."""
    mark = f"{RUN_VARIABLE}={run or os.environ[RUN_VARIABLE]}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                environ = (entry / "environ").read_bytes().split(b"\0")
                if mark in environ and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    instance = next((it.removeprefix(ID) for it in environ if it.startswith(ID)), b"")
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found.append(Marked(int(entry.name), instance.decode(), command))
    return found


def of_servers(run: str | None = None) -> list[Marked]:
    """Return the processes of a run that are servers, or below one."""
    return [process for process in marked(run) if process.instance]


def of(server: VLLMServer) -> dict[str, int]:
    """Return the process ids of a ready server by their roles."""
    instance = server.record().instance
    return {process.role: process.pid for process in of_servers() if process.instance == instance}


def wait_gone(run: str, seconds: float) -> list[Marked]:
    """Wait until nothing of a run is alive; return what still is after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := marked(run)) and time.monotonic() < deadline:
        time.sleep(5 * LOOK)
    return left


def kill(processes: Sequence[Marked]) -> None:
    """Kill processes, where they are still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class Traces:
    """Everything below a process at one moment, by parentage alone: what must be gone when the process is."""

    def __init__(self, pid: int, run: str) -> None:
        self._run = run
        self._below: list[psutil.Process] = []
        self._ports: set[int] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._below = psutil.Process(pid).children(recursive=True)
        for process in self._below:
            with contextlib.suppress(psutil.Error):
                self._ports |= {it.laddr.port for it in process.net_connections("tcp") if it.status == "LISTEN"}

    def left(self) -> list[str]:
        """Return what is still there: by parentage then, by mark now, and the ports."""
        found = []
        for process in self._below:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        found += [f"{process.pid} {process.command[:80]} (by its mark)" for process in marked(self._run)]
        if self._ports:
            self._ports &= listening()  # one that was free is another's, if it is taken again
        return found + [f"port {port}" for port in sorted(self._ports)]

    def wait_gone(self, seconds: float) -> float:
        """Return how long it took until nothing was left. Raises AssertionError: something is, after `seconds`."""
        began = time.monotonic()
        while left := self.left():
            if time.monotonic() - began > seconds:
                kill(marked(self._run))
                raise AssertionError(f"{len(left)} left after {seconds:g} s: {'; '.join(left)}")
            time.sleep(5 * LOOK)
        return time.monotonic() - began


def listening() -> set[int]:
    """Return the TCP ports that somebody listens on, on this machine."""
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                ports.add(int(local.rpartition(":")[2], 16))
    return ports


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for as long as the context lasts; let it go on then, where it is still there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def hog(seconds: float) -> Iterator[None]:
    """Have a process beside that takes all of a core; it ends by itself after `seconds`."""
    spin = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def squatter() -> Iterator[int]:
    """Have somebody listen on a port who answers 200 to everything; yields the port."""
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"status":"ok"}'
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answers() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                with line, contextlib.suppress(OSError):
                    line.recv(1 << 16)
                    line.sendall(answer)

        thread = threading.Thread(target=answers, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5.0)


def peak_memory(pid: int | str = "self") -> float:
    """Return the most memory that a process ever had, in MB (its VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1000


# -------------------------------------------------------------------------------------------------------------- servers


class Watch:
    """Looks at the servers of a service all the time, and remembers when what changed."""

    def __init__(self, service: VLLMService) -> None:
        self._service = service
        self._seen: list[list[tuple[float, State, Path | None]]] = [[] for _ in service.servers]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: all(self._seen), 10.0, "a look at every server")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(LOOK):
            for server, seen in zip(self._service.servers, self._seen, strict=True):
                status = server.status()
                if not seen or seen[-1][1:] != (status.state, status.log):
                    seen.append((time.monotonic(), status.state, status.log))

    def ready_for(self, index: int) -> float:
        """Return for how many seconds a server has been ready; 0 where it is not."""
        when, state, _ = self._seen[index][-1]
        return time.monotonic() - when if state == State.READY else 0.0

    def detected(self, index: int, since: float) -> float | None:
        """Return how many seconds after `since` the status of a server first said that its life was over."""
        life = [seen for seen in self._seen[index] if seen[0] <= since][-1][2]
        for when, state, log in list(self._seen[index]):
            if when > since and (log != life or state not in (State.READY, State.STARTING)):
                return when - since
        return None

    def recovered(self, index: int, since: float) -> float | None:
        """Return how many seconds after `since` the server was ready again, in another life."""
        life = [seen for seen in self._seen[index] if seen[0] <= since][-1][2]
        for when, state, log in list(self._seen[index]):
            if when > since and log != life and state == State.READY:
                return when - since
        return None

    def wait_recovered(self, index: int, since: float, seconds: float) -> tuple[float, float]:
        """Wait for that; return the seconds to detect and to recover. Raises AssertionError: not within `seconds`."""
        recovered = until(lambda: self.recovered(index, since), seconds, f"server {index} ready again")
        detected = self.detected(index, since)
        assert detected is not None
        return detected, recovered


def index_of(service: VLLMService, instance: str) -> int | None:
    """Return the server that has this instance: the ready one that says so, else the only one that is starting."""
    states = [server.status().state for server in service.servers]
    for index, server in enumerate(service.servers):
        with contextlib.suppress(AssertionError):  # it has ended since we looked
            if states[index] == State.READY and server.record().instance == instance:
                return index
    starting = [index for index, state in enumerate(states) if state == State.STARTING]
    return starting[0] if len(starting) == 1 else None


# ---------------------------------------------------------------------------------------------------------------- items


@dataclass
class Tally:
    """Counts what becomes of items. Every one has a number of its own, which its answer must repeat."""

    items: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    lost: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    patience: ClassVar[float] = 60.0
    """Seconds after which an item of a call is lost, whatever is going on."""

    def prompts(self, count: int) -> list[str]:
        """Return new prompts, no two of them alike."""
        self.items += count
        return [f"item-{next(self._numbers)}" for _ in range(count)]

    def params(self, prompts: list[str]) -> Any:
        """Return the sampling parameters of prompts."""
        return None

    def is_right(self, prompt: str, outputs: Any) -> bool:
        """Say whether this is the answer to this prompt."""
        return [it.text for it in outputs] == [prompt]

    def batch(self, service: VLLMService, count: int) -> None:
        """Send new items as one call; the results must be theirs, in their order."""
        prompts = self.prompts(count)
        results = service.generate(
            prompts, self.params(prompts), return_extra=True, on_error="return", deadline=self.patience
        )
        self.lost += ["no result"] * (len(prompts) - len(results))
        for prompt, result in zip(prompts, results, strict=False):
            self._judge(prompt, result)

    def stream(self, service: VLLMService, count: int) -> None:
        """Send new items, and take them as they come: each of them once."""
        prompts = self.prompts(count)
        seen: set[int] = set()
        for index, outcome in service.generate_iter(prompts, self.params(prompts), deadline=self.patience):
            self.duplicated += index in seen
            seen.add(index)
            self._judge(prompts[index], outcome)
        self.lost += ["no result"] * (len(prompts) - len(seen))

    def _judge(self, prompt: str, result: Any) -> None:
        if isinstance(result, ItemError):
            self.lost.append(f"{prompt}: {type(result).__name__}: {result}")
        elif not self.is_right(prompt, result):
            self.out_of_order += 1
