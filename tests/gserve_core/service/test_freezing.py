"""A healthy service that is stopped for a while, in part or as a whole: nothing is killed for it.

`stall_timeout` is 2 s here, and everything is stopped for longer than that.
"""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

STALL, STOPPED = 2.0, 4.0
OWNER = f"""
import logging, sys
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

logging.basicConfig(filename=sys.argv[1])
serve = ServeConfig(servers=2, stall_timeout={STALL}, startup_timeout=60.0)
with VLLMService(LLMConfig("m"), serve, engine=EchoEngine(latency=0.01)) as service:
    print("ready", flush=True)
    for line in sys.stdin:
        answers = service.generate(["a b c"] * 20)
        states = [(status.state.value, status.restarts) for status in service.status()]
        print(answers == [["a b c"]] * 20, states, flush=True)
"""
GOOD = "True [('ready', 0), ('ready', 0)]"


class Owner:
    """A program with a service of two servers."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "owner.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OWNER), str(self.log)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.says("ready")
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        assert len(self.below) == 5, "a nursery, two servers, and a process of each engine"

    def says(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line

    def is_well(self) -> None:
        """Have the service answer a call."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.says(GOOD)
        assert {it.pid for it in psutil.Process(self.process.pid).children(recursive=True)} == {
            it.pid for it in self.below
        }
        assert "hang" not in self.log.read_text()

    def signal(self, number: int, *, owner: bool = False, below: bool = False) -> None:
        if owner:
            self.process.send_signal(number)
        for process in self.below if below else ():
            process.send_signal(number)

    def close(self) -> None:
        self.signal(signal.SIGCONT, owner=True, below=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    """Return a program with a service, which all tests here have to survive."""
    one = Owner(tmp_path_factory.mktemp("owner"))
    yield one
    one.close()


def test_servers_whose_owner_is_stopped_go_on(owner: Owner) -> None:
    owner.signal(signal.SIGSTOP, owner=True)
    time.sleep(STOPPED)
    owner.signal(signal.SIGCONT, owner=True)
    owner.is_well()


@pytest.mark.parametrize("first", ["the owner", "the servers"])
def test_what_was_stopped_as_a_whole_goes_on_whoever_goes_on_first(owner: Owner, first: str) -> None:
    owner.signal(signal.SIGSTOP, owner=True, below=True)
    time.sleep(STOPPED)
    owner.signal(signal.SIGCONT, owner=first == "the owner", below=first != "the owner")
    time.sleep(STALL / 2)
    owner.signal(signal.SIGCONT, owner=True, below=True)
    owner.is_well()
    time.sleep(STALL)
    owner.is_well()


def test_an_owner_that_goes_on_long_after_its_servers_finds_them_well(owner: Owner) -> None:
    owner.signal(signal.SIGSTOP, owner=True, below=True)
    time.sleep(1.0)
    owner.signal(signal.SIGCONT, below=True)
    time.sleep(STOPPED)
    owner.signal(signal.SIGCONT, owner=True)
    owner.is_well()
