"""Faults of owners: however one ends, and whenever, nothing of it may be left."""

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec

from gserve_core.testing import RUN_VARIABLE

from . import oracles
from .frame import GONE_SECONDS, ROOT, Outcome, Scale
from .oracles import Traces, until
from .owner import Options

PATIENCE = 120.0
"""How long an owner may take to come to the next part of its life."""
AT_ONCE = 3
"""How many owners live beside one another."""
ECHO = {"latency": 0.02, "capacity": 4, "processes": 2, "load_time": 1.0}
START = 3.0
"""Seconds that an owner takes to spawn and load on echo, or so: within them the moments of a kill are chosen."""


class Owner:
    """An owner at work, in a session and with a mark of its own."""

    def __init__(self, options: Options, patience: float) -> None:
        self._patience = patience
        self.run = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.owner", msgspec.json.encode(options)],
            cwd=ROOT, env=os.environ | {RUN_VARIABLE: self.run}, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._rest = b""

    def hear(self, kind: str) -> str:
        """Return the next line that begins so. Raises AssertionError: there is none."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + self._patience
        while True:
            line, newline, self._rest = self._rest.partition(b"\n")
            if newline:
                if line.startswith(kind.encode()):
                    return line.decode()
                continue
            self._rest = line
            assert select.select([self.process.stdout], [], [], deadline - time.monotonic())[0], f"no '{kind}'"
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
            assert chunk, f"the owner ended before '{kind}'"
            self._rest += chunk

    def servers(self) -> list[int]:
        """Return the process ids of its servers."""
        return [it.pid for it in oracles.of_servers(self.run) if it.role == "server"]


@contextlib.contextmanager
def owner(options: Options, patience: float = PATIENCE) -> Iterator[Owner]:
    """Have an owner for as long as the context lasts; whatever happens, nothing of it is left after."""
    one = Owner(options, patience)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        oracles.kill(oracles.marked(one.run))
        assert one.process.stdout is not None
        one.process.stdout.close()


def end_and_look(outcome: Outcome, one: Owner, *signals: tuple[int, int]) -> None:
    """Send each process its signal; nothing of the owner may be left `GONE_SECONDS` after."""
    traces = Traces(one.process.pid, one.run)
    for pid, number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
        one.process.wait(GONE_SECONDS)
    try:
        traces.wait_gone(GONE_SECONDS - (time.monotonic() - began))
    except AssertionError:
        outcome.orphans += len(traces.left())
        raise
    outcome.recover.append(time.monotonic() - began)


def killed(scale: Scale) -> Outcome:
    """Kill owners at random moments of their life: spawn, load, idle, mid-batch, shutdown."""
    outcome = Outcome(fault="owner killed -9 at any moment of its life")

    def kill_one(chance: random.Random) -> None:
        stage, most = chance.choice([("spawn", START), ("idle", 0.5), ("batch", 0.7), ("leave", 0.3)])
        delay = chance.uniform(0, most)
        with outcome.trial(f"{delay:.2f} s after '{stage}'"), owner(Options(echo=ECHO, servers=2)) as one:
            one.hear(stage)
            time.sleep(delay)
            end_and_look(outcome, one, (one.process.pid, signal.SIGKILL))

    _beside(kill_one, scale, scale.of(10, 100))
    return outcome


def killed_with_server(scale: Scale) -> Outcome:
    """Kill owner and server at the same instant: what is below the server must notice by itself."""
    outcome = Outcome(fault="owner and server killed -9 at the same instant")

    def kill_both(chance: random.Random) -> None:
        stage, most = chance.choice([("spawn", START), ("idle", 0.5), ("batch", 0.7)])
        delay = chance.uniform(0, most)
        with outcome.trial(f"{delay:.2f} s after '{stage}'"), owner(Options(echo=ECHO)) as one:
            one.hear(stage)
            time.sleep(delay)
            until(one.servers, PATIENCE, "a server")
            both = [one.process.pid, *one.servers()]
            end_and_look(outcome, one, *((pid, signal.SIGKILL) for pid in both))

    _beside(kill_both, scale, scale.of(4, 40))
    return outcome


def other_ends(scale: Scale) -> Outcome:
    """End owners by TERM, HUP, INT, `os._exit` and an exception, in the middle of a batch."""
    outcome = Outcome(fault="owner ends by TERM, HUP, INT, os._exit, an exception")
    ends = ["SIGTERM", "SIGHUP", "SIGINT", "exit", "exception"] * scale.of(1, 8)

    def end_one(chance: random.Random) -> None:
        end = ends.pop()
        options = Options(echo=ECHO, end="" if end.startswith("SIG") else end)
        with outcome.trial(end), owner(options) as one:
            one.hear("batch")
            time.sleep(chance.uniform(0, 0.5))
            if options.end:
                end_and_look(outcome, one)
            else:
                end_and_look(outcome, one, (one.process.pid, signal.Signals[end]))

    _beside(end_one, scale, len(ends))
    return outcome


def notebook(scale: Scale) -> Outcome:
    """Do what a notebook does: signal the owner's whole process group, first to interrupt it, then to restart it."""
    outcome = Outcome(fault="a notebook interrupts its process group, then kills it")
    chance = scale.random
    for _ in range(scale.of(2, 20)):
        with outcome.trial("interrupt and restart"), owner(Options(echo=ECHO, is_notebook=True)) as one:
            one.hear("batch")
            servers = one.servers()
            for _ in range(3):
                time.sleep(chance.uniform(0.3, 0.7))
                os.killpg(one.process.pid, signal.SIGINT)
                since = time.monotonic()
                _, finished, given, is_right = one.hear("gave").split()
                outcome.recover.append(time.monotonic() - since)
                assert 0 < int(finished) < int(given), f"{finished} of {given} items were finished when interrupted"
                assert is_right == "True"
                assert one.hear("gave") == f"gave {given} {given} True", "the next batch"
                assert one.servers() == servers, "the interrupt reached the server"
            traces = Traces(one.process.pid, one.run)
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
            traces.wait_gone(GONE_SECONDS)
    return outcome


def _beside(trial: Callable[[random.Random], None], scale: Scale, times: int) -> None:
    """Run a trial so many times, some beside one another, each with random choices of its own."""
    chances = [random.Random(scale.random.random() + number) for number in range(times)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(trial, chances))
